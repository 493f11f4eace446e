"""Refuses values that are NaN or infinite where they would become data: an index, a token, a picture."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def extremes(tensor: Tensor) -> Tensor:
    """Return a tensor's least and greatest value (2,), which are finite where all of it is; no device is waited for."""
    # A fraction of the time that isfinite takes.
    return torch.stack(torch.aminmax(tensor.detach())) if tensor.numel() else tensor.new_zeros(2)


def check_finite(stage: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that are NaN or infinite; waits for the tensors' device.

    Args:
        stage: what they are about to be used for.
        tensors: floating-point ones by name, on one device.

    Raises:
        ValueError: naming the stage, the first tensor with such values, and how many it has.
    """
    if all_finite(extremes(tensor) for tensor in tensors.values()):
        return
    for name, tensor in tensors.items():
        num_bad = tensor.numel() - int(tensor.isfinite().sum())
        if num_bad:
            raise ValueError(
                f"{stage}: {name} has {num_bad} of {tensor.numel()} values NaN or infinite; expected finite ones"
            )


def all_finite(found: Iterable[Tensor]) -> bool:
    """Tell whether `extremes` of several tensors on one device are all finite; waits for it, once."""
    are_finite = [pair.isfinite() for pair in found]
    return not are_finite or bool(torch.stack(are_finite).all())
