"""Configuration of the GPT prior.

Legend: L tokens, V codes, D width.
"""

from transformers import PreTrainedConfig

from nextblock.data.blocks import MAX_TOKENS, BlockLayout
from nextblock.files.config_fields import check_counts, check_number, refuse_unknown_fields

from .head_plan import HeadKind
from .prior_fields import MAX_WIDTH, check_names, check_sizes, stored_layout


class GPTPriorConfig(PreTrainedConfig):
    """Everything that fixes a GPT prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`, tiles of one cell.
        vocab_size: V, the number of codes.
        num_classes: classes to condition on, at most V: class k shares the row of code k; 0 for an unconditional model.
        class_names: one name a class, or None.
        start_token: code whose row stands first in an unconditional model.
        hidden_size: D.
        num_layers: transformer layers.
        num_heads: attention heads; must divide D.
        inner_size: width of the feed-forward layers; None takes 4·D.
        num_positions: rows of the table of positions, L or more; None takes L.
        norm_eps: epsilon of the layer norms.
        embedding_dropout: probability on the embedded tokens.
        dropout: probability after attention and after the feed-forward layers.
        attention_dropout: probability on the attention's weights.
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

    model_type = "nextblock_gpt_prior"

    def __init__(
        self,
        layout: dict | None = None,
        vocab_size: int = 16,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        start_token: int = 0,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        inner_size: int | None = None,
        num_positions: int | None = None,
        norm_eps: float = 1e-5,
        embedding_dropout: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
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
        self.start_token = start_token
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.inner_size = inner_size
        self.num_positions = num_positions
        self.norm_eps = norm_eps
        self.embedding_dropout = embedding_dropout
        self.dropout = dropout
        self.attention_dropout = attention_dropout
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
        return self.inner_size or 4 * self.hidden_size

    def _check(self) -> None:
        """Refuse values outside their range."""
        check_counts(self, {"hidden_size": (1, MAX_WIDTH)})
        if self.inner_size is not None:
            check_counts(self, {"inner_size": (1, MAX_WIDTH)})
        if self.num_positions is not None:
            check_counts(self, {"num_positions": (self.block_layout().num_tokens, MAX_TOKENS)})
        check_sizes(self, layer_parameters=2 * self.hidden_size * (2 * self.hidden_size + self.feed_forward_size))
        check_counts(self, {"start_token": (0, self.vocab_size - 1)})
        if self.num_classes > self.vocab_size:
            raise ValueError(
                f"num_classes is {self.num_classes}; expected at most vocab_size, {self.vocab_size}: a class has a "
                "code's row"
            )
        for field in ("embedding_dropout", "dropout", "attention_dropout", "label_smoothing"):
            check_number(self, field, lambda value: 0 <= value < 1, "a number in [0, 1)")
        check_number(self, "norm_eps", lambda value: value > 0, "a finite number above 0")
        check_names(self)
