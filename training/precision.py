"""Which arithmetic runs in which precision, decided here alone; docs/architecture.md, "Precision", states the policy.

TF32 rounds the operands of float32 products to ten bits, on CUDA alone. torch allows it to convolutions unless told.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


def set_tf32(is_allowed: bool) -> None:
    """Allow TF32 to convolutions and matrix products alike, or to neither.

    Args:
        is_allowed: whether they may.
    """
    # The older of torch's two names for it: reading it after the newer one was set raises, the reverse does not.
    torch.backends.cudnn.allow_tf32 = is_allowed
    torch.backends.cuda.matmul.allow_tf32 = is_allowed


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Compute float32 convolutions and products on a device in float32 for a while, whatever the run allows.

    Args:
        device: nothing happens on any but CUDA.
    """
    is_cuda = device.type == "cuda"
    has_convolutions = is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"
    has_products = is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if has_convolutions:
        torch.backends.cudnn.allow_tf32 = False
    if has_products:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        if has_convolutions:
            torch.backends.cudnn.allow_tf32 = True
        if has_products:
            torch.backends.cuda.matmul.allow_tf32 = True


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """Leave autocast for a while, where a device has such a thing."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Leave autocast and TF32 for a while: what is float32 is then computed so."""
    with outside_autocast(device), without_tf32(device):
        yield


def in_run_precision(tensor: Tensor) -> Tensor:
    """Cast what autocast would cast for a matrix product, for code that autocast does not reach.

    Args:
        tensor: floating point; float64 stays, as it does under autocast.

    Returns:
        The tensor in autocast's type where that is on, else as it is.
    """
    kind = tensor.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return tensor.to(torch.get_autocast_dtype(kind)) if is_on and tensor.dtype != torch.float64 else tensor


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


def is_plain_on_cpu(tensor: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Tell whether a CPU's own ways of computing may be taken.

    Args:
        tensor: an operand.
        weight: the other.
        dtypes: the types that there are such ways for.

    Returns:
        Whether both are of one of these types on a CPU, neither cast by autocast, and the weight of no subclass.
    """
    return (
        tensor.dtype == weight.dtype
        and weight.dtype in dtypes
        and tensor.is_cpu
        and weight.is_cpu
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def moved_unhalved(fn, tensor: Tensor) -> Tensor:
    """Apply a module's cast or move, except that a tensor cast to a half type only follows to the new device.

    Args:
        fn: what `nn.Module._apply` applies to every tensor.
        tensor: one of the module's tensors.
    """
    moved = fn(tensor)
    return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved
