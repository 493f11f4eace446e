"""Configuration of the GPT prior.

Legend: L tokens, V codes, D width.
"""

from transformers import PreTrainedConfig

from nextblock.data.blocks import MAX_TOKENS, BlockLayout
from nextblock.files.config_fields import check_counts, check_number, refuse_unknown_fields

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
        tokenizer_fingerprint: of the tokenizer whose tokens the prior has learned, see
            `nextblock.files.fingerprints.model_fingerprint`; None where it is not known.
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
        tokenizer_fingerprint: str | None = None,
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
        self.tokenizer_fingerprint = tokenizer_fingerprint
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
