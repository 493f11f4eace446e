"""Layers of the Llama prior: RMS norm, rotary attention, SwiGLU, and what stands before the first token.

LlamaGen (arXiv:2406.06525). Legend: B batch, T text positions, l positions, D width, E width of text features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nextblock.training.precision import full_precision

from .configuration_llama_prior import LlamaPriorConfig
from .layers import dropped_path
from .linear import Linear
from .rotary import rotated
from .text_condition import TextCondition


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 at least, then scaled.

    Args:
        hidden_size: D.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(full_precision(x), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class ClassEmbedding(nn.Module):
    """A row a class, the last of them the null class: (B,) → (B, 1, D)."""

    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)[:, None]


class CaptionProjection(nn.Module):
    """Linear, GELU (tanh), Linear, without biases."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = Linear(text_dim, hidden_size, bias=False)
        self.fc2 = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Text features, or a table that stands for none, as positions before the first token.

    Args:
        text_dim: E.
        num_positions: rows of the table.
        hidden_size: D.
    """

    def __init__(self, text_dim: int, num_positions: int, hidden_size: int):
        super().__init__()
        self.cap_proj = CaptionProjection(text_dim, hidden_size)
        # Drawn once and never trained.
        self.register_buffer("uncond_embedding", torch.empty(num_positions, text_dim))

    def forward(self, condition: TextCondition) -> Tensor:
        """Return (B, T, D); where not valid, what zeros give."""
        embeds = condition.text_embeds.to(self.cap_proj.fc1.weight.dtype)
        # No text is seen under the mask of the text: as many rows, the last ones.
        null = self.uncond_embedding[-embeds.shape[1] :].to(embeds.dtype) * condition.text_mask[..., None]
        return self.cap_proj(torch.where(condition.is_null[:, None, None], null, embeds))


class LlamaAttention(nn.Module):
    """Multi-head attention without biases, whose queries and keys are turned by their cell.

    Args:
        hidden_size: D.
        num_heads: heads.
        key_value_heads: heads of keys and values, each shared by equally many queries.
        dropout: probability after the output projection.
    """

    def __init__(self, hidden_size: int, num_heads: int, key_value_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.key_value_heads = num_heads, key_value_heads
        width = hidden_size // num_heads
        self.wqkv = Linear(hidden_size, (num_heads + 2 * key_value_heads) * width, bias=False)
        self.wo = Linear(hidden_size, hidden_size, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: Tensor, attend) -> Tensor:
        """Attend by a function of queries, keys and values (B, heads, l, head width)."""
        h, kv = self.num_heads, self.key_value_heads
        heads = self.wqkv(x).unflatten(-1, (h + 2 * kv, -1)).transpose(1, 2)
        # In one go: for a single token, every operation is felt.
        turned = rotated(heads[:, : h + kv], rotation)
        out = attend(turned[:, :h], turned[:, h:], heads[:, h + kv :])
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x), without biases."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float):
        super().__init__()
        self.w1 = Linear(hidden_size, inner_size, bias=False)
        self.w3 = Linear(hidden_size, inner_size, bias=False)
        self.w2 = Linear(inner_size, hidden_size, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class LlamaLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and added to its input.

    Args:
        config: sizes.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(self, config: LlamaPriorConfig, drop_path: float):
        super().__init__()
        D = config.hidden_size
        self.drop_path = drop_path
        self.scale = 1 / math.sqrt(D // config.num_heads)
        self.attention_norm = RMSNorm(D, config.norm_eps)
        self.attention = LlamaAttention(D, config.num_heads, config.key_value_heads, config.dropout)
        self.ffn_norm = RMSNorm(D, config.norm_eps)
        self.feed_forward = SwiGLU(D, config.feed_forward_size, config.dropout)

    def forward(self, x: Tensor, rotation: Tensor, attend) -> Tensor:
        """Apply the layer to (B, l, D); `rotation` and `attend` as in `LlamaAttention`."""
        rate = self.drop_path if self.training else 0.0
        x = x + dropped_path(self.attention(self.attention_norm(x), rotation, attend), rate)
        return x + dropped_path(self.feed_forward(self.ffn_norm(x)), rate)
