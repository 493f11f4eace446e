"""Codes without a table: every channel is bounded and rounded to one of a few levels, and the levels are the digits.

Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505, appendix A.1). Legend: B batch, N vectors, V codes,
C code channels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from nextblock.data.code_digits import MAX_FACTOR_CODES, CodeDigits

# By so much the outermost levels are not quite reached, as in the paper.
_MARGIN = 1e-3


class FSQCodebook(nn.Module):
    """A grid of levels; it satisfies `protocols.Codebook`.

    A channel of n levels holds the integers −⌊n/2⌋ … ⌈n/2⌉ − 1, divided by ⌊n/2⌋.

    Args:
        levels: of each of the C channels, at least 2; V is their product.
        digit_bases: how the channels' levels are joined to digits of an index; None makes each a digit of its own.

    Raises:
        ValueError: if the levels are none, or the bases are no products of neighbouring levels.
    """

    def __init__(self, levels: Sequence[int], *, digit_bases: Sequence[int] | None = None):
        super().__init__()
        self.levels = CodeDigits(tuple(levels))
        self.digits = self.levels if digit_bases is None else self.levels.grouped(self.levels.sizes_of(digit_bases))
        self.num_codes = self.levels.num_codes
        self.dim = self.levels.num_digits
        # It tells device and dtype.
        self.register_buffer("unit", torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what a checkpoint brings along."""
        init.ones_(self.unit)

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map (B, C, …) bounded to the range of the levels, channel by channel."""
        grid = _grid(self.levels.bases, features.dtype, features.device)
        steps, _, half, offset, shift = grid.view(len(grid), -1, *(1,) * (features.ndim - 2))
        return (torch.tanh(features + shift) * half - offset) / steps

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of each vector, (…, C) → (…) int64; halves go to the even neighbour, as `torch.round` does.

        Vectors beyond the outermost levels, such as residuals, take these.
        """
        steps, highest, *_ = _grid(self.levels.bases, vectors.dtype, vectors.device)
        with torch.no_grad():
            levels = torch.minimum((vectors * steps).round() + steps, highest).clamp_min(0)
            return self.levels.join(levels.long())

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of indices, (…) → (…, C)."""
        steps = self._steps(idx.device)
        return (self.levels.split(idx) - steps) / steps

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return shares of vectors (N, C) with their codes; see `protocols.FactorCodebook`."""
        sizes, steps, found = self.levels.sizes_within(MAX_FACTOR_CODES), self._steps(vectors.device), []
        shares = zip(vectors.split(sizes, dim=1), steps.split(sizes), self._bases(sizes), strict=True)
        for share, share_steps, bases in shares:
            levels = CodeDigits(bases)
            digits = levels.split(torch.arange(levels.num_codes, device=vectors.device))
            found.append((share, ((digits - share_steps) / share_steps).to(vectors.dtype)))
        return found

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the codebook term where the codec's weights learn from it; codes and features need none.

        Args:
            features: (B, C, h, w), prepared.
            quantized: (B, C, h, w), with gradient.
            is_composed: see `protocols.Codebook`.
        """
        return [F.mse_loss(quantized, features.detach())] if is_composed else []

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Take note of nothing: no code is learned."""

    def after_step(self, *keys: int) -> None:
        """Learn nothing."""

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Leave the codes as they are.

        Raises:
            ValueError: always, since they have no place to choose.
        """
        raise ValueError("levels start from no vectors; expected codebook_init 'uniform'")

    def _steps(self, device: torch.device) -> Tensor:
        """Return how many steps of each channel (C,) make 1."""
        return _grid(self.levels.bases, self.unit.dtype, device)[0]

    def _bases(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the levels of runs of so many channels."""
        ends = list(accumulate(sizes))
        return [self.levels.bases[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@lru_cache(maxsize=64)
def _grid(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return five rows (5, C): steps to 1, the highest level, half the range, the offset and its shift."""
    # Levels even in number have one more below zero than above; the shift keeps a feature of zero about zero.
    half = [(n - 1) * (1 - _MARGIN) / 2 for n in levels]
    offset = [0.5 if n % 2 == 0 else 0.0 for n in levels]
    shift = [math.tan(o / h) for o, h in zip(offset, half, strict=True)]
    rows = [[n // 2 for n in levels], [n - 1 for n in levels], half, offset, shift]
    # Kept: a copy from the host at every training step would wait for the device.
    return torch.tensor(rows, dtype=dtype).to(device)
