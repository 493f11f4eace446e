"""The VQ-VAE tokenizer: images to blocks of codebook indices, to the prior's input, and back.

Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, H×W pixels, h×w latent cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from nextblock.data.blocks import BlockLayout
from nextblock.evaluation.codebook import code_counts, codebook_statistics
from nextblock.training.offload import run_offload_hook

from .autoencoder import SimpleDecoder, SimpleEncoder, VQGANDecoder, VQGANEncoder
from .codebook import Codebook, all_reduced
from .configuration_vqvae import VQVAEConfig
from .quantizer import VectorQuantizer
from .quantizer_multiscale import MultiScaleQuantizer

# Past this many blocks, a batch holds too few tokens a block to say anything of it.
STATISTICS_MAX_BLOCKS = 64


@dataclass
class VQVAEOutput(ModelOutput):
    """What a tokenizer's forward pass gives.

    Args:
        reconstruction: (B, 3, H, W), about [-1, 1], not clamped.
        vq_loss: scalar codebook and commitment loss, float32.
        idx_Bl: K tensors (B, L_k) int64.
        statistics: how the batch used the codes: `code_counts` (K, V); `usage`, `perplexity` and `num_dead_codes` of
            all blocks together; and the same of each block (K,) as `block_usage` and so on. Summed over processes in
            training mode, this process's own in evaluation mode. More than 64 blocks are pooled into one row.
        features: (B, C, h, w) before quantization.
    """

    reconstruction: Tensor | None = None
    vq_loss: Tensor | None = None
    idx_Bl: list[Tensor] | None = None
    statistics: dict[str, Tensor] | None = None
    features: Tensor | None = None


class VQVAE(PreTrainedModel):
    """A convolutional autoencoder around a vector quantizer.

    Codes trained by moving average change in `update_codebook`, which a training loop calls after each optimizer step.

    Args:
        config: the architecture.
    """

    config_class = VQVAEConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = {"quantizer"}
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.layout: BlockLayout = config.block_layout()
        self.encoder, self.decoder = _build_autoencoder(config)
        kernel, z, C = config.quant_conv_kernel_size, config.latent_channels, config.embedding_dim
        self.quant_conv = nn.Conv2d(z, C, kernel, padding=kernel // 2) if kernel else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, z, kernel, padding=kernel // 2) if kernel else nn.Identity()
        self.quantizer = _build_quantizer(config, self.layout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as torch and the codebook do, not with transformers' one normal distribution for all."""
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, Codebook)):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None) -> VQVAEOutput | tuple:
        """Encode, quantize and decode a batch of images.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            return_dict: False returns exactly the tuple (reconstruction, vq_loss, idx_Bl).

        Returns:
            A `VQVAEOutput`.

        Raises:
            ValueError: if the pixels have the wrong shape or type, or on the CPU the wrong range.
        """
        features = self.encode(pixel_values)
        quantized, vq_loss, flat_idx = self.quantizer(features)
        idx_Bl = self.quantizer.split_indices(flat_idx, len(features))
        reconstruction = self.decode(quantized)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return reconstruction, vq_loss, idx_Bl
        return VQVAEOutput(reconstruction, vq_loss, idx_Bl, self._statistics(idx_Bl), features)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the features (B, C, h, w) that the quantizer receives."""
        self._check_pixels(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self._conv_dtype)))

    def decode(self, quantized: Tensor) -> Tensor:
        """Return the image (B, 3, H, W) of a quantized map (B, C, h, w), not clamped."""
        return self.decoder(self.post_quant_conv(quantized.to(self._conv_dtype)))

    @torch.no_grad()
    def img_to_idxBl(self, pixel_values: Tensor) -> list[Tensor]:
        """Turn images into blocks of codebook indices.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].

        Returns:
            K tensors (B, L_k) int64.

        Raises:
            ValueError: if the pixels have the wrong shape or type, or on the CPU the wrong range.
        """
        run_offload_hook(self)
        return self.quantizer.features_to_idxBl(self.encode(pixel_values))

    @torch.no_grad()
    def idxBl_to_var_input(self, idx_Bl: list[Tensor], as_indices: bool = False) -> Tensor:
        """Turn blocks of indices into the prior's input under teacher forcing.

        Args:
            idx_Bl: K tensors (B, L_k) int64.
            as_indices: give the indices of the block before instead of vectors; tile layouts only.

        Returns:
            (B, L − L_1, C) float32, or (B, L − L_1) int64.

        Raises:
            ValueError: if the blocks do not fit the layout, an index on the CPU is not a code, or indices are asked of
                scales.
        """
        run_offload_hook(self)
        self._check_indices(idx_Bl)
        if not as_indices:
            return self.quantizer.idxBl_to_var_input(idx_Bl)
        if self.layout.is_scales:
            raise ValueError("as_indices is True; expected False for a scale layout, whose input is no code's vector")
        return torch.cat([idx_Bl[0][:, :0], *idx_Bl[:-1]], dim=1)

    @torch.no_grad()
    def idxBl_to_img(self, idx_Bl: list[Tensor]) -> Tensor:
        """Decode blocks of indices to images.

        Args:
            idx_Bl: K tensors (B, L_k) int64.

        Returns:
            (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: if the blocks do not fit the layout or an index on the CPU is not a code.
        """
        run_offload_hook(self)
        self._check_indices(idx_Bl)
        return self.decode(self.quantizer.idxBl_to_features(idx_Bl)).clamp(-1, 1)

    def img_to_idx(self, pixel_values: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into indices in block order, (B, L) int64; see `img_to_idxBl`."""
        return torch.cat(self.img_to_idxBl(pixel_values), dim=1)

    def idx_to_var_input(self, idx_BL: Tensor, as_indices: bool = False) -> Tensor:
        """Turn indices (B, L) into the prior's input; see `idxBl_to_var_input`."""
        return self.idxBl_to_var_input(self.layout.split(idx_BL), as_indices)

    def idx_to_img(self, idx_BL: Tensor) -> Tensor:
        """Decode indices (B, L) to images (B, 3, H, W); see `idxBl_to_img`."""
        return self.idxBl_to_img(self.layout.split(idx_BL))

    @torch.no_grad()
    def initialize_codebook(self, pixel_values: Tensor, seed: int) -> None:
        """Set the codes to features of training images.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; the same on every process.
            seed: chooses among the features.
        """
        features = self.quantizer.training_features(self.encode(pixel_values))
        self.quantizer.codebook.initialize_from(features.flatten(0, 1), seed)

    def update_codebook(self, *keys: int) -> None:
        """Apply the moving averages and revival recorded by the forward passes since the last call.

        Args:
            keys: integers such as (seed, step) that choose which features revived codes take.
        """
        self.quantizer.codebook.update(*keys)

    @torch.no_grad()
    def _statistics(self, idx_Bl: list[Tensor]) -> dict[str, Tensor]:
        """Describe how a batch used the codes."""
        counts = code_counts(idx_Bl, self.config.vocab_size)
        if len(counts) > STATISTICS_MAX_BLOCKS:
            counts = counts.sum(0, keepdim=True)
        if self.training:
            counts = all_reduced(counts)
        return codebook_statistics(counts)

    @property
    def _conv_dtype(self) -> torch.dtype:
        """Dtype of the convolutions, which a half-precision model keeps while its quantizer stays float32."""
        return next(self.decoder.parameters()).dtype

    def _check_pixels(self, pixel_values: Tensor) -> None:
        """Refuse pixels that are no (B, 3, H, W) floats in [-1, 1]."""
        expected = (self.config.num_channels, *self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, *{expected})")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; expected floating point in [-1, 1]")
        if pixel_values.device.type != "cpu":
            return  # Reading the range would make every training step wait for the device, the prior's too.
        largest = pixel_values.detach().abs().amax().item() if pixel_values.numel() else 0.0
        if not largest <= 1.001:
            raise ValueError(f"pixel_values reaches {largest} in absolute value; expected finite numbers in [-1, 1]")

    def _check_indices(self, idx_Bl: list[Tensor]) -> None:
        """Refuse blocks that do not fit the layout and indices that are no codes."""
        self.layout.check_blocks(idx_Bl, self.layout.num_blocks)
        V = self.config.vocab_size
        if idx_Bl[0].device.type != "cpu":
            return  # As with pixels; a GPU's own table look-up refuses what is no code.
        for k, idx in enumerate(idx_Bl):
            if idx.numel() and not 0 <= idx.min().item() <= idx.max().item() < V:
                raise ValueError(f"idx_Bl[{k}] spans {idx.min().item()} to {idx.max().item()}; expected 0 to {V - 1}")


