"""VAR tokenizers: taking over a published state dict, and writing one of ours under the published names.

VAR: Tian et al. 2024, arXiv:2404.02905. Legend: K scales, V codes, C code channels.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from nextblock.data.blocks import BlockLayout
from nextblock.files.state_dicts import count_numbered, infer_size
from nextblock.tokenizer import VQVAE, VQVAEConfig

from .foreign_autoencoder import check_expressible, foreign_tensors, infer_sizes, take_over_tokenizer

# How VAR names φ convolutions shared by all scales, by neighbouring scales, and by none.
_PHI_PREFIXES = {
    "shared": "quantize.quant_resi.qresi.",
    "partially_shared": "quantize.quant_resi.qresi_ls.{}.",
    "separate": "quantize.quant_resi.{}.",
}
_USE_COUNTER = "quantize.ema_vocab_hit_SV"
_VAR_EPSILON = 1e-12


def is_var_tokenizer(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a VAR tokenizer: its attention has a joint `qkv`."""
    return any(".qkv." in name and name.startswith(("encoder.", "decoder.")) for name in names)


def vqvae_from_var(
    state: dict[str, Tensor],
    *,
    scales: list[int | list[int]],
    image_size: int | list[int] | None = None,
    has_normalized_codes: bool = False,
    phi_ratio: float = 0.5,
    beta: float = 0.25,
) -> VQVAE:
    """Build a tokenizer from the tensors of a VAR tokenizer.

    Args:
        state: tensors by VAR's names.
        scales: K sizes of token maps; the last is the latent grid.
        image_size: H and W in pixels; None takes the last scale times the downsampling.
        has_normalized_codes: compare codes by cosine.
        phi_ratio: r in φ(h) = (1 − r)·h + r·conv(h); 0 for a checkpoint without φ convolutions.
        beta: weight of the commitment loss.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together, or codes
            are NaN or infinite.
    """
    phi_names, num_phi = _find_phi(state, phi_ratio)
    sizes = _infer_sizes(state)
    if image_size is None:
        factor = 2 ** (len(sizes["width_multipliers"]) - 1)
        image_size = [factor * side for side in BlockLayout.scales(scales).grid]
    config = VQVAEConfig(
        image_size=image_size,
        autoencoder="vqgan",
        layout="scales",
        scales=scales,
        num_phi=num_phi,
        phi_ratio=phi_ratio,
        beta=beta,
        epsilon=_VAR_EPSILON,
        codebook_metric="cosine" if has_normalized_codes else "euclidean",
        var_phi_names=phi_names,
        min_group_channels=1,
        **sizes,
    )
    # The same codes serve other scales, so the counter need not have a row for each of these.
    num_counted = infer_size(state, (_USE_COUNTER, 0), default=1)
    derived = {_USE_COUNTER: (num_counted, config.vocab_size)}
    return take_over_tokenizer(config, state, lambda name: (_var_name(name, phi_names),), derived=derived)


