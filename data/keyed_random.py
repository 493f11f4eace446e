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


def drop_class_labels(class_labels: Tensor, null_class: int, rate: float, *keys: int, samples: Tensor) -> Tensor:
    """Replace a share of the labels by the null class, which trains the unconditional half of guidance.

    Args:
        class_labels: (B,) int64.
        null_class: the label that stands for "no class".
        rate: share of labels dropped, in [0, 1].
        keys: integers such as (seed, step).
        samples: (B,) int64, the samples' numbers in the data set.

    Returns:
        (B,) int64 labels.
    """
    is_dropped = keyed_uniform(*keys, samples=samples) < rate
    return torch.where(is_dropped.to(class_labels.device), null_class, class_labels)
