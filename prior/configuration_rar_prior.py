"""Configuration of the randomized autoregressive prior, RAR (Yu et al. 2024, arXiv:2411.00776).

Legend: L all tokens, V codes, D width.
"""

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.files.config_fields import check_counts, check_number, refuse_unknown_fields

from .head_plan import HeadKind
from .prior_fields import MAX_WIDTH, check_names, check_sizes, stored_layout

# Of a table: more than any layout has tokens.
MAX_ROWS = 1 << 21


class RARPriorConfig(PreTrainedConfig):
    """Everything that fixes a RAR prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`, tiles of one cell.
        vocab_size: V, the number of codes.
        num_classes: classes to condition on; 0 for an unconditional model.
        class_names: one name a class, or None.
        hidden_size: D.
        num_layers: transformer blocks.
        num_heads: attention heads; must divide D.
        inner_size: width of the feed-forward layers; None is 4·D.
        norm_eps: epsilon of the layer norms.
        dropout: probability after attention and in the feed-forward layers.
        attention_dropout: probability that a weight of the attention is left out.
        label_smoothing: of the cross-entropy, in [0, 1).
        num_position_rows: rows of the two tables of positions; None is L + 2, all that are used. Published models have
            L + 1024.
        num_step_rows: rows of the table of steps; None is L + 1, all that are used. Published models have L + 100.
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

    model_type = "nextblock_rar_prior"

    def __init__(
        self,
        layout: dict | None = None,
        vocab_size: int = 16,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        inner_size: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        num_position_rows: int | None = None,
        num_step_rows: int | None = None,
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
        L = self.block_layout().num_tokens
        self.vocab_size = vocab_size
        self.num_classes = num_classes
        self.class_names = list(class_names) if isinstance(class_names, tuple) else class_names
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.inner_size = 4 * hidden_size if inner_size is None else inner_size
        self.norm_eps = norm_eps
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.label_smoothing = label_smoothing
        self.num_position_rows = L + 2 if num_position_rows is None else num_position_rows
        self.num_step_rows = L + 1 if num_step_rows is None else num_step_rows
        self.head = head
        self.head_groups = list(head_groups) if isinstance(head_groups, tuple) else head_groups
        self.head_width = head_width
        self.head_layers = head_layers
        self.head_passes = head_passes
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.code_bases = list(code_bases) if isinstance(code_bases, tuple) else code_bases
        refuse_unknown_fields(type(self), kwargs)
        self._check(L)
        super().__init__(**kwargs)

    def block_layout(self) -> BlockLayout:
        """Return the layout of the tokens that the prior predicts."""
        return BlockLayout.from_dict(self.layout)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class": the last row of the class table."""
        return self.num_classes

    def _check(self, L: int) -> None:
        """Refuse values outside their range."""
        check_counts(self, {"inner_size": (1, MAX_WIDTH), "hidden_size": (1, MAX_WIDTH)})
        check_counts(self, {"num_position_rows": (L + 2, MAX_ROWS), "num_step_rows": (L + 1, MAX_ROWS)})
        D = self.hidden_size
        check_sizes(self, layer_parameters=10 * D**2 + 2 * D * self.inner_size)
        for field in ("dropout", "attention_dropout", "label_smoothing"):
            check_number(self, field, lambda value: 0 <= value < 1, "a number in [0, 1)")
        check_number(self, "norm_eps", lambda value: value > 0, "a finite number above 0")
        check_names(self)
