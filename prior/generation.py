"""Block-by-block sampling with a preallocated key/value cache and classifier-free guidance.

Legend: B images, R rows (conditional, then unconditional), K blocks, L_k tokens of block k, L all tokens, D width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import KeyValueCache
from .sampling import sample_tokens


def num_guided_blocks(scales: list[float]) -> int:
    """Return how many blocks need the unconditional rows: all up to the last one whose scale is not 1."""
    return max((k + 1 for k, s in enumerate(scales) if s != 1), default=0)


def generate_blocks(
    model,
    quantizer,
    class_labels: Tensor,
    scales: list[float],
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    given_idx_Bl: list[Tensor] | None = None,
) -> list[Tensor]:
    """Sample all blocks of a batch.

    Everything that depends on the class alone is computed once, before the first block. Unconditional rows ride in the
    same batch as the conditional ones. They are dropped once every remaining scale is 1; while a later scale is not,
    their keys and values are still needed, so only their head is skipped.

    Args:
        model: a `BlockPrior`.
        quantizer: the tokenizer's quantizer.
        class_labels: (B,) int64.
        scales: K guidance scales.
        uniforms: (B, L) float64 in [0, 1), one a token.
        temperature: divides the logits.
        top_k: see `truncate_logits`.
        top_p: see `truncate_logits`.
        given_idx_Bl: K tensors (B, L_k) of tokens that are not sampled, −1 where they are; None samples all.

    Returns:
        K tensors (B, L_k) int64.
    """
    B, layout = len(class_labels), model.layout
    num_guided = num_guided_blocks(scales)
    rows = class_labels
    if num_guided:
        rows = torch.cat([class_labels, torch.full_like(class_labels, model.config.null_class)])
    condition, modulations, head_modulation = model.condition(rows)
    block_input, positions = model.first_input(condition), model.positions()
    cache = _empty_cache(model, len(rows), block_input)
    canvas, idx_Bl = quantizer.start(B), []
    for k, (start, end) in enumerate(layout.bounds):
        num_rows = len(rows) if k < num_guided else B
        hidden_states = block_input[:num_rows] + positions[:, start:end]
        for i, layer in enumerate(model.blocks):
            attend = partial(_cached_attention, cache, i, layer.attn.scale, start, end)
            hidden_states = layer(hidden_states, tuple(m[:num_rows] for m in modulations[i]), attend)
        logits = _guided_logits(model, hidden_states, head_modulation, scales[k], B)
        idx = sample_tokens(logits, uniforms[:, start:end], temperature, top_k, top_p)
        if given_idx_Bl is not None:
            idx = torch.where(given_idx_Bl[k] >= 0, given_idx_Bl[k], idx)
        idx_Bl.append(idx)
        if k + 1 < layout.num_blocks:
            next_input = idx_Bl[-1]
            if model.config.input_embedding == "codes":
                canvas, next_input = quantizer.advance(canvas, next_input, k)
            # Unconditional rows see the same tokens as the conditional ones.
            block_input = model.embed_input(next_input).repeat(num_rows // B, 1, 1)
    return idx_Bl


def _empty_cache(model, num_rows: int, like: Tensor) -> KeyValueCache:
    """Allocate keys and values of all layers and tokens."""
    num_heads, D = model.config.num_heads, model.config.hidden_size
    shape = (num_rows, num_heads, model.layout.num_tokens, D // num_heads)
    return KeyValueCache(model.config.num_layers, shape, like.dtype, like.device)


def _cached_attention(
    cache: KeyValueCache, layer: int, scale: float, start: int, end: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend from a block's queries to the keys and values of all blocks up to it, mask-free."""
    keys, values = cache.extend(layer, k, v, start, end)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _guided_logits(model, hidden_states: Tensor, head_modulation, scale: float, B: int) -> Tensor:
    """Return logits (B, l, V), guided where the scale is not 1."""
    if scale == 1:
        return model.logits(hidden_states[:B], tuple(m[:B] for m in head_modulation))
    conditional, unconditional = model.logits(hidden_states, head_modulation).chunk(2)
    return torch.lerp(unconditional, conditional, scale)
