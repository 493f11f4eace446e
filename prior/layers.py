"""Transformer layers of the prior: attention with a cache, feed-forward, and AdaLN modulation (DiT, arXiv:2212.09748).

Legend: B batch, K blocks, L tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attention, key_bias, seen_keys
from .linear import BiasedLinear, Linear
from .step_graphs import StepGraphs, StepStack, is_whole_cache_read

MAX_LOG_ATTENTION_SCALE = math.log(100)


class KeyValueCache:
    """Preallocated keys and values of all layers and tokens.

    Args:
        num_layers: transformer layers.
        shape: (R, heads, L, head width).
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        # Zeros, not what the memory held: a masked value of NaN would still be one.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.step_graphs = StepGraphs()


class CachedAttention:
    """Attention of a block's queries to the keys and values of all positions up to its last.

    Args:
        cache: of all layers.
        layer: number of the layer.
        span: first position that is seen, first of the block, the position after its last.
        scale: factor on the scores before the softmax.
        bias: added to the scores, see `attention`; None where every query sees all up to the last.
    """

    def __init__(self, cache: KeyValueCache, layer: int, span: tuple[int, int, int], scale: float, bias: Tensor | None):
        self.keys, self.values = cache.keys[layer], cache.values[layer]
        self.span, self.scale, self.bias = span, scale, bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the block's keys and values (R, heads, l, head width) to the cache, and attend; (R, heads, l, …)."""
        R, (first, start, end) = len(q), self.span
        self.keys[:R, :, start:end] = k
        self.values[:R, :, start:end] = v
        return attention(q, self.keys[:R, :, first:end], self.values[:R, :, first:end], self.scale, self.bias)


class MaskedCachedAttention:
    """What `CachedAttention` computes, with shapes that do not tell the block: the whole cache, and a mask.

    Args:
        cache: of all layers.
        layer: number of the layer.
        positions: (L_k,) int64 of the block.
        scale: factor on the scores before the softmax.
        is_seen: (R, S), or (1, S), which of the cache's S positions are seen once they are there; None says all.
    """

    def __init__(self, cache: KeyValueCache, layer: int, positions: Tensor, scale: float, is_seen: Tensor | None):
        self.keys, self.values = cache.keys[layer], cache.values[layer]
        self.positions, self.scale, self.is_seen = positions, scale, is_seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write and attend; see `CachedAttention`."""
        keys, values = self.keys[: len(q)], self.values[: len(q)]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        is_later = torch.arange(keys.shape[2], device=q.device) > self.positions[-1]
        if self.is_seen is not None:
            return attention(q, keys, values, self.scale, key_bias(self.is_seen & ~is_later, q.dtype))
        bias = torch.zeros_like(is_later, dtype=q.dtype).masked_fill(is_later, -torch.inf)
        return attention(q, keys, values, self.scale, bias.expand(q.shape[2], -1))


class BlockAttention(nn.Module):
    """Multi-head attention with query and value biases and none on keys, as in VAR.

    Args:
        hidden_size: D.
        num_heads: heads.
        is_normalized: L2-normalise queries and keys, with a learned temperature a head.
        attention_scale: factor on 1/sqrt(head width) where not normalised.
        dropout: probability after the output projection.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, is_normalized: bool, attention_scale: float, dropout: float
    ):
        super().__init__()
        self.num_heads = num_heads
        self.is_normalized = is_normalized
        self.scale = 1.0 if is_normalized else attention_scale / math.sqrt(hidden_size // num_heads)
        self.mat_qkv = BiasedLinear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        if is_normalized:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.proj = Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, L, D) to three (B, heads, L, head width)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if isinstance(self.mat_qkv, BiasedLinear):
            qkv = self.mat_qkv(x, bias)
        else:  # What an adapter put there takes a layer's input alone.
            qkv = self.mat_qkv(x)
            qkv = qkv + bias.to(qkv.dtype)
        # Views by hand: for a single token, what einops takes to find them is felt.
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.is_normalized:
            temperature = self.scale_mul_1H11.clamp(max=MAX_LOG_ATTENTION_SCALE).exp()
            q = F.normalize(q, dim=-1) * temperature.to(q.dtype)
            k = F.normalize(k, dim=-1)
        return q, k, v

    def merge_heads(self, out: Tensor) -> Tensor:
        """Project (B, heads, L, head width) back to (B, L, D)."""
        merged = self.proj(out.transpose(1, 2).flatten(2))
        return self.dropout(merged) if self.training else merged


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of its input: sharded weights come in the run's half type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float):
        super().__init__()
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return self.dropout(out) if self.training else out


class PriorLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each scaled, shifted and gated by the class condition.

    Args:
        hidden_size: D.
        num_heads: heads.
        inner_size: feed-forward width.
        use_shared_adaln: take the model's shared modulation plus an offset of this layer's own.
        use_normalized_attention: see `BlockAttention`.
        attention_scale: see `BlockAttention`.
        norm_eps: epsilon of the layer norms.
        dropout: probability after attention and feed-forward.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        inner_size: int,
        *,
        use_shared_adaln: bool,
        use_normalized_attention: bool,
        attention_scale: float,
        norm_eps: float,
        dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.attn = BlockAttention(hidden_size, num_heads, use_normalized_attention, attention_scale, dropout)
        self.ffn = FeedForward(hidden_size, inner_size, dropout)
        if use_shared_adaln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, hidden_size))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Turn the condition into gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2, each (B, 1, D).

        Args:
            condition: the class embedding (B, D), or with shared AdaLN the model's projection of it (B, 1, 6, D).
        """
        if hasattr(self, "ada_gss"):
            parts = self.ada_gss + condition
        else:
            parts = rearrange(self.ada_lin(condition), "b (six d) -> b 1 six d", six=6)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = parts.unbind(2)
        return gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2

    def forward(self, x: Tensor, modulation: Tensor | tuple[Tensor, ...], attend) -> Tensor:
        """Apply the layer.

        Args:
            x: (B, L, D).
            modulation: what `modulation` returned, or what it takes.
            attend: function of queries, keys and values (B, heads, L, head width) that returns the attention's output.

        Returns:
            (B, L, D).
        """
        if isinstance(modulation, Tensor):
            modulation = self.modulation(modulation)
        gamma1, gamma2, factor1, factor2, shift1, shift2 = modulation
        attended = attend(*self.attn.queries_keys_values(torch.addcmul(shift1, self.norm(x), factor1)))
        rate = self.drop_path if self.training else 0.0
        x = x + dropped_path(self.attn.merge_heads(attended) * gamma1, rate)
        return x + dropped_path(self.ffn(torch.addcmul(shift2, self.norm(x), factor2)) * gamma2, rate)


def dropped_path(branch: Tensor, rate: float) -> Tensor:
    """Zero the branch (B, l, D) of a random share of the samples and scale up the others; a rate of 0 keeps all."""
    if rate == 0:
        return branch
    keep = 1 - rate
    mask = torch.empty(len(branch), 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(keep)
    return branch * mask / keep


class LayerStack(StepStack):
    """All layers; a call of them is one block's step, which compiles into one graph."""

    def forward(
        self,
        x: Tensor,
        modulations: tuple[tuple[Tensor, ...], ...],
        cache: KeyValueCache,
        span: tuple[int, int, int],
        positions: Tensor | None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Run a block through all layers.

        Args:
            x: (R, L_k, D) the block's input.
            modulations: each layer's.
            cache: holds the blocks before.
            span: first position that is seen, first of the block, the position after its last.
            positions: (L_k,) int64 of the block where all are of one length, so that one graph serves all; else None.
            prefix_mask: (R, n) whether a row sees the n positions from the first seen on; None sees all.

        Returns:
            (R, L_k, D).
        """
        # By itself, a part of the cache is faster than all of it.
        is_masked = positions is not None and is_whole_cache_read(x)
        first, _, end = span
        num_keys = cache.keys[0].shape[2] if is_masked else end - first
        is_seen, bias = seen_keys(prefix_mask, first if is_masked else 0, num_keys, x.device), None
        if is_seen is not None and not is_masked:
            bias = key_bias(is_seen, x.dtype)
        for i, (layer, modulation) in enumerate(zip(self, modulations, strict=True)):
            if is_masked:
                attend = MaskedCachedAttention(cache, i, positions, layer.attn.scale, is_seen)
            else:
                attend = CachedAttention(cache, i, span, layer.attn.scale, bias)
            x = layer(x, modulation, attend)
        return x


class ModulatedHead(nn.Module):
    """Layer norm scaled and shifted by the condition, before the output projection."""

    def __init__(self, hidden_size: int, norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the class embedding (B, D) into scale and shift, each (B, 1, D)."""
        return rearrange(self.ada_lin(condition), "b (two d) -> b 1 two d", two=2).unbind(2)

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = modulation
        return torch.addcmul(shift, self.norm(x), 1 + scale)
