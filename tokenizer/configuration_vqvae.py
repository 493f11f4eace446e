"""Configuration of the VQ-VAE tokenizer. Legend: V codes, C code channels, H×W pixels, h×w latent cells."""

from typing import Any, Literal

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout, as_shape
from nextblock.data.code_digits import MAX_CODES
from nextblock.files.config_fields import (
    check_counts,
    check_flags,
    check_num_parameters,
    check_number,
    refuse_unknown_fields,
)

from .autoencoder import MIN_GROUP_CHANNELS
from .codebook_options import check_codebook

# More of these than any tokenizer has.
MAX_SIDE, MAX_WIDTH, MAX_LEVELS, MAX_LAYERS = 1 << 16, 1 << 16, 16, 1024
# Names within `__init__` that are no fields.
_NO_FIELDS = ("self", "kwargs", "__class__")


class VQVAEConfig(PreTrainedConfig):
    """Everything that fixes a tokenizer's architecture and arithmetic.

    Args:
        image_size: H and W in pixels, or one integer for both.
        num_channels: image channels, 3: pictures of any kind are read as RGB.
        autoencoder: "simple" (two strided convolutions, 4× smaller), "vqgan" (2^(levels − 1) smaller), or the same
            without attention, as MaskGIT's ("maskgit") or Open-MAGVIT2's ("magvit2").
        hidden_dim: base width in channels.
        width_multipliers: all but simple: one factor of `hidden_dim` a level, finest first.
        attention_levels: vqgan: levels whose residual blocks are each followed by attention, 0 the finest; None means
            the lowest resolution alone.
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
        codebook: "learned" (a table), "simvq" (a fixed table under a learned linear map), "lfq" (signs of the channels,
            V = 2^C), "bsq" (the same on the unit sphere), "fsq" (channels rounded to levels) or "gumbel" (a table, and
            a projection that chooses from it).
        fsq_levels: fsq: how many levels each of the C channels has; V is their product.
        codebook_digits: bases of an index's digits, lowest first. learned: so many tables of so many codes share the
            channels out evenly among them; null is one table. lfq, bsq, fsq: neighbouring channels are joined; null
            makes each channel a digit of its own.
        codebook_gradient: learned and simvq: how features get the gradient of their codes: "straight_through",
            "rotation" (as rotated and stretched onto them) or "index" (IBQ: by a softmax over all codes).
        codebook_update: "gradient" or "ema" (moving average of the assigned features).
        codebook_ema_decay: decay of that moving average, and of the counts by which revival finds dead codes, in
            (0, 1).
        codebook_init: "uniform", or "data" (codes become features of training images before the first step).
        codebook_init_scale: uniform start in ± this; None means 1/V.
        codebook_metric: which code is taken: the nearest one, "euclidean", or that of largest "cosine" or
            "inner_product" (IBQ).
        has_unit_codes: L2-normalise features and codes themselves; all metrics then find the same.
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
        autoencoder: Literal["simple", "vqgan", "maskgit", "magvit2"] = "simple",
        hidden_dim: int = 128,
        width_multipliers: list[int] | None = None,
        attention_levels: list[int] | None = None,
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
        codebook: Literal["learned", "simvq", "fsq", "lfq", "bsq", "gumbel"] = "learned",
        fsq_levels: list[int] | None = None,
        codebook_digits: list[int] | None = None,
        codebook_gradient: Literal["straight_through", "rotation", "index"] = "straight_through",
        codebook_update: Literal["gradient", "ema"] = "gradient",
        codebook_ema_decay: float = 0.99,
        codebook_init: Literal["uniform", "data"] = "uniform",
        codebook_init_scale: float | None = None,
        codebook_metric: Literal["euclidean", "cosine", "inner_product"] = "euclidean",
        has_unit_codes: bool = False,
        revival_threshold: float = 0.0,
        var_phi_names: Literal["by_number", "shared", "partially_shared", "separate"] | None = "by_number",
        **kwargs,
    ):
        self._set_fields({name: value for name, value in locals().items() if name not in _NO_FIELDS})
        self._translate(kwargs)
        refuse_unknown_fields(type(self), kwargs)
        self._check()
        super().__init__(**kwargs)

    def _set_fields(self, fields: dict[str, Any]) -> None:
        """Take over what was given, sizes and lists in the form that they are saved in."""
        fields["image_size"] = list(as_shape(fields["image_size"], "image_size"))
        fields["tile"] = list(as_shape(fields["tile"], "tile"))
        fields["scales"] = _as_lists(fields["scales"])
        if fields["width_multipliers"] is None:
            fields["width_multipliers"] = [1, 1, 2, 2, 4]
        for name, value in fields.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

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
        if self.autoencoder == "magvit2" and grid == (1, 1):
            raise ValueError(
                f"image_size is {self.image_size}; expected more than one latent cell of {factor}×{factor} pixels: the "
                "magvit2 autoencoder goes by their spread"
            )
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
        self._check_counts()
        self._check_numbers()
        check_codebook(self)
        self.block_layout()

    def _check_choices(self) -> None:
        """Refuse a word that names nothing."""
        for field, choices in {
            "autoencoder": ("simple", "vqgan", "maskgit", "magvit2"),
            "layout": ("scales", "tiles"),
            "codebook": ("learned", "simvq", "fsq", "lfq", "bsq", "gumbel"),
            "codebook_gradient": ("straight_through", "rotation", "index"),
            "codebook_update": ("gradient", "ema"),
            "codebook_init": ("uniform", "data"),
            "codebook_metric": ("euclidean", "cosine", "inner_product"),
            "var_phi_names": ("by_number", "shared", "partially_shared", "separate", None),
            "quant_conv_kernel_size": (0, 1, 3),
        }.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected one of {list(choices)}")

    def _check_counts(self) -> None:
        """Refuse what is no number of something, or of more than any model has."""
        counts = {
            "num_channels": (1, MAX_WIDTH),
            "hidden_dim": (1, MAX_WIDTH),
            "min_group_channels": (1, MAX_WIDTH),
            "vocab_size": (2, MAX_CODES),
            "embedding_dim": (1, MAX_WIDTH),
            "num_phi": (0, MAX_LAYERS),
            "num_res_blocks": (0 if self.autoencoder == "simple" else 1, MAX_LAYERS),
            "quant_conv_kernel_size": (0, 3),
        }
        if self.z_channels is not None:
            counts["z_channels"] = (1, MAX_WIDTH)
        check_counts(self, counts)
        check_flags(self, "has_unit_codes")
        if max(self.image_size) > MAX_SIDE:
            raise ValueError(f"image_size is {self.image_size}; expected sides of at most {MAX_SIDE} pixels")
        if self.num_channels != 3:
            raise ValueError(f"num_channels is {self.num_channels}; expected 3: pictures of any kind are read as RGB")
        multipliers = self.width_multipliers
        is_list = isinstance(multipliers, list) and 1 <= len(multipliers) <= MAX_LEVELS
        if not is_list or not all(type(n) is int and 1 <= n <= MAX_WIDTH for n in multipliers):
            raise ValueError(f"width_multipliers is {multipliers!r}; expected 1 to {MAX_LEVELS} positive integers")
        self._check_attention_levels()
        widest = self.hidden_dim * (1 if self.autoencoder == "simple" else max(multipliers))
        num_convolutions = 4 * max(self.num_res_blocks, 1) * (1 if self.autoencoder == "simple" else len(multipliers))
        num_tables = {"learned": self.codebook_digits is None, "simvq": 1, "gumbel": 2}.get(self.codebook, 0)
        check_num_parameters(
            9 * num_convolutions * widest**2 + self.vocab_size * self.embedding_dim * num_tables,
            f"hidden_dim {self.hidden_dim}, width_multipliers {multipliers}, num_res_blocks {self.num_res_blocks}, "
            f"vocab_size {self.vocab_size} and embedding_dim {self.embedding_dim}",
        )

    def _check_attention_levels(self) -> None:
        """Refuse levels that the autoencoder does not have, and attention where it has none."""
        levels, num_levels = self.attention_levels, len(self.width_multipliers)
        if levels is None:
            return
        if self.autoencoder != "vqgan":
            raise ValueError(
                f"attention_levels is {levels!r}; expected None with autoencoder {self.autoencoder!r}, which has none "
                "to choose"
            )
        is_list = isinstance(levels, list) and all(type(n) is int and 0 <= n < num_levels for n in levels)
        if not is_list or sorted({*levels}) != levels:
            raise ValueError(
                f"attention_levels is {levels!r}; expected rising numbers of levels from 0 to {num_levels - 1}, or None"
            )

    def _check_numbers(self) -> None:
        """Refuse numbers outside their range."""
        for field in ("phi_ratio", "dropout", "revival_threshold"):
            check_number(self, field, lambda value: 0 <= value <= 1, "a number in [0, 1]")
        check_number(self, "beta", lambda value: value >= 0, "a finite number of at least 0")
        check_number(self, "codebook_ema_decay", lambda value: 0 < value < 1, "a number in (0, 1)")
        check_number(self, "epsilon", lambda value: value > 0, "a finite number above 0")
        if self.codebook_init_scale is not None:
            check_number(self, "codebook_init_scale", lambda value: value > 0, "a finite number above 0, or None")
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
