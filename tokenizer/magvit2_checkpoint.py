"""Open-MAGVIT2's tokenizers: taking over a published state dict, and writing one of ours by its names.

Open-MAGVIT2: Luo et al. 2024, arXiv:2409.04410. Legend: V = 2^C codes, C code channels.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from nextblock.data.code_digits import MAX_CODES
from nextblock.files.foreign_checkpoints import with_averaged
from nextblock.files.state_dicts import count_numbered
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .foreign_autoencoder import check_expressible, foreign_tensors, infer_sizes, take_over_tokenizer

# Published for 16×16 tokens: 256 pixels at downsampling 16, 128 at 8.
_GRID_SIDE = 16
_MAX_BITS = MAX_CODES.bit_length() - 1
_DROPPED = ("loss.*",)
_TELLING = re.compile(r"(encoder|decoder)\.mid_block\.|decoder\.adaptive\.")


def is_magvit2_tokenizer(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is an Open-MAGVIT2 tokenizer."""
    return any(_TELLING.match(name) for name in names)


def vqvae_from_magvit2(
    state: dict[str, Tensor], *, image_size: int | list[int] | None = None, takes_averages: bool = True
) -> VQVAE:
    """Build a tokenizer from the tensors of an Open-MAGVIT2 tokenizer, by default from its averaged weights.

    Args:
        state: tensors by Open-MAGVIT2's names; the codes are in none.
        image_size: H and W in pixels; None takes 16 times the downsampling.
        takes_averages: whether averaged weights, where there are any, take the place of the plain ones.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together.
    """
    state = with_averaged(state, _DROPPED, are_taken=takes_averages)
    num_levels = max(count_numbered(state, "encoder.down."), count_numbered(state, "decoder.up."), 1)
    sizes = infer_sizes(state, _naming, num_levels, num_more_decoder_blocks=0)
    C = sizes.pop("z_channels")
    if C > _MAX_BITS:
        raise ValueError(f"the checkpoint has {C} latent channels; expected at most {_MAX_BITS}, a bit each")
    config = VQVAEConfig(
        image_size=_GRID_SIDE * 2 ** (num_levels - 1) if image_size is None else image_size,
        autoencoder="magvit2",
        codebook="lfq",
        vocab_size=2**C,
        embedding_dim=C,
        min_group_channels=1,
        **sizes,
    )
    return take_over_tokenizer(config, state, _naming, constants={"quantizer.codebook.unit": torch.ones(1)})


def vqvae_to_magvit2(model: VQVAE) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under Open-MAGVIT2's names, as plain weights.

    Args:
        model: a tokenizer of its architecture, of any size.

    Returns:
        Float32 tensors by its names.

    Raises:
        ValueError: if it cannot express the tokenizer.
    """
    fields = {"autoencoder": ("magvit2",), "layout": ("tiles",), "tile": ([1, 1],), "codebook": ("lfq",)}
    check_expressible(model.config, "Open-MAGVIT2", fields | {"quant_conv_kernel_size": (0,)})
    return foreign_tensors(model, _naming)


def magvit2_arguments(model: VQVAE, state: dict[str, Tensor]) -> dict:
    """Return what Open-MAGVIT2's own class has to be given for an exported state dict."""
    config = model.config
    network = {
        "double_z": False,
        "z_channels": config.embedding_dim,
        "resolution": max(config.image_size),
        "in_channels": config.num_channels,
        "out_ch": config.num_channels,
        "ch": config.hidden_dim,
        "ch_mult": config.width_multipliers,
        "num_res_blocks": config.num_res_blocks,
    }
    return {"n_embed": config.vocab_size, "embed_dim": config.embedding_dim, "ddconfig": network}


def _naming(name: str) -> tuple[str, ...]:
    """Return Open-MAGVIT2's name of one of our tensors; the codebook's are in no file."""
    if name.startswith("quantizer."):
        return ()
    name = re.sub(r"^(encoder|decoder)\.mid\.", r"\1.mid_block.", name)
    return (name.replace(".upsample.conv.", ".upsample.conv1."),)
