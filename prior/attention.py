"""Attention over blocks of tokens, and which of the ways to compute it is the fast one.

Legend: B batch, L tokens, L_q queries, L_k keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nextblock.data.blocks import BlockLayout

# Up to this many blocks, one mask-free attention call a block is cheaper than one call with a mask.
MAX_CALLS_PER_ATTENTION = 16


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attend from every query to every key.

    On a CPU in half precision, products and a softmax of their own are faster than PyTorch's fused kernel: a training
    step of a small prior takes 0.6 of the time. They round the scores to that precision, as autocast products do.

    Args:
        q: (B, heads, L_q, head width) queries.
        k: (B, heads, L_k, head width) keys, or those of fewer heads, each for equally many queries.
        v: (B, heads, L_k, head width) values, likewise.
        scale: factor on the scores before the softmax.
        bias: (L_q, L_k), (B, 1, L_q, L_k) or (B, 1, 1, L_k), added to the scores, −inf where a query does not see a
            key; None adds nothing.

    Returns:
        (B, heads, L_q, head width).
    """
    k, v = _for_all_heads(q, k), _for_all_heads(q, v)
    if bias is not None:
        bias = bias.to(q.dtype)
    if not _is_half_on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (q * scale) @ k.mT
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, -1) @ v


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend from every position to itself and all before it.

    Args:
        q: (B, heads, L, head width) queries; `k` and `v` likewise, or of fewer heads.
        k: keys.
        v: values.
        scale: factor on the scores before the softmax.
        bias: (B, 1, L, L) in place of the causal one, see `causal_bias`.
        dropout: share of the attention's weights that are left out; with no bias of its own.

    Returns:
        (B, heads, L, head width).
    """
    assert bias is None or not dropout, "dropout goes with the causal mask alone"
    k, v = _for_all_heads(q, k), _for_all_heads(q, v)
    if bias is None and (dropout or not _is_half_on_cpu(q)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
    if bias is None:
        bias = causal_bias(torch.arange(q.shape[2], device=q.device), q.shape[2], None, q.dtype)
    return attention(q, k, v, scale, bias)


def causal_bias(positions: Tensor, num_keys: int, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what causal attention adds to its scores: 0 for a query's own position and those seen before it.

    Args:
        positions: (L_q,) int64, the queries' places among the keys.
        num_keys: L_k.
        key_mask: (B, L_k) whether a key is seen by other positions than its own; None hides none.
        dtype: of the scores.

    Returns:
        (L_q, L_k), or with a mask (B, 1, L_q, L_k): 0, or −inf where a query does not see a key.
    """
    keys = torch.arange(num_keys, device=positions.device)
    is_seen = keys <= positions[:, None]
    if key_mask is not None:
        is_seen = (is_seen & key_mask[:, None, None]) | (keys == positions[:, None])
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill(~is_seen, -torch.inf)


def seen_keys(prefix_mask: Tensor | None, first: int, num_keys: int, device: torch.device) -> Tensor | None:
    """Extend a prefix's mask to all keys: those before the first are hidden, those after the prefix are seen.

    Args:
        prefix_mask: (B, n) whether the n keys from the first on are seen; None sees them.
        first: number of the first key.
        num_keys: L_k.
        device: of the mask.

    Returns:
        (B, L_k), or (1, L_k), bool; None where all are seen.
    """
    if prefix_mask is None:
        return None if first == 0 else (torch.arange(num_keys, device=device) >= first)[None]
    B, n = prefix_mask.shape
    before, after = prefix_mask.new_zeros(B, first), prefix_mask.new_ones(B, num_keys - first - n)
    return torch.cat([before, prefix_mask, after], dim=1)


def key_bias(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores so that keys are hidden from all queries, (B, L_k) → (B, 1, 1, L_k)."""
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill(~is_seen, -torch.inf)[:, None, None]


def prefixed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, num_prefix: int, prefix_mask: Tensor | None
) -> Tensor:
    """Attend from a prefix to itself, and from every token to the prefix, its own block and all blocks before it.

    Args:
        q: (B, heads, P + L, head width) queries; `k` and `v` likewise.
        k: keys.
        v: values.
        layout: the blocks.
        scale: factor on the scores before the softmax.
        num_prefix: P.
        prefix_mask: (B, P) which positions of the prefix are seen; None sees all.

    Returns:
        (B, heads, P + L, head width).
    """
    P, bias = num_prefix, None
    if prefix_mask is not None:
        bias = key_bias(seen_keys(prefix_mask, 0, q.shape[2], q.device), q.dtype)
    bounds = [(0, P), *((P + start, P + end) for start, end in layout.bounds)]
    if layout.num_blocks <= MAX_CALLS_PER_ATTENTION:
        outputs = []
        for start, end in bounds:
            seen = None if bias is None else bias[..., :end]
            outputs.append(attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale, seen))
        return torch.cat(outputs, dim=2)
    tokens = F.pad(layout.block_causal_bias(q.device, q.dtype), (P, 0))
    before = F.pad(tokens.new_zeros(P, P), (0, len(tokens)), value=-torch.inf)
    causal = torch.cat([before, tokens])
    return attention(q, k, v, scale, causal if bias is None else causal + bias)


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Attend from every token to its own block and all blocks before it.

    Args:
        q: (B, heads, L, head width) queries; `k` and `v` likewise.
        k: keys.
        v: values.
        layout: the blocks.
        scale: factor on the scores before the softmax.

    Returns:
        (B, heads, L, head width).
    """
    if layout.num_blocks == layout.num_tokens and not _is_half_on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if layout.num_blocks <= MAX_CALLS_PER_ATTENTION:
        outputs = [
            attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], scale) for start, end in layout.bounds
        ]
        return torch.cat(outputs, dim=2)
    # A float mask takes the fast kernel where a boolean one does not.
    return attention(q, k, v, scale, layout.block_causal_bias(q.device, q.dtype))


def _for_all_heads(q: Tensor, shared: Tensor) -> Tensor:
    """Repeat keys or values that several heads of queries share."""
    num_queries = q.shape[1] // shared.shape[1]
    return shared if num_queries == 1 else shared.repeat_interleave(num_queries, dim=1)


def _is_half_on_cpu(q: Tensor) -> bool:
    """Tell whether the queries are of half precision and on a CPU."""
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
