"""A table that is never trained, before which one linear map is learned, so that no code can fall behind.

SimVQ (Zhu et al. 2024, arXiv:2411.02038). Legend: B batch, V codes, C code channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .code_search import nearest_codes
from .gradients import codebook_terms, expected_codes


class SimVQCodebook(nn.Module):
    """V fixed vectors under a learned linear map; it satisfies `protocols.TableCodebook`.

    Args:
        num_codes: V.
        dim: C.
        beta: weight of the commitment loss.
        epsilon: smallest norm that is divided by.
        gradient: how the quantized map passes its gradient on, "straight_through", "rotation" or "index".
    """

    def __init__(
        self, num_codes: int, dim: int, *, beta: float = 0.25, epsilon: float = 1e-5, gradient: str = "straight_through"
    ):
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.beta = beta
        self.epsilon = epsilon
        self.gradient = gradient
        self.register_buffer("weight", torch.empty(num_codes, dim, dtype=torch.float32))
        # Its rows are what the channels of a fixed vector count in a code's.
        self.map = nn.Parameter(torch.empty(dim, dim, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fixed vectors of about unit norm, and the map as the paper's code does, as any linear layer."""
        bound = self.dim**-0.5
        init.normal_(self.weight, std=bound)
        init.uniform_(self.map, -bound, bound)

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors, as `lookup` gives them."""
        return self.weight @ self.map

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map as it is."""
        return features

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest code of each vector, (…, C) → (…) int64."""
        with torch.no_grad():
            return nearest_codes(vectors.flatten(0, -2), self.get_codebook().to(vectors.dtype)).view(vectors.shape[:-1])

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of the indices, (…) → (…, C)."""
        # Of the whole table: a product of the chosen rows would round by how many they are.
        return F.embedding(idx, self.get_codebook())

    def compared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (N, C) and all codes (V, C) as the search compares them, with gradient."""
        return vectors, self.get_codebook().to(vectors.dtype)

    def expected(self, vectors: Tensor) -> Tensor:
        """Return the mean code of each vector, (…, C) → (…, C), for the gradient "index"."""
        return expected_codes(vectors, self.get_codebook().to(vectors.dtype))

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the commitment term, then the codebook term.

        Args:
            features: (B, C, h, w), prepared.
            quantized: (B, C, h, w), with gradient.
            is_composed: see `protocols.Codebook`.
        """
        return codebook_terms(features, quantized, self.beta, self.gradient)

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Take note of nothing: the map learns by gradient."""

    def after_step(self, *keys: int) -> None:
        """Learn nothing besides."""

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Leave the codes as they are.

        Raises:
            ValueError: always, since the table is fixed.
        """
        raise ValueError("a fixed table starts from no vectors; expected codebook_init 'uniform'")
