"""MaskGIT's VQGAN in PyTorch, the tokenizer of RAR: taking over its state dict, and writing one of ours by its names.

MaskGIT: Chang et al. 2022, arXiv:2202.04200; RAR: Yu et al. 2024, arXiv:2411.00776. Legend: V codes, C code channels.
"""

import re
from collections.abc import Collection

from torch import Tensor

from nextblock.files.state_dicts import count_numbered, infer_size
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .foreign_autoencoder import check_expressible, foreign_tensors, infer_sizes, take_over_tokenizer

_IMAGE_SIZE = 256
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.\d+\.")


def is_maskgit_tokenizer(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is MaskGIT's VQGAN: `down` and a numbered middle."""
    has_levels = any(name.startswith(("encoder.down.", "decoder.up.")) for name in names)
    return has_levels and any(_MIDDLE.match(name) for name in names)


def vqvae_from_maskgit(state: dict[str, Tensor], *, image_size: int | list[int] = _IMAGE_SIZE) -> VQVAE:
    """Build a tokenizer from the tensors of MaskGIT's VQGAN.

    Args:
        state: tensors by the names of its PyTorch version.
        image_size: H and W in pixels.

    Returns:
        The tokenizer in float32, in evaluation mode. It takes and gives pixels in [-1, 1], as all tokenizers do.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together, or codes
            are NaN or infinite.
    """
    num_levels = max(count_numbered(state, "encoder.down."), count_numbered(state, "decoder.up."), 1)
    sizes = infer_sizes(state, _naming, num_levels, num_more_decoder_blocks=0)
    del sizes["z_channels"]  # The codes' channels: there are no convolutions between.
    channels = [("encoder.conv_out.weight", 0), ("encoder.conv_out.bias", 0), ("decoder.conv_in.weight", 1)]
    config = VQVAEConfig(
        image_size=image_size,
        autoencoder="maskgit",
        vocab_size=infer_size(state, ("quantize.embedding.weight", 0), default=2),
        embedding_dim=infer_size(state, ("quantize.embedding.weight", 1), *channels),
        min_group_channels=1,
        **sizes,
    )
    return take_over_tokenizer(config, state, _naming)


def vqvae_to_maskgit(model: VQVAE) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under the names of MaskGIT's VQGAN in PyTorch.

    Args:
        model: a tokenizer of its architecture, of any size.

    Returns:
        Float32 tensors by its names.

    Raises:
        ValueError: if it cannot express the tokenizer.
    """
    fields = {"autoencoder": ("maskgit",), "layout": ("tiles",), "tile": ([1, 1],), "codebook": ("learned",)}
    fields |= {"codebook_metric": ("euclidean",), "has_unit_codes": (False,), "quant_conv_kernel_size": (0,)}
    check_expressible(model.config, "MaskGIT", fields)
    return foreign_tensors(model, _naming)


def maskgit_arguments(model: VQVAE, state: dict[str, Tensor]) -> dict:
    """Return what the other project's own class has to be given for an exported state dict."""
    config = model.config
    return {
        "num_embeddings": config.vocab_size,
        "z_channels": config.latent_channels,
        "hidden_channels": config.hidden_dim,
        "channel_mult": config.width_multipliers,
        "num_res_blocks": config.num_res_blocks,
        "resolution": max(config.image_size),
    }


def _naming(name: str) -> tuple[str, ...]:
    """Return MaskGIT's name of one of our tensors."""
    if name == "quantizer.codebook.weight":
        return ("quantize.embedding.weight",)
    return (name.replace(".upsample.conv.", ".upsample_conv."),)
