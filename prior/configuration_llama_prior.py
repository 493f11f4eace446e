"""Configuration of the Llama prior.

Legend: L tokens, V codes, D width, E width of text features.
"""

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.files.config_fields import check_counts, check_number, refuse_unknown_fields

from .head_plan import HeadKind
from .prior_fields import MAX_WIDTH, check_names, check_sizes, stored_layout

_INNER_MULTIPLE = 256
_MAX_TEXT_POSITIONS = 1 << 16


class LlamaPriorConfig(PreTrainedConfig):
    """Everything that fixes a Llama prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`, tiles of one cell.
        vocab_size: V, the number of codes.
        num_classes: classes to condition on; 0 for an unconditional model, and with text.
        class_names: one name a class, or None.
        text_dim: E of the text features that the prior is conditioned on; None conditions on classes.
        max_text_positions: the most positions of a text, and rows of the table that stands for no text.
        hidden_size: D.
        num_layers: transformer layers.
        num_heads: attention heads; must divide D into widths that are multiples of 4.
        num_key_value_heads: heads of keys and values, a divisor of num_heads; None takes num_heads.
        inner_size: width of the feed-forward layers; None takes 8·D/3, rounded up to a multiple of 256.
        rope_base: base of the rotary embedding's frequencies.
        norm_eps: epsilon of the RMS norms.
        embedding_dropout: probability on the embedded prefix and tokens.
        dropout: probability after attention and after the feed-forward layers.
        drop_path: stochastic-depth rate of the last layer, rising linearly from 0.
        label_smoothing: of the cross-entropy, in [0, 1).
        head: what is predicted of a token: "softmax", a probability of each of the V codes; or its digits, where the
            codebook has any (FSQ, LFQ, BSQ): "digits" all at once (Infinity), "digits_in_turn" each given those before
            it, or "masked_digits" in a few passes, learned with digits hidden at random (BAR). Memory then grows with
            the digits and not with V.
        head_groups: how many neighbouring digits of the codebook are predicted together by one softmax, a count each,
            such as [6, 12] for 18 bits; None predicts every digit by itself. Not for "softmax".
        head_width: width of the network of "digits_in_turn" and "masked_digits"; None takes D.
        head_layers: feed-forward layers of that network; None takes 2.
        head_passes: passes in which "masked_digits" draws a token, the later the more digits at once; None takes 4, or
            one a digit where there are fewer. Weights do not depend on it.
        tokenizer_fingerprint: of the tokenizer whose tokens the prior has learned, see
            `nextblock.files.fingerprints.model_fingerprint`; None where it is not known.
        code_bases: bases of the digits of the tokenizer's codes, lowest first; None where they have none.
    """

    model_type = "nextblock_llama_prior"

    def __init__(
        self,
        layout: dict | None = None,
        vocab_size: int = 16,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        text_dim: int | None = None,
        max_text_positions: int = 120,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_key_value_heads: int | None = None,
        inner_size: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        embedding_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        head: HeadKind = "softmax",
        head_groups: list[int] | None = None,
        head_width: int | None = None,
        head_layers: int | None = None,
        head_passes: int | None = None,
        tokenizer_fingerprint: str | None = None,
        code_bases: list[int] | None = None,
        **kwargs,
    ):
        self.layout = stored_layout(layout)
        self.vocab_size = vocab_size
        self.num_classes = num_classes
        self.class_names = list(class_names) if isinstance(class_names, tuple) else class_names
        self.text_dim = text_dim
        self.max_text_positions = max_text_positions
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.inner_size = inner_size
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        self.embedding_dropout = embedding_dropout
        self.dropout = dropout
        self.drop_path = drop_path
        self.label_smoothing = label_smoothing
        self.head = head
        self.head_groups = list(head_groups) if isinstance(head_groups, tuple) else head_groups
        self.head_width = head_width
        self.head_layers = head_layers
        self.head_passes = head_passes
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.code_bases = list(code_bases) if isinstance(code_bases, tuple) else code_bases
        refuse_unknown_fields(type(self), kwargs)
        self._check()
        super().__init__(**kwargs)

    def block_layout(self) -> BlockLayout:
        """Return the layout of the tokens that the prior predicts."""
        return BlockLayout.from_dict(self.layout)

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.inner_size or default_inner_size(self.hidden_size)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_heads

    def _check(self) -> None:
        """Refuse values outside their range."""
        for field in ("inner_size", "num_key_value_heads", "text_dim"):
            if getattr(self, field) is not None:
                check_counts(self, {field: (1, MAX_WIDTH)})
        check_counts(self, {"hidden_size": (1, MAX_WIDTH), "max_text_positions": (1, _MAX_TEXT_POSITIONS)})
        D = self.hidden_size
        check_sizes(self, layer_parameters=4 * D**2 + 3 * D * self.feed_forward_size)
        if D // self.num_heads % 4:
            raise ValueError(
                f"num_heads is {self.num_heads}, heads of width {D // self.num_heads} at hidden_size {D}; expected a "
                "width that is a multiple of 4: a quarter turns by the row, a quarter by the column"
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; expected a divisor of num_heads {self.num_heads}"
            )
        for field in ("embedding_dropout", "dropout", "drop_path", "label_smoothing"):
            check_number(self, field, lambda value: 0 <= value < 1, "a number in [0, 1)")
        for field in ("rope_base", "norm_eps"):
            check_number(self, field, lambda value: value > 0, "a finite number above 0")
        if self.text_dim is not None and self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}; expected 0 with text_dim, {self.text_dim}")
        check_names(self)


def default_inner_size(hidden_size: int) -> int:
    """Return the feed-forward width that goes with a width: 8·D/3, rounded up to a multiple of 256."""
    return -(-(8 * hidden_size // 3) // _INNER_MULTIPLE) * _INNER_MULTIPLE
