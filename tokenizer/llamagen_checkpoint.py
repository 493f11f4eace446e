"""LlamaGen's VQ tokenizers (VQ-16, VQ-8): taking over a published state dict, and writing one of ours by its names.

LlamaGen: Sun et al. 2024, arXiv:2406.06525. Legend: V codes, C code channels.
"""

import re
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from nextblock.files.foreign_checkpoints import without_groups
from nextblock.files.state_dicts import count_numbered, infer_size
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .foreign_autoencoder import check_expressible, foreign_tensors, in_three, infer_sizes, take_over_tokenizer

# The smallest norm that its normalisation divides by.
_EPSILON = 1e-12
_USE_COUNTER = "quantize.codebook_used"
_NUM_COUNTED = 65536
_IMAGE_SIZE = 256
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def is_llamagen_tokenizer(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a LlamaGen tokenizer."""
    return any(name.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) for name in names)


def vqvae_from_llamagen(
    state: dict[str, Tensor], *, image_size: int | list[int] = _IMAGE_SIZE, has_normalized_codes: bool = True
) -> VQVAE:
    """Build a tokenizer from the tensors of a LlamaGen tokenizer.

    Args:
        state: tensors by LlamaGen's names.
        image_size: H and W in pixels.
        has_normalized_codes: whether features and codes are L2-normalised, as all published ones are.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together, or codes
            are NaN or infinite.
    """
    state = without_groups(state, [_USE_COUNTER])
    num_levels = max(count_numbered(state, f"{side}.conv_blocks.") for side in ("encoder", "decoder")) or 1
    naming = _naming(num_levels)
    channels = [("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1)]
    config = VQVAEConfig(
        image_size=image_size,
        autoencoder="vqgan",
        vocab_size=infer_size(state, ("quantize.embedding.weight", 0), default=2),
        embedding_dim=infer_size(state, ("quantize.embedding.weight", 1), *channels),
        quant_conv_kernel_size=1,
        has_unit_codes=has_normalized_codes,
        epsilon=_EPSILON,
        min_group_channels=1,
        **infer_sizes(state, naming, num_levels),
    )
    return take_over_tokenizer(config, state, naming)


def vqvae_to_llamagen(model: VQVAE) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under LlamaGen's names.

    Args:
        model: a tokenizer of LlamaGen's architecture, of any size.

    Returns:
        Float32 tensors by LlamaGen's names, the counter of used codes at zero.

    Raises:
        ValueError: if LlamaGen cannot express the tokenizer.
    """
    config = model.config
    lowest = len(config.width_multipliers) - 1
    fields = {"autoencoder": ("vqgan",), "layout": ("tiles",), "tile": ([1, 1],), "codebook": ("learned",)}
    fields |= {"attention_levels": (None, [lowest]), "quant_conv_kernel_size": (1,)}
    metrics = ("euclidean", "cosine", "inner_product") if config.has_unit_codes else ("euclidean",)
    check_expressible(config, "LlamaGen", fields | {"codebook_metric": metrics})
    state = foreign_tensors(model, _naming(lowest + 1))
    return state | {_USE_COUNTER: torch.zeros(_NUM_COUNTED)}


def llamagen_arguments(model: VQVAE, state: dict[str, Tensor]) -> dict:
    """Return what LlamaGen's own tokenizer class has to be given for an exported state dict."""
    config = model.config
    return {
        "codebook_size": config.vocab_size,
        "codebook_embed_dim": config.embedding_dim,
        "codebook_l2_norm": config.has_unit_codes,
        "z_channels": config.latent_channels,
        "encoder_ch_mult": config.width_multipliers,
        "decoder_ch_mult": config.width_multipliers,
        "ch": config.hidden_dim,
        "num_res_blocks": config.num_res_blocks,
    }


def _naming(num_levels: int):
    """Return the function that gives LlamaGen's names of one of our tensors."""
    return partial(in_three, partial(_llamagen_name, num_levels=num_levels))


def _llamagen_name(name: str, *, num_levels: int) -> str:
    """Return LlamaGen's name of one of our tensors."""
    if name == "quantizer.codebook.weight":
        return "quantize.embedding.weight"
    name = re.sub(r"\.mid\.(block_1|attn_1|block_2)\.", lambda match: f".mid.{_MIDDLE[match[1]]}.", name)
    name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
    # Its decoder counts levels from the coarsest.
    last = num_levels - 1
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.conv_blocks.{last - int(match[1])}.", name)
    return re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
