"""Random numbers as a pure function of integer keys: equal on every device, process count and batch split.

The mixer is splitmix64 (Steele, Lea and Flood 2014), on wrapping int64 arithmetic.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's `>>` copies the sign bit of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble the bits of an int64 tensor (splitmix64's finalizer)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_uniform(*keys: int, samples: Tensor) -> Tensor:
    """Draw one uniform number per sample, a function of the keys and the sample's own number alone.

    Args:
        keys: integers such as (seed, step).
        samples: (N,) int64 numbers that tell the samples apart.

    Returns:
        (N,) float64 in [0, 1).
    """
    state = torch.zeros_like(samples, dtype=torch.int64)
    for key in keys:
        state = _mix(state + _GOLDEN + key)
    state = _mix(state + _GOLDEN + samples)
    return _shift_right(state, 11).double() * 2.0**-53


def keyed_order(*keys: int, num_items: int) -> Tensor:
    """Put items into a random order, a function of the keys and of how many there are alone.

    Args:
        keys: integers.
        num_items: N.

    Returns:
        (N,) int64, a permutation of 0 … N - 1.
    """
    return torch.argsort(keyed_uniform(*keys, samples=torch.arange(num_items)), stable=True)
