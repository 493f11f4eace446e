"""The VQ-VAE tokenizer: images to blocks of codebook indices, to the prior's input, and back.

Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, H×W pixels, h×w latent cells.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import wraps
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers asks a component's module for this name.
from transformers.utils import ModelOutput

from nextblock.data.blocks import BlockLayout
from nextblock.data.finite import check_finite
from nextblock.data.given import FLOAT_DTYPES, check_tensor
from nextblock.evaluation.codebook import MAX_COUNTED_CODES, code_counts, codebook_statistics
from nextblock.files.stored_model import StoredModel
from nextblock.training.offload import run_offload_hook
from nextblock.training.precision import without_tf32

from .autoencoder import SimpleDecoder, SimpleEncoder, VQGANDecoder, VQGANEncoder
from .autoencoder_residual import ResidualDecoder, ResidualEncoder
from .codebook_learned import LearnedCodebook
from .codebooks import build_codebook
from .codec_scales import ScaleCodec
from .codec_tiles import TileCodec
from .configuration_vqvae import VQVAEConfig
from .first_version import RENAMED_WEIGHTS, as_first_spelled
from .losses import TokenizerLossConfig, tokenizer_losses
from .processes import all_gathered, all_reduced
from .quantizer import Codebook, Codec, Quantizer

# Past this many blocks, a batch holds too few tokens a block to say anything of it.
STATISTICS_MAX_BLOCKS = 64
# Of the images that codes start from, in one pass: the 512 of a run on digits are one, of 256 px eight (1.4 GB).
ENCODED_PIXELS = 1 << 19
PIXELS_EXPECTED = "a floating-point tensor (batch, 3, H, W) in [-1, 1]"


@dataclass
class VQVAEOutput(ModelOutput):
    """What a tokenizer's forward pass gives.

    Args:
        reconstruction: (B, 3, H, W), about [-1, 1], not clamped.
        vq_loss: scalar codebook and commitment loss, float32.
        idx_Bl: K tensors (B, L_k) int64.
        statistics: how the batch used the codes: `code_counts` (K, V), of more than 65 536 codes as `SparseCounts`;
            `usage`, `perplexity` and `num_dead_codes` of all blocks together; the same of each block (K,) as
            `block_usage` and so on; of codes with D digits `digit_entropy` (D,). Summed over processes in training
            mode, this process's own in evaluation mode. More than 64 blocks are pooled into one row.
        features: (B, C, h, w) before quantization.
        loss: scalar mean absolute and mean squared error of pixels, and `vq_loss`, added up; see `losses` for more.
    """

    reconstruction: Tensor | None = None
    vq_loss: Tensor | None = None
    idx_Bl: list[Tensor] | None = None
    statistics: dict[str, Tensor] | None = None
    features: Tensor | None = None
    loss: Tensor | None = None


class VQVAE(StoredModel):
    """A convolutional autoencoder around a vector quantizer.

    Codes trained by moving average change in `update_codebook`, which a training loop calls after each optimizer step.
    A subclass brings a codec or a codebook of its own by overriding `build_codec` or `build_codebook`.

    Args:
        config: the architecture.

    Raises:
        ValueError: if codec or codebook is none, is not of the configured size, or gives other tensors than it must.
    """

    config_class = VQVAEConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = {"quantizer"}
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    # Codes are places among the features, and weight decay would pull them towards zero.
    no_decay = ("codebook",)
    renamed_weights = RENAMED_WEIGHTS
    as_fingerprinted = staticmethod(as_first_spelled)

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.layout: BlockLayout = config.block_layout()
        self.encoder, self.decoder = _build_autoencoder(config)
        kernel, z, C = config.quant_conv_kernel_size, config.latent_channels, config.embedding_dim
        self.quant_conv = nn.Conv2d(z, C, kernel, padding=kernel // 2) if kernel else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, z, kernel, padding=kernel // 2) if kernel else nn.Identity()
        # In this order both draw their weights.
        codebook = self.build_codebook(config)
        codec = self.build_codec(config)
        self.quantizer = Quantizer(codec, codebook)
        if codec.layout != self.layout:
            raise ValueError(f"build_codec gives a codec of layout {codec.layout}; expected {self.layout}")
        for name, value in {"vocab_size": codebook.num_codes, "embedding_dim": codebook.dim}.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name} is {getattr(config, name)}; expected {value} for a {type(codebook).__name__}"
                )
        self.post_init()
        self.quantizer.try_out()

    def build_codebook(self, config: VQVAEConfig) -> Codebook:
        """Make the codebook that the configuration names.

        Args:
            config: the architecture.
        """
        return build_codebook(config)

    def build_codec(self, config: VQVAEConfig) -> Codec:
        """Make the codec; the one place that chooses it.

        Args:
            config: the architecture.
        """
        if self.layout.is_scales:
            return ScaleCodec(self.layout, config.embedding_dim, config.num_phi, config.phi_ratio)
        return TileCodec(self.layout)

    @property
    def fitted_to_data(self) -> tuple[str, ...]:
        """A codebook's moving averages, which one that learns by gradient does without."""
        tables = [name for name, module in self.named_modules() if isinstance(module, LearnedCodebook)]
        return tuple(f"{name}.{averages}" for name in tables for averages in ("code_sums", "code_counts"))

    def excused_tensors(self, saved: VQVAEConfig) -> Collection[str]:
        """Excuse a codebook's moving averages where it was trained otherwise: they start from the codes."""
        was, now = ((config.codebook_update, config.revival_threshold > 0) for config in (saved, self.config))
        return () if was == now else self.fitted_to_data

    def start_unfit(self, names: list[str]) -> None:
        """Let moving averages start from the codes."""
        self.quantizer.codebook.restart_averages()

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """Load a tokenizer as `StoredModel.from_pretrained` does, those of version 0.1.0 among them.

        Raises:
            ValueError: if codes or the codec's weights are NaN or infinite.
        """
        loaded = super().from_pretrained(*args, key_mapping=cls.renamed_weights | (key_mapping or {}), **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).quantizer.check_finite()
        return loaded

    @wraps(StoredModel.save_pretrained, assigned=())
    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs) -> None:
        """Save the tokenizer as `StoredModel.save_pretrained` does, by default under today's names of weights."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as torch and the codebook do, not with transformers' one normal distribution for all."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        return_dict: bool | None = None,
        return_loss: bool = True,
        num_scales: Tensor | None = None,
    ) -> VQVAEOutput | tuple:
        """Encode, quantize and decode a batch of images.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            return_dict: False returns exactly the tuple (reconstruction, vq_loss, idx_Bl).
            return_loss: whether the output has a `loss`, which `transformers.Trainer` looks for.
            num_scales: (B,) int64 in [1, K]: an image of a scale layout is decoded from its first scales alone.

        Returns:
            A `VQVAEOutput`.

        Raises:
            ValueError: if the pixels have the wrong shape or type, or on the CPU the wrong range; or in evaluation mode
                if what is quantized is NaN or infinite.
        """
        features = self.encode(pixel_values)
        quantized, vq_loss, idx_BL = self.quantizer(features, num_scales)
        reconstruction, idx_Bl = self.decode(quantized), self.layout.split(idx_BL)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return reconstruction, vq_loss, idx_Bl
        loss = None
        if return_loss:
            loss = tokenizer_losses(reconstruction, pixel_values, vq_loss, TokenizerLossConfig())["loss"]
        return VQVAEOutput(reconstruction, vq_loss, idx_Bl, self._statistics(idx_BL), features, loss)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the features (B, C, h, w) that the quantizer receives."""
        self._check_pixels(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self._conv_dtype)))

    def decode(self, quantized: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) of a quantized map (B, C, h, w), not clamped."""
        return self.decoder(self.post_quant_conv(quantized.to(self._conv_dtype)))

    @torch.no_grad()
    def img_to_idx(self, pixel_values: Tensor) -> Tensor:
        """Turn images into codebook indices in block order.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, L) int64.

        Raises:
            ValueError: if the pixels have the wrong shape or type, or on the CPU the wrong range, or if what is
                quantized is NaN or infinite.
        """
        check_tensor("pixel_values", pixel_values, PIXELS_EXPECTED)
        run_offload_hook(self)
        # Which code is nearest may hang on the last bits of a feature.
        with without_tf32(pixel_values.device):
            return self.quantizer.indices(self.encode(pixel_values))

    @torch.no_grad()
    def idx_to_var_input(self, idx_BL: Tensor, as_indices: bool = False) -> Tensor:
        """Turn indices into the prior's input under teacher forcing.

        Args:
            idx_BL: (B, L) int64 in block order.
            as_indices: give the indices of the block before instead of vectors; tile layouts only.

        Returns:
            (B, L − L_1, C) float32, or (B, L − L_1) int64.

        Raises:
            ValueError: if the indices do not fit the layout, one on the CPU is not a code, or indices are asked of
                scales.
        """
        run_offload_hook(self)
        if not as_indices:
            return self.quantizer.var_input(idx_BL)
        self.quantizer.check_indices(idx_BL)
        if self.layout.is_scales:
            raise ValueError("as_indices is True; expected False for a scale layout, whose input is no code's vector")
        return idx_BL[:, : self.layout.bounds[-1][0]]

    @torch.no_grad()
    def idx_to_img(self, idx_BL: Tensor) -> Tensor:
        """Decode indices to images.

        Args:
            idx_BL: (B, L) int64 in block order.

        Returns:
            (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: if the indices do not fit the layout or one on the CPU is not a code, or if what is decoded, or
                the image, is NaN or infinite.
        """
        run_offload_hook(self)
        quantized = self.quantizer.idx_to_features(idx_BL)
        image = self.decode(quantized)
        check_finite("decoding", {"the quantized map": quantized, "the image": image})
        return image.clamp(-1, 1)

    def img_to_idxBl(self, pixel_values: Tensor) -> list[Tensor]:
        """Turn images into K blocks of codebook indices (B, L_k); see `img_to_idx`."""
        return self.layout.split(self.img_to_idx(pixel_values))

    def idxBl_to_var_input(self, idx_Bl: list[Tensor], as_indices: bool = False) -> Tensor:
        """Turn K blocks of indices (B, L_k) into the prior's input under teacher forcing; see `idx_to_var_input`."""
        return self.idx_to_var_input(self.layout.join(idx_Bl), as_indices)

    def idxBl_to_img(self, idx_Bl: list[Tensor]) -> Tensor:
        """Decode K blocks of indices (B, L_k) to images (B, 3, H, W) in [-1, 1]; see `idx_to_img`."""
        return self.idx_to_img(self.layout.join(idx_Bl))

    @torch.no_grad()
    def initialize_codebook(self, pixel_values: Tensor, seed: int) -> None:
        """Set the codes to features of training images.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; the same on every process.
            seed: chooses among the features.
        """
        features = [self.encode(part) for part in pixel_values.split(self.num_encoded_at_once)]
        self.quantizer.start_from(torch.cat(features), seed)

    @property
    def num_encoded_at_once(self) -> int:
        """Images whose features are taken in one pass to start the codes from them: what fits wherever one trains."""
        return max(1, ENCODED_PIXELS // prod(self.config.image_size))

    def update_codebook(self, *keys: int, was_skipped: Tensor | None = None) -> None:
        """Let the codebook follow the forward passes since the last call: moving averages, revival.

        Args:
            keys: integers such as (seed, step) that choose which features revived codes take.
            was_skipped: scalar on the model's device that is true where fp16's loss scaler skipped the step, which the
                codebook then skips too; None means that the step was taken.
        """
        self.quantizer.after_step(*keys, was_skipped=was_skipped)

    @torch.no_grad()
    def _statistics(self, idx_BL: Tensor) -> dict[str, Tensor]:
        """Describe how a batch used the codes."""
        lengths, V = self.layout.block_lengths, self.quantizer.num_codes
        if self.training and V > MAX_COUNTED_CODES:
            idx_BL = all_gathered(idx_BL)
        counts = code_counts(idx_BL, lengths, V)
        if len(counts) > STATISTICS_MAX_BLOCKS:
            counts = counts.sum(0, keepdim=True)
        if self.training and V <= MAX_COUNTED_CODES:
            counts = all_reduced(counts)
        return codebook_statistics(counts, self.quantizer.digits)

    @property
    def _conv_dtype(self) -> torch.dtype:
        """Dtype of the convolutions, which a half-precision model keeps while its quantizer stays float32."""
        return next(self.decoder.parameters()).dtype

    def _check_pixels(self, pixel_values: Tensor) -> None:
        """Refuse pixels that are no (B, 3, H, W) floats in [-1, 1]."""
        check_tensor("pixel_values", pixel_values, PIXELS_EXPECTED)
        expected = (self.config.num_channels, *self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, *{expected})")
        if pixel_values.dtype not in FLOAT_DTYPES:
            raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; expected floating point in [-1, 1]")
        if pixel_values.device.type != "cpu":
            return  # Reading the range would make every training step wait for the device, the prior's too.
        largest = pixel_values.detach().abs().amax().item() if pixel_values.numel() else 0.0
        if not largest <= 1.001:
            raise ValueError(f"pixel_values reaches {largest} in absolute value; expected finite numbers in [-1, 1]")


def _build_autoencoder(config: VQVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Return the encoder and the decoder."""
    depth = config.num_res_blocks, config.latent_channels, config.dropout, config.min_group_channels
    if config.autoencoder == "simple":
        sizes = config.num_channels, config.hidden_dim, *depth
        return SimpleEncoder(*sizes), SimpleDecoder(*sizes)
    sizes = config.num_channels, config.hidden_dim, config.width_multipliers, *depth
    if config.autoencoder == "vqgan":
        levels = config.attention_levels
        return VQGANEncoder(*sizes, levels), VQGANDecoder(*sizes, levels)
    return ResidualEncoder(config.autoencoder, *sizes), ResidualDecoder(config.autoencoder, *sizes)
