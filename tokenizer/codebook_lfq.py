"""Codes without a table: the signs of a vector's channels are the bits of its index, channel 0 the lowest.

LFQ, MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737), in Open-MAGVIT2's order of bits; BSQ (Zhao et al. 2024,
arXiv:2406.07548) puts features and codes on the unit sphere. Legend: B batch, V = 2^C codes, C code channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from nextblock.data.code_digits import MAX_FACTOR_CODES, CodeDigits


class SignCodebook(nn.Module):
    """The corners of a cube around zero; it satisfies `protocols.Codebook`.

    Args:
        dim: C, which makes 2^C codes.
        is_spherical: False (LFQ) takes features as they are and codes of ±1; True (BSQ) L2-normalises features and
            takes codes of ±1/√C.
        beta: weight of the commitment loss.
        epsilon: smallest norm that is divided by.
        digit_bases: how the bits are joined to digits of an index; None makes each a digit of its own.

    Raises:
        ValueError: if the bases are not powers of two whose product is 2^C.
    """

    def __init__(
        self,
        dim: int,
        *,
        is_spherical: bool = False,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        digit_bases: Sequence[int] | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.is_spherical = is_spherical
        self.beta = beta
        self.epsilon = epsilon
        self.bits = CodeDigits((2,) * dim)
        self.digits = self.bits if digit_bases is None else self.bits.grouped(self.bits.sizes_of(digit_bases))
        self.num_codes = self.bits.num_codes
        # What a code's channels are multiplied by: it tells device and dtype.
        self.register_buffer("unit", torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what a checkpoint brings along."""
        init.ones_(self.unit)

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map (B, C, …), L2-normalised where codes are."""
        return F.normalize(features, dim=1, eps=self.epsilon) if self.is_spherical else features

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of each vector, (…, C) → (…) int64: a bit is 1 where its channel is above 0."""
        return self.bits.join(vectors > 0)

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of indices, (…) → (…, C)."""
        return self._signed(self.bits.split(idx))

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return shares of vectors (N, C) with their codes; see `protocols.FactorCodebook`."""
        sizes = self.bits.sizes_within(MAX_FACTOR_CODES)
        corners = {size: self._corners(size).to(vectors.dtype) for size in set(sizes)}
        return [(share, corners[size]) for share, size in zip(vectors.split(sizes, dim=1), sizes, strict=True)]

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the commitment term, then the codebook term where the codec's weights learn from it.

        Args:
            features: (B, C, h, w), prepared.
            quantized: (B, C, h, w), with gradient.
            is_composed: see `protocols.Codebook`.
        """
        terms = [self.beta * F.mse_loss(features, quantized.detach())]
        if is_composed:
            terms.append(F.mse_loss(quantized, features.detach()))
        return terms

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Take note of nothing: no code is learned."""

    def after_step(self, *keys: int) -> None:
        """Learn nothing."""

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Leave the codes as they are.

        Raises:
            ValueError: always, since they have no place to choose.
        """
        raise ValueError("codes of signs start from no vectors; expected codebook_init 'uniform'")

    def _signed(self, bits: Tensor) -> Tensor:
        """Return what bits 0 and 1 are as a code's channels."""
        side = self.dim**-0.5 if self.is_spherical else 1.0
        return (2 * bits - 1) * (side * self.unit)

    def _corners(self, num_channels: int) -> Tensor:
        """Return all codes (2^C', C') of so many channels."""
        bits = CodeDigits((2,) * num_channels)
        return self._signed(bits.split(torch.arange(bits.num_codes, device=self.unit.device)))
