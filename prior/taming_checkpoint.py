"""taming-transformers' GPT: taking over a published state dict, and writing one of ours under the published names.

Esser et al. 2021, arXiv:2012.09841. Legend: L tokens, V codes, D width.
"""

from collections.abc import Collection
from math import isqrt

import torch
from torch import Tensor

from nextblock.data.blocks import BlockLayout
from nextblock.files.foreign_checkpoints import part_under, without_groups
from nextblock.files.state_dicts import (
    build_without_weights,
    check_state_dict,
    count_numbered,
    float32_tensors,
    infer_size,
    take_over,
)
from nextblock.prior import GPTPrior, GPTPriorConfig, SamplingOptions
from nextblock.prior.head_plan import check_softmax

_PREFIX = "transformer."
# In a joint file, the tokenizer lies beside the transformer.
_TOKENIZER = "first_stage_model.*"
_PICTURE_CONDITION, _PERMUTER, _MASK = "cond_stage_model.", "permuter.", ".attn.mask"
_HEAD_WIDTH = 64
# Published: of ImageNet's classes, and of faces.
_CLASS_SAMPLING, _PLAIN_SAMPLING = {"top_k": 600, "top_p": 0.92}, {"top_k": 250}


def is_taming_prior(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint holds a transformer of taming-transformers."""
    return f"{_PREFIX}tok_emb.weight" in names or "tok_emb.weight" in names


def prior_from_taming(
    state: dict[str, Tensor],
    *,
    num_classes: int,
    num_heads: int | None = None,
    grid: int | list[int] | None = None,
    start_token: int = 0,
    class_names: list[str] | None = None,
) -> GPTPrior:
    """Build a prior from the tensors of a taming transformer.

    Args:
        state: tensors by taming's names, those of its tokenizer among them or not.
        num_classes: classes; 0 for an unconditional model. No tensor tells it.
        num_heads: attention heads; None takes D / 64.
        grid: (h, w) of the tokens, or one number for both; None takes the square of as many cells as there are
            positions.
        start_token: code that stands first where there are no classes.
        class_names: one name a class.

    Returns:
        The prior in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; if the transformer is conditioned on
            pictures, or its order is not raster; or if sizes do not fit together.
    """
    if num_classes and start_token:
        raise ValueError(f"start_token is {start_token}; expected 0 with {num_classes} classes, which stand first")
    state = _own_tensors(state)
    sizes = _infer_sizes(state)
    D, num_positions = sizes["hidden_size"], sizes["num_positions"]
    if num_heads is None and D % _HEAD_WIDTH:
        raise ValueError(f"num_heads is missing; expected it for a width of {D}, which is no multiple of {_HEAD_WIDTH}")
    if grid is None:
        grid = isqrt(num_positions)
        if grid**2 != num_positions:
            raise ValueError(f"grid is missing; expected the rows and columns of tokens, at most {num_positions} cells")
    layout = BlockLayout.tiles(1, grid)
    config = GPTPriorConfig(
        layout=layout.to_dict(),
        num_classes=num_classes,
        class_names=class_names,
        start_token=start_token,
        num_heads=D // _HEAD_WIDTH if num_heads is None else num_heads,
        **sizes | {"num_positions": None if num_positions == layout.num_tokens else num_positions},
    )
    model = build_without_weights(GPTPrior, config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    masks = {name: (1, 1, num_positions, num_positions) for name in _mask_names(config)}
    check_state_dict(state, expected, masks)
    causal = torch.ones(num_positions, num_positions).tril()
    other = [name for name in masks if name in state and not torch.equal(state[name][0, 0].float(), causal)]
    if other:
        raise ValueError(f"the checkpoint's masks {other} are not causal; expected lower triangles of ones")
    take_over(model, {name: state[name] for name in expected})
    return model


def prior_to_taming(model: GPTPrior) -> dict[str, Tensor]:
    """Write a prior's tensors under taming's names, with the masks that taming derives and loads all the same.

    Args:
        model: a prior of any size.

    Raises:
        ValueError: if taming cannot express the prior.
    """
    config = model.config
    check_softmax(config, "taming's")
    if config.feed_forward_size != 4 * config.hidden_size:
        raise ValueError(f"inner_size is {config.inner_size}; expected 4 times hidden_size in taming's format")
    num_positions = model.pos_emb.shape[1]
    masks = {name: torch.ones(1, 1, num_positions, num_positions).tril() for name in _mask_names(config)}
    return {_PREFIX + name: tensor for name, tensor in (float32_tensors(model) | masks).items()}


def taming_arguments(config: GPTPriorConfig) -> dict:
    """Return what taming's own transformer class has to be given for an exported state dict."""
    return {
        "vocab_size": config.vocab_size,
        "block_size": config.num_positions or config.block_layout().num_tokens,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
    }


def taming_sampling(config: GPTPriorConfig) -> SamplingOptions:
    """Return how taming draws its published samples, as far as a prior can be sampled so.

    Args:
        config: of a prior that took over taming's weights.
    """
    published = _CLASS_SAMPLING if config.num_classes else _PLAIN_SAMPLING
    return SamplingOptions(**published | {"top_k": min(published["top_k"], config.vocab_size)})


def _own_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the transformer's tensors without their prefix, and whatever is unknown with its whole name."""
    pictures = [name for name in state if name.startswith(_PICTURE_CONDITION)]
    if pictures:
        raise ValueError(f"the checkpoint has {pictures[0]}: conditioned on pictures; expected classes or nothing")
    for name, tensor in state.items():
        if name.startswith(_PERMUTER) and not torch.equal(tensor.flatten().long(), torch.arange(tensor.numel())):
            raise ValueError(f"the checkpoint's {name} permutes the tokens; expected raster order")
    own, rest = part_under(state, _PREFIX), without_groups(state, [_TOKENIZER, f"{_PERMUTER}*", f"{_PREFIX}*"])
    twice = sorted(own.keys() & rest.keys())
    if twice:
        raise ValueError(f"the checkpoint holds {twice} under {_PREFIX!r} and beside it; expected one transformer")
    return own | rest


def _mask_names(config: GPTPriorConfig) -> list[str]:
    """Return the names of the masks that taming saves."""
    return [f"blocks.{i}{_MASK}" for i in range(config.num_layers)]


def _infer_sizes(state: dict[str, Tensor]) -> dict:
    """Tell the architecture from shapes, of several tensors where possible: one odd one leads nowhere."""
    num_layers = count_numbered(state, "blocks.") or 1
    D = infer_size(
        state,
        *(("tok_emb.weight", 1), ("head.weight", 1), ("pos_emb", 2), ("ln_f.weight", 0)),
        *((f"blocks.{i}.ln1.weight", 0) for i in range(num_layers)),
    )
    inner = infer_size(state, *((f"blocks.{i}.mlp.0.bias", 0) for i in range(num_layers)), default=4 * D)
    return {
        "vocab_size": infer_size(state, ("tok_emb.weight", 0), ("head.weight", 0)),
        "hidden_size": D,
        "num_layers": num_layers,
        "inner_size": None if inner == 4 * D else inner,
        "num_positions": infer_size(state, ("pos_emb", 1), *((f"blocks.{i}{_MASK}", 2) for i in range(num_layers))),
    }
