"""Arithmetic that stays in float32 (or float64) whatever the rest of a model runs in."""

import torch
from torch import Tensor


def full_precision(tensor: Tensor, *others: Tensor) -> Tensor:
    """Upcast half types to float32, and anything to float64 where an operand already is.

    Args:
        tensor: floating point, any shape.
        others: tensors whose precision the result must not fall under.

    Returns:
        The tensor in float32 or float64.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return tensor.to(dtype)


def moved_unhalved(fn, tensor: Tensor) -> Tensor:
    """Apply a module's cast or move, except that a tensor cast to a half type only follows to the new device.

    Args:
        fn: what `nn.Module._apply` applies to every tensor.
        tensor: one of the module's tensors.
    """
    moved = fn(tensor)
    return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved
