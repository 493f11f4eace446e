"""Codes as digits: an index of a product codebook is a number whose digits are the indices of its factors.

The first digit counts ones: idx = Σ d_i · Π_{j<i} b_j, so of bits the first is the lowest. Legend: n digits, b_i base
of digit i, V = Π b_i codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor

# What token shards hold: indices in uint32.
MAX_CODES = 1 << 32
# Codes of channels that are compared with features all at once; more channels are taken in turn.
MAX_FACTOR_CODES = 1 << 10


@dataclass(frozen=True)
class CodeDigits:
    """The digits of a codebook's indices.

    Args:
        bases: n whole numbers b_i of at least 2, the first that of the lowest digit.

    Raises:
        ValueError: if a base is none, or there are no bases or more than 2^32 codes.
    """

    bases: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "bases", tuple(self.bases))
        if not self.bases or not all(type(base) is int and base >= 2 for base in self.bases):
            raise ValueError(f"bases is {self.bases!r:.80}; expected one or more whole numbers of at least 2")
        if self.num_codes > MAX_CODES:
            raise ValueError(f"bases is {self.bases!r:.80}, {self.num_codes} codes; expected at most {MAX_CODES}")

    @property
    def num_digits(self) -> int:
        """n."""
        return len(self.bases)

    @property
    def num_codes(self) -> int:
        """V, the product of the bases."""
        return prod(self.bases)

    def split(self, idx: Tensor) -> Tensor:
        """Return the digits of indices.

        Args:
            idx: (…) int64 in [0, V).

        Returns:
            (…, n) int64, digit i in [0, b_i).
        """
        bases, values = _place_values(self.bases, idx.device)
        return torch.div(idx[..., None], values, rounding_mode="floor") % bases

    def join(self, digits: Tensor) -> Tensor:
        """Return the indices of digits (…, n) int64, (…) int64."""
        _, values = _place_values(self.bases, digits.device)
        return (digits * values).sum(-1)

    def grouped(self, sizes: tuple[int, ...]) -> "CodeDigits":
        """Return the digits that runs of neighbouring ones make together; indices stay what they are.

        Args:
            sizes: how many digits each run has, from the first on; all digits belong to one.

        Raises:
            ValueError: if they are no counts that add up to n.
        """
        if not all(type(size) is int and size >= 1 for size in sizes) or sum(sizes) != self.num_digits:
            raise ValueError(f"sizes is {sizes!r:.80}; expected counts of digits that add up to {self.num_digits}")
        ends = list(accumulate(sizes))
        return CodeDigits(tuple(prod(self.bases[end - size : end]) for size, end in zip(sizes, ends, strict=True)))

    def sizes_of(self, bases: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes by which `grouped` makes digits of given bases.

        Args:
            bases: of the larger digits; each is the product of one or more neighbouring bases, in their order.

        Raises:
            ValueError: if the bases are not made so.
        """
        ends = {place: end for end, place in enumerate(accumulate(self.bases, mul), start=1)}
        places = list(accumulate(CodeDigits(bases).bases, mul))
        if any(place not in ends for place in places) or places[-1] != self.num_codes:
            raise ValueError(
                f"bases is {list(bases)!r:.80}; expected products of neighbours among {list(self.bases)!r:.80}, "
                f"{self.num_codes} codes in all"
            )
        stops = [ends[place] for place in places]
        return tuple(end - start for start, end in zip([0, *stops[:-1]], stops, strict=True))

    def sizes_within(self, num_codes: int) -> tuple[int, ...]:
        """Return sizes by which `grouped` makes as few digits as can be of at most so many values each.

        Args:
            num_codes: of a digit, unless a single one already has more.
        """
        sizes, together = [], num_codes + 1
        for base in self.bases:
            together *= base
            if together > num_codes:
                sizes.append(0)
                together = base
            sizes[-1] += 1
        return tuple(sizes)


@lru_cache(maxsize=64)
def _place_values(bases: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the bases and what a one at each digit is worth, two tensors (n,) int64."""
    # Kept: a copy from the host at every training step would wait for the device.
    values = list(accumulate((1, *bases[:-1]), mul))
    with torch.inference_mode(False):
        return torch.tensor(bases).to(device), torch.tensor(values).to(device)