def vqvae_to_var(
    model: VQVAE, phi_names: Literal["shared", "partially_shared", "separate"] | None = None
) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under VAR's names.

    Args:
        model: a tokenizer of VAR's architecture, of any size.
        phi_names: how the φ convolutions are named; None takes the names that the tokenizer came with, else
            "shared" for one and "partially_shared" for several.

    Returns:
        Float32 tensors by VAR's names, the counter of used codes at zero.

    Raises:
        ValueError: if VAR cannot express the tokenizer, or the names do not fit its number of φ convolutions.
    """
    _check_expressible(model.config)
    phi_names = _choose_phi_names(model.config, phi_names)
    state = foreign_tensors(model, lambda name: (_var_name(name, phi_names),))
    state[_USE_COUNTER] = torch.zeros(model.layout.num_blocks, model.config.vocab_size)
    return state


def var_arguments(model: VQVAE, state: dict[str, Tensor]) -> dict:
    """Return what VAR's own tokenizer class has to be given for an exported state dict."""
    config = model.config
    share = {"shared": 1, "partially_shared": config.num_phi, "separate": 0}
    return {
        "vocab_size": config.vocab_size,
        "z_channels": config.embedding_dim,
        "ch": config.hidden_dim,
        "ch_mult": tuple(config.width_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "quant_conv_ks": config.quant_conv_kernel_size,
        "using_znorm": config.codebook_metric == "cosine",
        "beta": config.beta,
        "quant_resi": config.phi_ratio if config.num_phi else 0,
        "share_quant_resi": share[_find_phi(state, config.phi_ratio)[0]] if config.num_phi else 1,
        "v_patch_nums": tuple(side for side, _ in model.layout.shapes),
    }


def _find_phi(state: dict[str, Tensor], phi_ratio: float) -> tuple[str | None, int]:
    """Tell how the φ convolutions are named, and their number."""
    if phi_ratio == 0:
        return None, 0
    counts = {
        "shared": int(any(name.startswith(_PHI_PREFIXES["shared"]) for name in state)),
        "partially_shared": count_numbered(state, "quantize.quant_resi.qresi_ls."),
        "separate": count_numbered(state, "quantize.quant_resi."),
    }
    if not any(counts.values()):
        return "partially_shared", 4  # The published form, for the missing names to be listed.
    return max(counts.items(), key=lambda item: item[1])


def _infer_sizes(state: dict[str, Tensor]) -> dict[str, int | list[int]]:
    """Tell the architecture from shapes, of several tensors where possible: one odd one leads nowhere."""
    num_levels = max(count_numbered(state, "encoder.down."), count_numbered(state, "decoder.up."), 1)
    channels = [("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1)]
    kernels = [("quant_conv.weight", 2), ("quant_conv.weight", 3), ("post_quant_conv.weight", 2)]
    return infer_sizes(state, lambda name: (name,), num_levels) | {
        "vocab_size": infer_size(state, ("quantize.embedding.weight", 0), (_USE_COUNTER, 1)),
        "embedding_dim": infer_size(state, ("quantize.embedding.weight", 1), *channels),
        "quant_conv_kernel_size": infer_size(state, *kernels),
    }


def _var_name(name: str, phi_names: str | None) -> str:
    """Return VAR's name of one of our tensors."""
    if name == "quantizer.codebook.weight":
        return "quantize.embedding.weight"
    if name.startswith("quantizer.codec.phi."):
        number, kind = name.removeprefix("quantizer.codec.phi.").split(".")
        return _PHI_PREFIXES[phi_names].format(number) + kind
    return name


def _choose_phi_names(config: VQVAEConfig, phi_names: str | None) -> str | None:
    """Return how to name φ convolutions on the way out, or None where there are none."""
    if config.num_phi == 0:
        return None
    by_number = "shared" if config.num_phi == 1 else "partially_shared"
    stated = config.var_phi_names
    names = phi_names or (by_number if stated in (None, "by_number") else stated)
    if names != "separate" and names != by_number:
        raise ValueError(
            f"phi_names is {names!r} for {config.num_phi} φ convolutions; expected {by_number!r}"
        )
    return names


def _check_expressible(config: VQVAEConfig) -> None:
    """Refuse what VAR's tokenizer has no form for."""
    lowest = len(config.width_multipliers) - 1
    check_expressible(
        config,
        "VAR",
        {
            "autoencoder": ("vqgan",),
            "layout": ("scales",),
            "codebook": ("learned",),
            "attention_levels": (None, [lowest]),
            "codebook_metric": ("euclidean", "cosine"),
            "has_unit_codes": (False,),
        },
    )
    if config.quant_conv_kernel_size == 0 or config.latent_channels != config.embedding_dim:
        raise ValueError(
            f"z_channels is {config.latent_channels}, embedding_dim {config.embedding_dim}, "
            f"quant_conv_kernel_size {config.quant_conv_kernel_size}; expected equal channels, and 1 or 3"
        )
    if config.num_phi and config.phi_ratio == 0:
        raise ValueError(f"phi_ratio is 0 with num_phi {config.num_phi}; expected num_phi 0 in VAR's format")
    if any(height != width for height, width in config.scales):
        raise ValueError(f"scales is {config.scales}; expected square ones in VAR's format")