def _build_autoencoder(config: VQVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Return the encoder and the decoder."""
    if config.autoencoder == "simple":
        sizes = (config.num_channels, config.hidden_dim, config.num_res_blocks, config.latent_channels, config.dropout)
        return SimpleEncoder(*sizes), SimpleDecoder(*sizes)
    sizes = (
        config.num_channels,
        config.hidden_dim,
        config.width_multipliers,
        config.num_res_blocks,
        config.latent_channels,
        config.dropout,
    )
    return VQGANEncoder(*sizes), VQGANDecoder(*sizes)


def _build_quantizer(config: VQVAEConfig, layout: BlockLayout) -> VectorQuantizer | MultiScaleQuantizer:
    """Return the quantizer of the layout."""
    options = {
        "beta": config.beta,
        "epsilon": config.epsilon,
        "layout": layout,
        "ema_decay": config.codebook_ema_decay if config.codebook_update == "ema" else None,
        "normalize_codes": config.normalize_codes,
        "revival_threshold": config.revival_threshold,
        "init_scale": config.codebook_init_scale,
    }
    if not layout.is_scales:
        return VectorQuantizer(config.vocab_size, config.embedding_dim, **options)
    return MultiScaleQuantizer(
        config.vocab_size, config.embedding_dim, num_phi=config.num_phi, phi_ratio=config.phi_ratio, **options
    )
