"""VAR transformers: taking over a published state dict, and writing one of ours under the published names.

VAR: Tian et al. 2024, arXiv:2404.02905. Legend: K scales, L tokens, V codes, C code channels, D width.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nextblock.data.blocks import BlockLayout
from nextblock.files.state_dicts import (
    Shapes,
    build_without_weights,
    check_state_dict,
    count_numbered,
    float32_tensors,
    infer_size,
    take_over,
)
from nextblock.prior import BlockPrior, BlockPriorConfig, SamplingOptions
from nextblock.prior.head_plan import check_softmax

_VAR_HEAD_WIDTH = 64
# The published sampling: cfg 1.5 in VAR's words.
_VAR_SAMPLING = {"guidance_schedule": "linear", "top_k": 900, "top_p": 0.96}
_VAR_GUIDANCE_SCALE = 2.5
VAR_ATTENTION_SCALE = 0.25
_VAR_DROP_PATH_PER_LAYER = 0.1 / 24


def is_var_prior(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a VAR transformer."""
    return "word_embed.weight" in names or any(name.endswith(".attn.mat_qkv.weight") for name in names)


def count_var_classes(state: dict[str, Tensor]) -> int:
    """Return the number of classes of a VAR transformer's tensors; 0 where no tensor tells it."""
    return infer_size(state, ("class_emb.weight", 0), default=1) - 1


