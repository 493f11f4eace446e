"""RAR transformers: taking over a published state dict, and writing one of ours under the published names.

RAR: Yu et al. 2024, arXiv:2411.00776. Legend: L tokens, V codes, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from nextblock.data.blocks import BlockLayout
from nextblock.files.state_dicts import (
    build_without_weights,
    check_state_dict,
    count_numbered,
    float32_tensors,
    infer_size,
    take_over,
)
from nextblock.prior import RARPrior, RARPriorConfig, SamplingOptions
from nextblock.prior.head_plan import check_softmax

# Rows of the published tables beyond the L tokens.
_SPARE_POSITION_ROWS, _SPARE_STEP_ROWS = 1024, 100
# The published sampling by layers and width: B, L, XL and XXL; and the demo's, for any other size.
_SAMPLING = {
    (24, 768): {"guidance_scale": 16.0, "guidance_power": 2.75},
    (24, 1024): {"guidance_scale": 15.5, "guidance_power": 2.5, "temperature": 1.02},
    (32, 1280): {"guidance_scale": 6.9, "guidance_power": 1.5, "temperature": 1.02},
    (40, 1408): {"guidance_scale": 8.0, "guidance_power": 1.2, "temperature": 1.02},
}
_OTHER_SAMPLING = {"guidance_scale": 4.0, "guidance_power": 0.0}


def is_rar_prior(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a RAR transformer."""
    return "target_aware_pos_embed" in names or "timesteps_embeddings" in names


def count_rar_classes(state: dict[str, Tensor]) -> int:
    """Return the number of classes of a RAR transformer's tensors."""
    # Codes, a row for masked tokens, the classes and the null class.
    V = infer_size(state, ("lm_head.weight", 0), ("lm_head.bias", 0))
    num_rows = infer_size(state, ("embeddings.weight", 0), default=V + 3)
    if num_rows < V + 3:
        raise ValueError(f"embeddings.weight has {num_rows} rows; expected at least {V + 3}, for codes and classes")
    return num_rows - V - 2


def prior_from_rar(
    state: dict[str, Tensor],
    *,
    grid: int | list[int] | None = None,
    num_heads: int | None = None,
    class_names: list[str] | None = None,
) -> RARPrior:
    """Build a prior from the tensors of a RAR transformer.

    Args:
        state: tensors by RAR's names.
        grid: (h, w) of the latent grid; None is a square of the L tokens that the table of steps has rows for.
        num_heads: attention heads, which the norm of the queries tells; another number is refused.
        class_names: one name a class.

    Returns:
        The prior in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together.
    """
    sizes = _infer_sizes(state)
    if num_heads not in (None, sizes["num_heads"]):
        raise ValueError(f"num_heads is {num_heads}; expected {sizes['num_heads']}, as the norm of the queries tells")
    layout = _layout(grid, sizes["num_step_rows"] - _SPARE_STEP_ROWS)
    model = build_without_weights(RARPrior, RARPriorConfig(layout=layout.to_dict(), class_names=class_names, **sizes))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    num_tokens, num_classes = expected["embeddings.weight"][0], expected.pop("class_emb.weight")[0]
    expected["embeddings.weight"] = (num_tokens + num_classes, sizes["hidden_size"])
    check_state_dict(state, expected, {})
    tokens, classes = state["embeddings.weight"].split([num_tokens, num_classes])
    take_over(model, state | {"embeddings.weight": tokens, "class_emb.weight": classes})
    return model


def prior_to_rar(model: RARPrior) -> dict[str, Tensor]:
    """Write a prior's tensors under RAR's names; rows of tables that nothing reads are zeros where there are none.

    Args:
        model: of any size.

    Returns:
        Float32 tensors by RAR's names.

    Raises:
        ValueError: if RAR cannot express the prior.
    """
    config, state = model.config, float32_tensors(model)
    check_softmax(config, "RAR's")
    if config.num_classes == 0:
        raise ValueError("num_classes is 0; expected at least 1 in RAR's format")
    if config.norm_eps != 1e-6:
        raise ValueError(f"norm_eps is {config.norm_eps}; expected 1e-06 in RAR's format")
    tables = [state["embeddings.weight"], state.pop("class_emb.weight")]
    L = model.layout.num_tokens
    rows = dict.fromkeys(("pos_embed", "target_aware_pos_embed"), L + _SPARE_POSITION_ROWS)
    rows["timesteps_embeddings"] = L + _SPARE_STEP_ROWS
    for name, num_rows in rows.items():
        if state[name].shape[1] > num_rows:
            raise ValueError(f"{name} has {state[name].shape[1]} rows; expected at most {num_rows} in RAR's format")
        state[name] = F.pad(state[name], (0, 0, 0, num_rows - state[name].shape[1]))
    return state | {"embeddings.weight": torch.cat(tables)}


def rar_arguments(config: RARPriorConfig) -> dict:
    """Return what RAR's own configuration has to say for an exported state dict."""
    return {
        "codebook_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.inner_size,
        "image_seq_len": config.block_layout().num_tokens,
        "condition_num_classes": config.num_classes,
    }


def rar_sampling(config: RARPriorConfig) -> SamplingOptions:
    """Return how RAR draws its published samples.

    Args:
        config: of a prior that took over RAR's weights.

    Returns:
        The published settings of its size, or of no published size the demo's: guidance that is constant.
    """
    options = _SAMPLING.get((config.num_layers, config.hidden_size), _OTHER_SAMPLING)
    return SamplingOptions(guidance_schedule="power-cosine-open", **options)


def _infer_sizes(state: dict[str, Tensor]) -> dict:
    """Tell the architecture from shapes, of several tensors where possible: one odd one leads nowhere."""
    num_layers = count_numbered(state, "blocks.") or 1
    layers = range(num_layers)
    D = infer_size(
        state,
        *(("cls_token", 2), ("embeddings.weight", 1), ("pos_embed", 2), ("timesteps_embeddings", 2)),
        *(("target_aware_pos_embed", 2), ("lm_head.weight", 1)),
    )
    norms = [f"blocks.{i}.attn.{name}" for i in layers for name in ("q_norm", "k_norm")]
    head_width = infer_size(state, *((f"{norm}.{part}", 0) for norm in norms for part in ("weight", "bias")))
    if D % head_width:
        raise ValueError(f"the norms of queries have {head_width} channels; expected a divisor of the width {D}")
    return {
        "vocab_size": infer_size(state, ("lm_head.weight", 0), ("lm_head.bias", 0)),
        "num_classes": count_rar_classes(state),
        "hidden_size": D,
        "num_layers": num_layers,
        "num_heads": D // head_width,
        "inner_size": infer_size(state, *((f"blocks.{i}.mlp.fc1.weight", 0) for i in layers), default=4 * D),
        "num_position_rows": infer_size(state, ("pos_embed", 1), ("target_aware_pos_embed", 1)),
        "num_step_rows": infer_size(state, ("timesteps_embeddings", 1)),
    }


def _layout(grid: int | list[int] | None, num_tokens: int) -> BlockLayout:
    """Return the raster of a grid, or of a square of so many tokens."""
    if grid is None:
        side = isqrt(max(num_tokens, 0))
        if side < 1 or side**2 != num_tokens:
            raise ValueError(f"grid is missing; expected it for {num_tokens} tokens, which make no square")
        grid = side
    layout = BlockLayout.tiles(1, grid)
    if layout.num_tokens != num_tokens:
        raise ValueError(f"grid is {grid}; expected {num_tokens} cells, as timesteps_embeddings has rows for")
    return layout
