"""Text features in a block prior: positions before the first token, and one vector for AdaLN.

Prefix tokens as in LlamaGen (arXiv:2406.06525), a pooled vector as in Switti (arXiv:2412.01819).
Legend: R rows, T text positions, D width, E width of text features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear
from .text_condition import TextCondition


class TextProjection(nn.Module):
    """Layer norm without affine, Linear, GELU (tanh), Linear: text features of any size of numbers to (…, D)."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim, elementwise_affine=False)
        self.fc1 = Linear(text_dim, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))


class TextEmbedder(nn.Module):
    """What a block prior makes of a text.

    Args:
        text_dim: E.
        hidden_size: D.
        has_prefix: whether each text position is one before the first token.
        has_vector: whether the mean over a text's features is a vector for AdaLN and the first block's input; else a
            learned vector, the same for all texts, is.
        num_empty_positions: of the features of the empty text, which then stand for no text; 0 has one learned row of
            features do so.
    """

    def __init__(
        self, text_dim: int, hidden_size: int, *, has_prefix: bool, has_vector: bool, num_empty_positions: int
    ):
        super().__init__()
        self.prefix_proj = TextProjection(text_dim, hidden_size) if has_prefix else None
        self.vector_proj = TextProjection(text_dim, hidden_size) if has_vector else None
        if not has_vector:
            self.constant_vector = nn.Parameter(torch.empty(1, hidden_size))
        if num_empty_positions:
            self.register_buffer("empty_embeds", torch.empty(num_empty_positions, text_dim))
        else:
            self.null_embed = nn.Parameter(torch.empty(text_dim))

    @property
    def null_embeds(self) -> Tensor | None:
        """The features (T_0, E) of the empty text; None where a learned row stands for no text."""
        return getattr(self, "empty_embeds", None)

    def forward(self, condition: TextCondition) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embed texts.

        Args:
            condition: of R texts.

        Returns:
            The vector (R, D); the prefix (R, T, D) or None; and which of its positions are seen, (R, T), None for all.
        """
        proj = self.prefix_proj or self.vector_proj
        embeds, is_seen = condition.text_embeds.to(proj.fc1.weight.dtype), condition.text_mask
        mask = None if condition.is_whole else is_seen
        if self.null_embeds is None:
            # One position says it, whatever the text: the last, which every text has.
            is_last = torch.arange(is_seen.shape[1], device=is_seen.device) == is_seen.shape[1] - 1
            mask = is_seen = torch.where(condition.is_null[:, None], is_last, is_seen)
            embeds = torch.where(condition.is_null[:, None, None], self.null_embed.to(embeds.dtype), embeds)
        prefix = None if self.prefix_proj is None else self.prefix_proj(embeds)
        if self.vector_proj is None:
            return self.constant_vector.expand(len(condition), -1), prefix, mask
        is_seen = is_seen[..., None]
        mean = embeds.masked_fill(~is_seen, 0).sum(1) / is_seen.sum(1)
        return self.vector_proj(mean), prefix, None if prefix is None else mask
