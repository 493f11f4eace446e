"""Configuration of the block-autoregressive prior.

Legend: K blocks, L_k tokens of block k, V codes, C code channels, D width.
"""

from typing import Literal

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.files.config_fields import refuse_unknown_fields


class BlockPriorConfig(PreTrainedConfig):
    """Everything that fixes a prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`.
        vocab_size: V, the number of codes.
        embedding_dim: C, the code channels of the input.
        num_classes: classes to condition on; 0 for an unconditional model.
        class_names: one name a class, or None.
        hidden_size: D.
        num_layers: transformer blocks.
        num_heads: attention heads; must divide D.
        mlp_ratio: width of the feed-forward layer over D.
        input_embedding: "codes" (a linear map of code-space vectors) or "tokens" (a table over indices; tile layouts
            only); None takes "tokens" for tiles and "codes" for scales.
        use_shared_adaln: one AdaLN projection for all layers with a per-layer offset, or one projection a layer.
        use_normalized_attention: L2-normalise queries and keys and learn each head's temperature.
        attention_scale: factor on 1/sqrt(head width) in the softmax; unused with normalised attention.
        norm_eps: epsilon of the layer norms.
        dropout: probability after attention and in the feed-forward layers.
        drop_path: stochastic-depth rate of the last layer, rising linearly from 0.
        label_smoothing: of the cross-entropy, in [0, 1).
        adaln_gamma_init: factor on the initial AdaLN gates.
    """

    model_type = "nextblock_block_prior"

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
        mlp_ratio: float = 4.0,
        input_embedding: Literal["codes", "tokens"] | None = None,
        use_shared_adaln: bool = False,
        use_normalized_attention: bool = False,
        attention_scale: float = 1.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        adaln_gamma_init: float = 1e-3,
        **kwargs,
    ):
        self.layout = (BlockLayout.tiles(1, 8) if layout is None else BlockLayout.from_dict(layout)).to_dict()
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        is_tiles = not self.block_layout().is_scales
        self.input_embedding = input_embedding or ("tokens" if is_tiles else "codes")
        self.use_shared_adaln = use_shared_adaln
        self.use_normalized_attention = use_normalized_attention
        self.attention_scale = attention_scale
        self.norm_eps = norm_eps
        self.dropout = dropout
        self.drop_path = drop_path
        self.label_smoothing = label_smoothing
        self.adaln_gamma_init = adaln_gamma_init
        refuse_unknown_fields(type(self), kwargs)
        self._check()
        super().__init__(**kwargs)

    def block_layout(self) -> BlockLayout:
        """Return the layout of the tokens that the prior predicts."""
        return BlockLayout.from_dict(self.layout)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class": the last row of the class table."""
        return self.num_classes

    def _check(self) -> None:
        """Refuse values outside their range."""
        for field, lowest in {
            "vocab_size": 2,
            "embedding_dim": 1,
            "num_classes": 0,
            "hidden_size": 1,
            "num_layers": 1,
            "num_heads": 1,
        }.items():
            if getattr(self, field) < lowest:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least {lowest}")
        for field in ("dropout", "drop_path", "label_smoothing"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number in [0, 1)")
        for field in ("mlp_ratio", "norm_eps", "attention_scale"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number above 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a divisor of hidden_size {self.hidden_size}")
        if self.input_embedding not in ("codes", "tokens"):
            raise ValueError(f"input_embedding is {self.input_embedding!r}; expected 'codes' or 'tokens'")
        if self.input_embedding == "tokens" and self.block_layout().is_scales:
            raise ValueError("input_embedding is 'tokens'; expected 'codes' for a scale layout")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names; expected {self.num_classes}, one a class")
