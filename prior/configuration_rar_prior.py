"""Configuration of the randomized autoregressive prior, RAR (Yu et al. 2024, arXiv:2411.00776).

Legend: L all tokens, V codes, D width.
"""

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.files.config_fields import check_counts, check_num_parameters, check_number, refuse_unknown_fields

from .configuration_block_prior import MAX_CLASSES, MAX_CODES, MAX_LAYERS, MAX_WIDTH

MAX_ROWS = 1 << 24


class RARPriorConfig(PreTrainedConfig):
    """Everything that fixes a RAR prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`, tiles of one cell.
        vocab_size: V, the number of codes.
        embedding_dim: C, the code channels of the tokenizer; the prior takes indices.
        num_classes: classes to condition on; 0 for an unconditional model.
        class_names: one name a class, or None.
        hidden_size: D.
        num_layers: transformer blocks.
        num_heads: attention heads; must divide D.
        intermediate_size: width of the feed-forward layer; None is 4·D.
        norm_eps: epsilon of the layer norms.
        dropout: probability after attention and in the feed-forward layers.
        attention_dropout: probability that a weight of the attention is left out.
        label_smoothing: of the cross-entropy, in [0, 1).
        num_position_rows: rows of the two tables of positions; None is L + 2, all that are used. Published models have
            L + 1024.
        num_step_rows: rows of the table of steps; None is L + 1, all that are used. Published models have L + 100.
        tokenizer_fingerprint: of the tokenizer whose tokens the prior has learned, see
            `nextblock.files.fingerprints.model_fingerprint`; None where it is not known.
    """

    model_type = "nextblock_rar_prior"

    def __init__(
        self,
        layout: dict | None = None,
        vocab_size: int = 16,
        embedding_dim: int = 64,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        num_position_rows: int | None = None,
        num_step_rows: int | None = None,
        tokenizer_fingerprint: str | None = None,
        **kwargs,
    ):
        self.layout = (BlockLayout.tiles(1, 8) if layout is None else BlockLayout.from_dict(layout)).to_dict()
        L = self.block_layout().num_tokens
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.class_names = list(class_names) if isinstance(class_names, tuple) else class_names
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.norm_eps = norm_eps
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.label_smoothing = label_smoothing
        self.num_position_rows = L + 2 if num_position_rows is None else num_position_rows
        self.num_step_rows = L + 1 if num_step_rows is None else num_step_rows
        self.tokenizer_fingerprint = tokenizer_fingerprint
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
        if not self.block_layout().is_single_tokens:
            raise ValueError(f"layout is {self.layout}; expected tiles of one cell: RAR predicts single tokens")
        check_counts(
            self,
            {
                "vocab_size": (2, MAX_CODES),
                "embedding_dim": (1, MAX_WIDTH),
                "num_classes": (0, MAX_CLASSES),
                "hidden_size": (1, MAX_WIDTH),
                "num_layers": (1, MAX_LAYERS),
                "num_heads": (1, MAX_WIDTH),
                "intermediate_size": (1, MAX_WIDTH),
                "num_position_rows": (L + 2, MAX_ROWS),
                "num_step_rows": (L + 1, MAX_ROWS),
            },
        )
        for field in ("dropout", "attention_dropout", "label_smoothing"):
            check_number(self, field, lambda value: 0 <= value < 1, "a number in [0, 1)")
        check_number(self, "norm_eps", lambda value: value > 0, "a finite number above 0")
        D, inner = self.hidden_size, self.intermediate_size
        check_num_parameters(
            self.num_layers * (10 * D + 2 * inner) * D + (self.vocab_size + self.num_classes) * D,
            f"num_layers {self.num_layers}, hidden_size {D}, intermediate_size {inner}, vocab_size {self.vocab_size} "
            f"and num_classes {self.num_classes}",
        )
        if D % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a divisor of hidden_size {D}")
        if not isinstance(self.tokenizer_fingerprint, str | None):
            raise ValueError(f"tokenizer_fingerprint is {self.tokenizer_fingerprint!r}; expected a text, or None")
        names = self.class_names
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"class_names is {names!r}; expected texts, or None")
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"class_names has {len(names)} names; expected {self.num_classes}, one a class")
