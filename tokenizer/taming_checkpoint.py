"""VQGANs of taming-transformers, Gumbel ones among them: taking over a state dict, and writing one of ours so.

taming: Esser et al. 2021, arXiv:2012.09841. Legend: V codes, C code channels.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor

from nextblock.files.foreign_checkpoints import part_under, with_averaged
from nextblock.files.state_dicts import count_numbered, infer_size
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .foreign_autoencoder import check_expressible, foreign_tensors, in_three, infer_sizes, take_over_tokenizer

_IMAGE_SIZE = 256
_DROPPED = ("loss.*", "colorize")
_FIRST_STAGE = "first_stage_model."
# What else a file of two stages holds.
_SECOND_STAGE = ("transformer.", "cond_stage_model.", "permuter.")
_ATTENDED = re.compile(r"(?:encoder\.down|decoder\.up)\.(\d+)\.attn\.")
_APART = re.compile(r"(encoder|decoder)\.(mid\.attn_1|(down|up)\.\d+\.attn\.\d+)\.[qkv]\.")


def is_taming_tokenizer(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint has a VQGAN of taming's: `q`, `k` and `v` are apart."""
    return any(_APART.match(name.removeprefix(_FIRST_STAGE)) for name in names)


def vqvae_from_taming(
    state: dict[str, Tensor],
    *,
    image_size: int | list[int] = _IMAGE_SIZE,
    takes_averages: bool = True,
    **arithmetic: Any,
) -> VQVAE:
    """Build a tokenizer from the tensors of a taming VQGAN, alone or as the first stage in a transformer's file.

    Args:
        state: tensors by taming's names.
        image_size: H and W in pixels.
        takes_averages: whether averaged weights, where there are any, take the place of the plain ones.
        arithmetic: arguments of `VQVAEConfig` in which projects of these names differ.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together, or codes
            are NaN or infinite.
    """
    state = with_averaged(_first_stage(state), _DROPPED, are_taken=takes_averages)
    num_levels = max(count_numbered(state, "encoder.down."), count_numbered(state, "decoder.up."), 1)
    is_gumbel = "quantize.proj.weight" in state or "quantize.embed.weight" in state
    naming = partial(in_three, partial(_taming_name, is_gumbel=is_gumbel))
    table = "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight"
    codes = [(table, 0), ("quantize.proj.weight", 0), ("quantize.proj.bias", 0)]
    channels = [(table, 1), ("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1)]
    config = VQVAEConfig(
        image_size=image_size,
        autoencoder="vqgan",
        attention_levels=sorted({int(match[1]) for match in map(_ATTENDED.match, state) if match}),
        codebook="gumbel" if is_gumbel else "learned",
        vocab_size=infer_size(state, *codes, default=2),
        embedding_dim=infer_size(state, *channels),
        quant_conv_kernel_size=1,
        min_group_channels=1,
        **infer_sizes(state, naming, num_levels),
        **arithmetic,
    )
    return take_over_tokenizer(config, state, naming)


def vqvae_to_taming(model: VQVAE) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under taming's names.

    Args:
        model: a tokenizer of taming's architecture, of any size.

    Returns:
        Float32 tensors by taming's names.

    Raises:
        ValueError: if taming cannot express the tokenizer.
    """
    return write_named_as_taming(
        model, "taming", {"codebook": ("learned", "gumbel"), "codebook_metric": ("euclidean",)}
    )


def write_named_as_taming(model: VQVAE, project: str, fields: dict[str, tuple]) -> dict[str, Tensor]:
    """Write a tokenizer's tensors for a project that has taming's autoencoder.

    Args:
        model: a tokenizer.
        project: whose format it is, for messages.
        fields: the values that the project has for a field of the configuration, by its name.

    Raises:
        ValueError: if the project cannot express the tokenizer.
    """
    shared = {"autoencoder": ("vqgan",), "layout": ("tiles",), "tile": ([1, 1],), "quant_conv_kernel_size": (1,)}
    check_expressible(model.config, project, shared | {"has_unit_codes": (False,)} | fields)
    return foreign_tensors(model, partial(in_three, partial(_taming_name, is_gumbel=model.config.codebook == "gumbel")))


def taming_arguments(model: VQVAE, state: dict[str, Tensor]) -> dict:
    """Return what taming's own VQModel has to be given for an exported state dict; resolution is of the longer side."""
    config = model.config
    levels, side = config.attention_levels, max(config.image_size)
    attended = [len(config.width_multipliers) - 1] if levels is None else levels
    network = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": side,
        "in_channels": config.num_channels,
        "out_ch": config.num_channels,
        "ch": config.hidden_dim,
        "ch_mult": config.width_multipliers,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [side // 2**level for level in attended],
        "dropout": config.dropout,
    }
    return {"n_embed": config.vocab_size, "embed_dim": config.embedding_dim, "ddconfig": network}


def _first_stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokenizer's tensors of a file of two stages, with those of neither; of any other file all."""
    first = part_under(state, _FIRST_STAGE)
    if not first:
        return state
    known = (_FIRST_STAGE, *_SECOND_STAGE)
    return first | {name: tensor for name, tensor in state.items() if not name.startswith(known)}


def _taming_name(name: str, *, is_gumbel: bool) -> str:
    """Return taming's name of one of our tensors."""
    if name == "quantizer.codebook.weight":
        return "quantize.embed.weight" if is_gumbel else "quantize.embedding.weight"
    return name.replace("quantizer.codebook.", "quantize.")
