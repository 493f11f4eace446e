"""LlamaGen transformers, of classes and of texts: taking over a published state dict, and writing one of ours.

LlamaGen: Sun et al. 2024, arXiv:2406.06525. Legend: L tokens, V codes, D width, E width of text features.
"""

from collections.abc import Collection

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
from nextblock.prior import LlamaPrior, LlamaPriorConfig, SamplingOptions
from nextblock.prior.head_plan import check_softmax

_HEAD_WIDTH = 64
# Of the published sizes the only one with heads of another width.
_HEADS_OF_WIDTH = {3200: 32}
# Published guidance by width: B, L, XL, XXL, 3B; of other widths the first.
_GUIDANCE_OF_WIDTH = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}
_TEXT_GUIDANCE, _TEXT_TOP_K = 7.5, 1000
# Derived from sizes; some forks save it.
_DERIVED = "freqs_cis"


def is_llamagen_prior(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a LlamaGen transformer of classes."""
    return "cls_embedding.embedding_table.weight" in names


def is_llamagen_text_prior(names: Collection[str]) -> bool:
    """Tell by the names of its tensors whether a checkpoint is a LlamaGen transformer of texts."""
    return any(name.startswith("cls_embedding.cap_proj.") for name in names)


def count_llamagen_classes(state: dict[str, Tensor]) -> int:
    """Return the number of classes of a LlamaGen transformer's tensors; 0 where no tensor tells it."""
    return infer_size(state, ("cls_embedding.embedding_table.weight", 0), default=1) - 1


def prior_from_llamagen(
    state: dict[str, Tensor],
    *,
    grid: int | list[int] | None = None,
    num_heads: int | None = None,
    class_names: list[str] | None = None,
) -> LlamaPrior:
    """Build a prior from the tensors of a LlamaGen transformer.

    Args:
        state: tensors by LlamaGen's names.
        grid: (h, w) of the tokens, or one number for both; no tensor tells it.
        num_heads: attention heads; None takes those of the published sizes, D / 64 but at width 3200.
        class_names: one name a class.

    Returns:
        The prior in float32, in evaluation mode.

    Raises:
        ValueError: listing by name what is missing, unexpected or misshapen; or if sizes do not fit together.
    """
    if grid is None:
        raise ValueError("grid is missing; expected the rows and columns of tokens, [16,16] for 256 px of VQ-16 say")
    state = {name: tensor for name, tensor in state.items() if name != _DERIVED}
    config = LlamaPriorConfig(
        layout=BlockLayout.tiles(1, grid).to_dict(), class_names=class_names, **_infer_sizes(state, num_heads)
    )
    model = build_without_weights(LlamaPrior, config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_state_dict(state, expected, {})
    take_over(model, {name: state[name] for name in expected})
    return model


def prior_to_llamagen(model: LlamaPrior) -> dict[str, Tensor]:
    """Write a prior's tensors under LlamaGen's names, which are the model's own.

    Args:
        model: a prior of any size.

    Raises:
        ValueError: if LlamaGen cannot express the prior.
    """
    config = model.config
    check_softmax(config, "LlamaGen's")
    if config.text_dim is None and not config.num_classes:
        raise ValueError("num_classes is 0; expected at least 1 in LlamaGen's format")
    if len(set(config.block_layout().grid)) > 1:
        raise ValueError(f"layout is {config.layout}; expected a square grid in LlamaGen's format")
    return float32_tensors(model)


def llamagen_arguments(config: LlamaPriorConfig) -> dict:
    """Return what LlamaGen's own transformer class has to be given for an exported state dict."""
    is_text = config.text_dim is not None
    text = {"model_type": "t2i", "cls_token_num": config.max_text_positions, "caption_dim": config.text_dim}
    classes = {"model_type": "c2i", "cls_token_num": 1, "num_classes": config.num_classes}
    return (text if is_text else classes) | {
        "dim": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_kv_head": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "block_size": config.block_layout().num_tokens,
        "rope_base": config.rope_base,
        "norm_eps": config.norm_eps,
    }


def llamagen_sampling(config: LlamaPriorConfig) -> SamplingOptions:
    """Return how LlamaGen draws its published samples, as far as a prior can be sampled so.

    Args:
        config: of a prior that took over LlamaGen's weights.
    """
    if config.text_dim is not None:
        return SamplingOptions(guidance_scale=_TEXT_GUIDANCE, top_k=min(_TEXT_TOP_K, config.vocab_size))
    scale = _GUIDANCE_OF_WIDTH.get(config.hidden_size, _GUIDANCE_OF_WIDTH[768])
    return SamplingOptions(guidance_scale=scale if config.num_classes else 1.0)


def _infer_sizes(state: dict[str, Tensor], num_heads: int | None) -> dict:
    """Tell the architecture from shapes, of several tensors where possible: one odd one leads nowhere."""
    num_layers = count_numbered(state, "layers.") or 1
    layers = [f"layers.{i}" for i in range(num_layers)]
    D = infer_size(
        state,
        *(("tok_embeddings.weight", 1), ("output.weight", 1), ("norm.weight", 0)),
        *((f"{layer}.attention_norm.weight", 0) for layer in layers),
    )
    num_heads = _choose_num_heads(D, num_heads)
    rows = infer_size(state, *((f"{layer}.attention.wqkv.weight", 0) for layer in layers), default=3 * D)
    head_width = D // num_heads or 1
    sizes = {
        "vocab_size": infer_size(state, ("output.weight", 0), ("tok_embeddings.weight", 0)),
        "hidden_size": D,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_key_value_heads": None if rows == 3 * D else max((rows // head_width - num_heads) // 2, 1),
        "inner_size": infer_size(
            state,
            *((f"{layer}.feed_forward.{name}.weight", 0) for layer in layers for name in ("w1", "w3")),
            default=4 * D,
        ),
    }
    if not is_llamagen_text_prior(state):
        return sizes | {"num_classes": count_llamagen_classes(state)}
    table = "cls_embedding.uncond_embedding"
    return sizes | {
        "text_dim": infer_size(state, ("cls_embedding.cap_proj.fc1.weight", 1), (table, 1)),
        "max_text_positions": infer_size(state, (table, 0), default=120),
    }


def _choose_num_heads(D: int, num_heads: int | None) -> int:
    """Return the number of heads: the user's, or that of the published sizes."""
    if num_heads is not None:
        if num_heads < 1 or D % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of the width {D}")
        return num_heads
    if D not in _HEADS_OF_WIDTH and D % _HEAD_WIDTH:
        raise ValueError(f"num_heads is missing; expected it for a width of {D}, which is no multiple of {_HEAD_WIDTH}")
    return _HEADS_OF_WIDTH.get(D, D // _HEAD_WIDTH)
