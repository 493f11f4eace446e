"""Configuration of the VQ-VAE tokenizer. Legend: V codes, C code channels, H×W pixels, h×w latent cells."""

from typing import Literal

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout, as_shape
from nextblock.files.config_fields import refuse_unknown_fields

from .autoencoder import MIN_GROUP_CHANNELS


class VQVAEConfig(PreTrainedConfig):
    """Everything that fixes a tokenizer's architecture and arithmetic.

    Args:
        image_size: H and W in pixels, or one integer for both.
        num_channels: image channels, 3: pictures of any kind are read as RGB.
        autoencoder: "simple" (two strided convolutions, 4× smaller) or "vqgan" (2^(levels − 1) smaller).
        hidden_dim: base width in channels.
        width_multipliers: vqgan: one factor of `hidden_dim` a level, finest first.
        num_res_blocks: residual blocks a level; 0 (simple only) gives the plain Conv-ReLU-Conv.
        dropout: probability inside residual blocks.
        min_group_channels: fewest channels of a group in GroupNorm, which has at most 32 groups; 1, as in version
            0.1, lets a group of one channel lose colour and brightness.
        vocab_size: V, the number of codes.
        embedding_dim: C, the code channels.
        z_channels: channels of the encoder's output; None means `embedding_dim`.
        quant_conv_kernel_size: size of the convolutions around the quantizer, 1 or 3; 0 for none.
        layout: "scales" or "tiles".
        scales: sizes of the K token maps, integers or [height, width]; the last is the latent grid.
        tile: a tile's [height, width] in latent cells, or one integer for both.
        num_phi: scales: number of shared φ convolutions; 0 for none.
        phi_ratio: scales: r in φ(h) = (1 − r)·h + r·conv(h).
        beta: weight of the commitment loss.
        epsilon: smoothing of the moving-average counts and smallest norm in a normalisation.
        codebook_update: "gradient" or "ema" (moving average of the assigned features).
        codebook_ema_decay: decay of that moving average, in (0, 1).
        codebook_init: "uniform", or "data" (codes become features of training images before the first step).
        codebook_init_scale: uniform start in ± this; None means 1/V.
        codebook_metric: how the nearest code is searched, "euclidean" or "cosine".
        has_unit_codes: L2-normalise features and codes themselves; both metrics then find the same.
        revival_threshold: a code used less than this share of the mean is moved onto a feature; 0 never.
        var_phi_names: names that an export to VAR's format gives φ convolutions: "shared", "partially_shared" or
            "separate" as in the checkpoint that the tokenizer came from, null where that had none; "by_number" gives
            "shared" to one and "partially_shared" to several.
    """

    model_type = "nextblock_vqvae"

    def __init__(
        self,
        image_size: int | list[int] = 32,
        num_channels: int = 3,
        autoencoder: Literal["simple", "vqgan"] = "simple",
        hidden_dim: int = 128,
        width_multipliers: list[int] | None = None,
        num_res_blocks: int = 0,
        dropout: float = 0.0,
        min_group_channels: int = MIN_GROUP_CHANNELS,
        vocab_size: int = 16,
        embedding_dim: int = 64,
        z_channels: int | None = None,
        quant_conv_kernel_size: int = 0,
        layout: Literal["scales", "tiles"] = "tiles",
        scales: list[int | list[int]] | None = None,
        tile: int | list[int] = 1,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        codebook_ema_decay: float = 0.99,
        codebook_init: Literal["uniform", "data"] = "uniform",
        codebook_init_scale: float | None = None,
        codebook_metric: Literal["euclidean", "cosine"] = "euclidean",
        has_unit_codes: bool = False,
        revival_threshold: float = 0.0,
        var_phi_names: Literal["by_number", "shared", "partially_shared", "separate"] | None = "by_number",
        **kwargs,
    ):
        self.image_size = list(as_shape(image_size, "image_size"))
        self.num_channels = num_channels
        self.autoencoder = autoencoder
        self.hidden_dim, self.num_res_blocks = hidden_dim, num_res_blocks
        self.width_multipliers = [1, 1, 2, 2, 4] if width_multipliers is None else list(width_multipliers)
        self.dropout = dropout
        self.min_group_channels = min_group_channels
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.z_channels = z_channels
        self.quant_conv_kernel_size = quant_conv_kernel_size
        self.layout = layout
        self.scales = _as_lists(scales)
        self.tile = list(as_shape(tile, "tile"))
        self.num_phi, self.phi_ratio = num_phi, phi_ratio
        self.beta, self.epsilon = beta, epsilon
        self.codebook_update = codebook_update
        self.codebook_ema_decay = codebook_ema_decay
        self.codebook_init, self.codebook_init_scale = codebook_init, codebook_init_scale
        self.codebook_metric = codebook_metric
        self.has_unit_codes = has_unit_codes
        self.revival_threshold = revival_threshold
        self.var_phi_names = var_phi_names
        self._translate(kwargs)
        refuse_unknown_fields(type(self), kwargs)
        self._check()
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "VQVAEConfig":
        """Read a saved configuration; one without `min_group_channels` is of a version that had groups of one channel.

        Args:
            config_dict: what the file holds.
            kwargs: of `PreTrainedConfig.from_dict`.
        """
        return super().from_dict({"min_group_channels": 1} | config_dict, **kwargs)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent cell."""
        return 4 if self.autoencoder == "simple" else 2 ** (len(self.width_multipliers) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the encoder's output, before any quant convolution."""
        return self.embedding_dim if self.z_channels is None else self.z_channels

    def block_layout(self) -> BlockLayout:
        """Return the layout of an image's tokens.

        Raises:
            ValueError: if the image size or the blocks do not fit the autoencoder.
        """
        H, W = self.image_size
        factor = self.downsampling
        if H % factor or W % factor:
            raise ValueError(
                f"image_size is {self.image_size}; expected sides divisible by {factor}, the {self.autoencoder} "
                "autoencoder's downsampling"
            )
        grid = (H // factor, W // factor)
        if self.layout == "tiles":
            if self.scales is not None:
                raise ValueError(f"scales is {self.scales}; expected None for the layout 'tiles'")
            return BlockLayout.tiles(self.tile, grid)
        layout = BlockLayout.scales(self.scales)
        if layout.grid != grid:
            raise ValueError(
                f"scales ends with {layout.grid}; expected the latent grid {grid} of a {H}×{W} image "
                f"at downsampling {factor}"
            )
        return layout

    def _translate(self, kwargs: dict) -> None:
        """Take the option that version 0.1.0 had in place of two out of the arguments."""
        if kwargs.pop("normalize_codes", False):
            # The same word meant less for scales.
            self.codebook_metric, self.has_unit_codes = "cosine", self.layout == "tiles"

    def _check(self) -> None:
        """Refuse what does not go together."""
        self._check_choices()
        self._check_numbers()
        self.block_layout()

    def _check_choices(self) -> None:
        """Refuse a word that names nothing."""
        for field, choices in {
            "autoencoder": ("simple", "vqgan"),
            "layout": ("scales", "tiles"),
            "codebook_update": ("gradient", "ema"),
            "codebook_init": ("uniform", "data"),
            "codebook_metric": ("euclidean", "cosine"),
            "var_phi_names": ("by_number", "shared", "partially_shared", "separate", None),
            "quant_conv_kernel_size": (0, 1, 3),
        }.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected one of {list(choices)}")

    def _check_numbers(self) -> None:
        """Refuse numbers outside their range."""
        for field, lowest in {
            "num_channels": 1,
            "hidden_dim": 1,
            "min_group_channels": 1,
            "vocab_size": 2,
            "embedding_dim": 1,
            "num_phi": 0,
            "num_res_blocks": 0 if self.autoencoder == "simple" else 1,
        }.items():
            if getattr(self, field) < lowest:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least {lowest}")
        if self.num_channels != 3:
            raise ValueError(f"num_channels is {self.num_channels}; expected 3: pictures of any kind are read as RGB")
        for field in ("phi_ratio", "dropout", "revival_threshold"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a number in [0, 1]")
        if not 0 < self.codebook_ema_decay < 1:
            raise ValueError(f"codebook_ema_decay is {self.codebook_ema_decay}; expected a number in (0, 1)")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; expected a number above 0")
        if self.codebook_init_scale is not None and not self.codebook_init_scale > 0:
            raise ValueError(f"codebook_init_scale is {self.codebook_init_scale}; expected a number above 0, or None")
        if not self.width_multipliers or min(self.width_multipliers) < 1:
            raise ValueError(f"width_multipliers is {self.width_multipliers}; expected positive integers")
        if self.quant_conv_kernel_size == 0 and self.latent_channels != self.embedding_dim:
            raise ValueError(
                f"z_channels is {self.z_channels} and embedding_dim {self.embedding_dim}; expected them equal "
                "unless quant_conv_kernel_size is 1 or 3"
            )


def _as_lists(scales):
    """Return sizes of token maps as [height, width] lists, and what is no list of sizes as it is."""
    if not isinstance(scales, (list, tuple)):
        return scales
    return [list(as_shape(scale, f"scales[{k}]")) for k, scale in enumerate(scales)]
