"""Layers of the RAR prior: attention with normalised queries and keys, modulation by class and position, their cache.

RAR: Yu et al. 2024, arXiv:2411.00776. Legend: B batch, R rows, T positions, L all tokens, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rar_prior import RARPriorConfig
from .layers import KeyValueCache, LayerNorm
from .linear import Linear

Modulation = tuple[Tensor, ...]


class RARAttention(nn.Module):
    """Multi-head attention whose queries and keys pass a layer norm of the head's width."""

    def __init__(self, config: RARPriorConfig):
        super().__init__()
        D, head_width = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads, self.scale = config.num_heads, head_width**-0.5
        self.qkv = Linear(D, 3 * D)
        self.q_norm = LayerNorm(head_width, eps=config.norm_eps)
        self.k_norm = LayerNorm(head_width, eps=config.norm_eps)
        self.proj = Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, T, D) to three (B, heads, T, head width)."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def merge_heads(self, out: Tensor) -> Tensor:
        """Project (B, heads, T, head width) back to (B, T, D)."""
        merged = self.proj(out.transpose(1, 2).flatten(2))
        return self.dropout(merged) if self.training else merged


class RARFeedForward(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: RARPriorConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.inner_size)
        self.fc2 = Linear(config.inner_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.fc2(F.gelu(self.fc1(x)))
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class RARLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each shifted, scaled and gated by the class and the number of the position."""

    def __init__(self, config: RARPriorConfig):
        super().__init__()
        D = config.hidden_size
        self.norm1 = LayerNorm(D, eps=config.norm_eps)
        self.attn = RARAttention(config)
        self.norm2 = LayerNorm(D, eps=config.norm_eps)
        self.mlp = RARFeedForward(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(D, 6 * D))

    def modulation(self, condition: Tensor) -> Modulation:
        """Turn the condition (B, T, D) into shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2, each (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        return shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2

    def forward(self, x: Tensor, modulation: Tensor | Modulation, attend: Callable) -> Tensor:
        """Apply the layer.

        Args:
            x: (B, T, D).
            modulation: what `modulation` returned, or what it takes.
            attend: function of queries, keys and values (B, heads, T, head width) that returns the attention's output.

        Returns:
            (B, T, D).
        """
        if isinstance(modulation, Tensor):
            modulation = self.modulation(modulation)
        shift1, factor1, gate1, shift2, factor2, gate2 = modulation
        attended = attend(*self.attn.queries_keys_values(torch.addcmul(shift1, self.norm1(x), factor1)))
        x = torch.addcmul(x, self.attn.merge_heads(attended), gate1)
        return torch.addcmul(x, self.mlp(torch.addcmul(shift2, self.norm2(x), factor2)), gate2)


class RARHeadNorm(nn.Module):
    """Layer norm scaled and shifted by the condition, before the output projection."""

    def __init__(self, config: RARPriorConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def modulation(self, condition: Tensor) -> Modulation:
        """Turn the condition (B, T, D) into 1 + scale and shift, each (B, T, D)."""
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        factor, shift = modulation
        return torch.addcmul(shift, self.norm(x), factor)


class RARCache(KeyValueCache):
    """Keys and values of L + 1 positions, and the modulations of the positions that come next.

    Attributes:
        modulations: of each layer, then of the head, (R, T, parts, D).
        first: the position that they begin with.
    """

    modulations: list[Tensor] = []
    first = 0

    def of_position(self, position: int, num_rows: int) -> tuple[Modulation, ...]:
        """Return the modulations of one position for the first rows, each (R, 1, D)."""
        t = position - self.first
        return tuple(of_layer[:num_rows, t : t + 1].unbind(2) for of_layer in self.modulations)
