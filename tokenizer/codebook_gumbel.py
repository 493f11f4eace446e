"""Codes chosen by a projection of the features, not by nearness, and looked up in a table of their own.

Gumbel VQGAN (Esser et al. 2021, arXiv:2012.09841), after Jang et al. 2017, arXiv:1611.01144, without its noise.
Legend: B batch, N vectors, V codes, C code channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .code_search import as_distances, most_aligned_codes

# Weight of the choice's divergence from the even one, as in taming's class.
_KL_WEIGHT = 5e-4
# One chunk of the N×V matrix of probabilities in bytes.
_CHUNK_BYTES = 1 << 24


class GumbelCodebook(nn.Module):
    """A table of V codes and a 1×1 convolution that scores them; it satisfies `protocols.TableCodebook`.

    The code of the largest score is taken; its gradient is that of the mean code under a softmax of the scores.

    Args:
        num_codes: V.
        dim: C.
    """

    gradient = "softmax"

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(num_codes, dim, dtype=torch.float32))
        self.proj = nn.Conv2d(dim, num_codes, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes from a normal distribution; the projection draws its own."""
        init.normal_(self.weight)

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors, as `lookup` gives them."""
        return self.weight

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map as it is."""
        return features

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of the largest score of each vector, (…, C) → (…) int64."""
        with torch.no_grad():
            scores, bias = (tensor.to(vectors.dtype) for tensor in self._scored_by())
            return most_aligned_codes(vectors.flatten(0, -2), scores, bias).view(vectors.shape[:-1])

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of the indices, (…) → (…, C)."""
        return F.embedding(idx, self.weight)

    def compared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (N, C + 1) and what they are compared with (V, C + 1), with gradient."""
        scores, bias = (tensor.to(vectors.dtype) for tensor in self._scored_by())
        return as_distances(vectors, scores, bias)

    def expected(self, vectors: Tensor) -> Tensor:
        """Return the mean code of each vector, (…, C) → (…, C), whose probabilities alone have a gradient."""
        codes = self.weight.detach().to(vectors.dtype)
        means = self._by_chunks(vectors, lambda scores: scores.softmax(1) @ codes)
        return torch.cat(means).view(vectors.shape)

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the mean divergence of the choice from the even one.

        Args:
            features: (B, C, h, w), prepared.
            quantized: (B, C, h, w), with gradient.
            is_composed: see `protocols.Codebook`.
        """
        vectors = features.flatten(2).transpose(1, 2)
        sums = self._by_chunks(vectors, lambda scores: _divergence(scores.log_softmax(1)))
        return [_KL_WEIGHT * torch.stack(sums).sum() / vectors[..., 0].numel()]

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Take note of nothing: table and projection learn by gradient."""

    def after_step(self, *keys: int) -> None:
        """Learn nothing besides."""

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Leave the codes as they are.

        Raises:
            ValueError: always, since no code lies where the features are.
        """
        raise ValueError("codes of a projection start from no vectors; expected codebook_init 'uniform'")

    def _scored_by(self) -> tuple[Tensor, Tensor]:
        """Return the projection's weight (V, C) and bias (V,)."""
        return self.proj.weight.flatten(1), self.proj.bias

    def _by_chunks(self, vectors: Tensor, function) -> list[Tensor]:
        """Call a function with the scores (n, V) of parts of the vectors, which the backward pass computes again."""
        weight, bias = (tensor.to(vectors.dtype) for tensor in self._scored_by())
        rows = max(1, _CHUNK_BYTES // (self.num_codes * vectors.element_size()))

        def scored(chunk: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return function(F.linear(chunk, weight, bias))

        options = {"use_reentrant": False, "preserve_rng_state": False}
        return [checkpoint(scored, chunk, weight, bias, **options) for chunk in vectors.flatten(0, -2).split(rows)]


def _divergence(log_p: Tensor) -> Tensor:
    """Return the sum over rows (n, V) of their divergence from the even distribution."""
    return (log_p.exp() * (log_p + math.log(log_p.shape[1]))).sum()
