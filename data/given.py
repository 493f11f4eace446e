"""Refuses what is not of the kind that is needed where it is given: no tensor, or without what will be asked of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What models compute in; torch's narrower types store numbers and compute little."""


def check_tensor(name: str, value: Any, expected: str) -> None:
    """Refuse what is no dense tensor.

    Args:
        name: of the argument.
        value: that was given for it.
        expected: what it should have been, in words.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {_kind(value)}; expected {expected}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} is a tensor of layout {value.layout}; expected {expected}, dense")


def check_offers(name: str, value: Any, parts: Sequence[str], expected: str) -> None:
    """Refuse an object that lacks attributes or methods, and a class in an object's place.

    Args:
        name: of the argument.
        value: that was given for it.
        parts: attributes that it must have.
        expected: what it should have been, in words.

    Raises:
        ValueError: naming the argument, what it is, what it lacks and what was expected.
    """
    if isinstance(value, type):
        raise ValueError(f"{name} is the class {value.__name__}; expected {expected}")
    missing = [part for part in parts if not hasattr(value, part)]
    if missing:
        raise ValueError(f"{name} is {_kind(value)} without {', '.join(missing)}; expected {expected}")


def _kind(value: Any) -> str:
    """Say what kind of thing something is."""
    return "None" if value is None else f"a {type(value).__name__}"