def prior_from_var(
    state: dict[str, Tensor],
    *,
    scales: list[int | list[int]],
    num_heads: int | None = None,
    attention_scale: float = VAR_ATTENTION_SCALE,
    class_names: list[str] | None = None,
) -> BlockPrior:
    """Build a prior from the tensors of a VAR transformer.

    Args:
        state: tensors by VAR's names.
        scales: K sizes of token maps.
        num_heads: attention heads; None takes the number of learned temperatures, else D / 64.
        attention_scale: factor on 1/sqrt(head width); unused with normalised attention.
        class_names: one name a class.

    Returns:
        The prior in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together.
    """
    sizes = _infer_sizes(state)
    num_layers, D = sizes["num_layers"], sizes["hidden_size"]
    config = BlockPriorConfig(
        layout=BlockLayout.scales(scales).to_dict(),
        class_names=class_names,
        num_heads=_choose_num_heads(state, num_layers, D, num_heads),
        attention_scale=1.0 if sizes["use_normalized_attention"] else attention_scale,
        drop_path=_VAR_DROP_PATH_PER_LAYER * num_layers,
        **sizes,
    )
    model = build_without_weights(BlockPrior, config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_state_dict(state, expected, _derived_shapes(config))
    key_biases = [name for name in state if name.endswith(".zero_k_bias") and state[name].any()]
    if key_biases:
        raise ValueError(f"the checkpoint has key biases {key_biases}; expected zeros")
    take_over(model, {name: state[name] for name in model.state_dict()})
    return model


def prior_to_var(model: BlockPrior) -> dict[str, Tensor]:
    """Write a prior's tensors under VAR's names, with those that VAR derives and loads all the same.

    Args:
        model: a prior of VAR's architecture, of any size.

    Returns:
        Float32 tensors by VAR's names, and `lvl_1L` in int64.

    Raises:
        ValueError: if VAR cannot express the prior.
    """
    config = model.config
    _check_expressible(config)
    derived = {
        "lvl_1L": model.layout.block_ids().clone()[None],
        "attn_bias_for_masking": model.layout.block_causal_bias("cpu", torch.float32).clone()[None, None],
    }
    for name, shape in _derived_shapes(config).items():
        derived.setdefault(name, torch.zeros(shape))
    return float32_tensors(model) | derived


def var_arguments(config: BlockPriorConfig) -> dict:
    """Return what VAR's own transformer class has to be given for an exported state dict."""
    return {
        "num_classes": config.num_classes,
        "depth": config.num_layers,
        "embed_dim": config.hidden_size,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "norm_eps": config.norm_eps,
        "shared_aln": config.use_shared_adaln,
        "attn_l2_norm": config.use_normalized_attention,
        "patch_nums": tuple(side for side, _ in config.block_layout().shapes),
    }


def _infer_sizes(state: dict[str, Tensor]) -> dict:
    """Tell the architecture from shapes, of several tensors where possible: one odd one leads nowhere."""
    num_layers = count_numbered(state, "blocks.") or 1
    D = infer_size(
        state,
        *(("word_embed.weight", 0), ("word_embed.bias", 0), ("class_emb.weight", 1), ("head.weight", 1)),
        *(("pos_start", 2), ("pos_1LC", 2), ("lvl_embed.weight", 1)),
    )
    inner = infer_size(
        state,
        *((f"blocks.{i}.ffn.fc1.weight", 0) for i in range(num_layers)),
        *((f"blocks.{i}.ffn.fc1.bias", 0) for i in range(num_layers)),
        default=4 * D,
    )
    return {
        "vocab_size": infer_size(state, ("head.weight", 0), ("head.bias", 0)),
        "embedding_dim": infer_size(state, ("word_embed.weight", 1), default=1),
        "num_classes": count_var_classes(state),
        "hidden_size": D,
        "num_layers": num_layers,
        "mlp_ratio": inner / D,
        "use_shared_adaln": any(
            name.startswith("shared_ada_lin.") or name.endswith(".ada_gss") for name in state
        ),
        "use_normalized_attention": any(name.endswith(".attn.scale_mul_1H11") for name in state),
    }


def _choose_num_heads(state: dict[str, Tensor], num_layers: int, D: int, num_heads: int | None) -> int:
    """Return the number of heads: the learned temperatures tell it, or the user, or VAR's head width."""
    temperatures = ((f"blocks.{i}.attn.scale_mul_1H11", 1) for i in range(num_layers))
    told = infer_size(state, *temperatures, default=0)
    if told and num_heads not in (None, told):
        raise ValueError(f"num_heads is {num_heads}; expected {told}, the number of learned temperatures")
    if told or num_heads is not None:
        return told or num_heads
    if D % _VAR_HEAD_WIDTH:
        raise ValueError(
            f"num_heads is missing; expected it for a width of {D}, which is no multiple of {_VAR_HEAD_WIDTH}"
        )
    return D // _VAR_HEAD_WIDTH


def _derived_shapes(config: BlockPriorConfig) -> Shapes:
    """Return the shapes of the tensors that VAR derives from its sizes and still saves."""
    L = config.block_layout().num_tokens
    zero_k_bias = {f"blocks.{i}.attn.zero_k_bias": (config.hidden_size,) for i in range(config.num_layers)}
    return {"lvl_1L": (1, L), "attn_bias_for_masking": (1, 1, L, L)} | zero_k_bias


def _check_expressible(config: BlockPriorConfig) -> None:
    """Refuse what VAR's transformer has no form for."""
    check_softmax(config, "VAR's")
    layout = config.block_layout()
    if not layout.is_scales or any(height != width for height, width in layout.shapes):
        raise ValueError(f"layout is {config.layout}; expected square scales in VAR's format")
    if config.num_classes == 0:
        raise ValueError("num_classes is 0; expected at least 1 in VAR's format")
    if not config.use_normalized_attention and config.attention_scale != VAR_ATTENTION_SCALE:
        raise ValueError(
            f"attention_scale is {config.attention_scale}; expected {VAR_ATTENTION_SCALE} in VAR's format "
            "without normalised attention"
        )


def var_sampling(config: BlockPriorConfig) -> SamplingOptions:
    """Return how VAR draws its published samples, as far as a prior can be sampled so.

    Args:
        config: of a prior that took over VAR's weights.

    Returns:
        The published guidance, where there are classes to guide by, and truncation.
    """
    scale = _VAR_GUIDANCE_SCALE if config.num_classes else 1.0
    truncation = _VAR_SAMPLING | {"top_k": min(_VAR_SAMPLING["top_k"], config.vocab_size)}
    return SamplingOptions(guidance_scale=scale, **truncation)
