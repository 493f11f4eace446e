"""Configuration of the block-autoregressive prior.

Legend: K blocks, L_k tokens of block k, V codes, C code channels, D width.
"""

from typing import Literal

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import MAX_CODES
from nextblock.files.config_fields import (
    check_counts,
    check_flags,
    check_num_parameters,
    check_number,
    refuse_unknown_fields,
)

from .head_plan import HeadKind
from .heads import num_head_parameters
from .prior_fields import MAX_CLASSES, MAX_LAYERS, MAX_WIDTH, check_names, set_fields


class BlockPriorConfig(PreTrainedConfig):
    """Everything that fixes a prior's architecture and arithmetic.

    Args:
        layout: the tokenizer's `BlockLayout.to_dict()`.
        vocab_size: V, the number of codes.
        embedding_dim: C, the code channels of the input.
        num_classes: classes to condition on; 0 for an unconditional model.
        class_names: one name a class, or None.
        text_dim: E, the channels of text features to condition on in place of classes; None for classes.
        max_text_positions: the most positions that a text has.
        num_empty_positions: positions of the empty text's features, which then stand for no text; 0 has a learned row.
        has_text_prefix: whether text positions come before the first token.
        has_text_vector: whether a text's mean modulates all layers.
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

    model_type = "nextblock_block_prior"

    def __init__(
        self,
        layout: dict | None = None,
        vocab_size: int = 16,
        embedding_dim: int = 64,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        text_dim: int | None = None,
        max_text_positions: int = 120,
        num_empty_positions: int = 0,
        has_text_prefix: bool = True,
        has_text_vector: bool = True,
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
        head: HeadKind = "softmax",
        head_groups: list[int] | None = None,
        head_width: int | None = None,
        head_layers: int | None = None,
        head_passes: int | None = None,
        tokenizer_fingerprint: str | None = None,
        code_bases: list[int] | None = None,
        **kwargs,
    ):
        set_fields(self, locals())
        self.layout = (BlockLayout.tiles(1, 8) if layout is None else BlockLayout.from_dict(layout)).to_dict()
        is_tiles = not self.block_layout().is_scales
        self.input_embedding = input_embedding or ("tokens" if is_tiles else "codes")
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
        check_counts(
            self,
            {
                "vocab_size": (2, MAX_CODES),
                "embedding_dim": (1, MAX_WIDTH),
                "num_classes": (0, MAX_CLASSES),
                "hidden_size": (1, MAX_WIDTH),
                "num_layers": (1, MAX_LAYERS),
                "num_heads": (1, MAX_WIDTH),
            },
        )
        check_flags(self, "use_shared_adaln", "use_normalized_attention", "has_text_prefix", "has_text_vector")
        self._check_text()
        for field in ("dropout", "drop_path", "label_smoothing"):
            check_number(self, field, lambda value: 0 <= value < 1, "a number in [0, 1)")
        for field in ("mlp_ratio", "norm_eps", "attention_scale"):
            check_number(self, field, lambda value: value > 0, "a finite number above 0")
        check_number(self, "adaln_gamma_init", lambda value: True, "a finite number")
        D = self.hidden_size
        num_of_head = num_head_parameters(self, D)
        check_num_parameters(
            self.num_layers * int(4 + 2 * self.mlp_ratio) * D**2 + num_of_head + self.num_classes * D,
            f"num_layers {self.num_layers}, hidden_size {D}, mlp_ratio {self.mlp_ratio}, vocab_size {self.vocab_size} "
            f"and num_classes {self.num_classes}",
        )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a divisor of hidden_size {self.hidden_size}")
        if self.input_embedding not in ("codes", "tokens"):
            raise ValueError(f"input_embedding is {self.input_embedding!r}; expected 'codes' or 'tokens'")
        if self.input_embedding == "tokens" and self.block_layout().is_scales:
            raise ValueError("input_embedding is 'tokens'; expected 'codes' for a scale layout")
        check_names(self)

    def _check_text(self) -> None:
        """Refuse texts beside classes, texts that are not looked at, and sizes outside their range."""
        if self.text_dim is None:
            return
        bounds = {"text_dim": (1, MAX_WIDTH), "max_text_positions": (1, MAX_WIDTH)}
        check_counts(self, bounds | {"num_empty_positions": (0, self.max_text_positions)})
        if self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes} with text_dim {self.text_dim}; expected 0 with texts")
        if not (self.has_text_prefix or self.has_text_vector):
            raise ValueError("has_text_prefix and has_text_vector are False; expected at least one of them True")
