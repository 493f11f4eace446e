"""Exponential moving average of a model's weights and floating-point buffers (the codebook's among them)."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def build_weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """Make the average, which starts as a copy of the model at its first update.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training does not drag its initial weights
    along.

    Args:
        model: an unwrapped model.
        decay: weight of the old average in the long run, in (0, 1).

    Returns:
        The average; `update_parameters(model)` moves it, `module` is a model like the one given, in evaluation mode.

    Raises:
        ValueError: if the model holds integer buffers, which have no average.
    """
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            raise ValueError(f"buffer {name} is {buffer.dtype}; expected floating point to average")

    @torch.no_grad()
    def move(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        # Not the copy given, which lies on the device: reading it would wait for the device.
        n = int(average.n_averaged)
        lerp_where(averaged, current, 1 - min(decay, (1 + n) / (10 + n)), average.is_good)

    average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
    average.is_good = None
    average.module.requires_grad_(False)
    return average.eval()


def update_weight_average(average: AveragedModel, model: nn.Module, is_good: Tensor) -> None:
    """Move the average towards the model, unless the step just taken was bad.

    Args:
        average: from `build_weight_average`.
        model: unwrapped.
        is_good: scalar bool; on a CPU it is looked at, elsewhere the device decides and the host does not wait.
    """
    if is_good.device.type == "cpu":
        if is_good:
            average.update_parameters(model)
        return
    average.is_good = is_good
    average.update_parameters(model)
    average.is_good = None


def lerp_where(averaged: list[Tensor], current: list[Tensor], weight: float, is_good: Tensor | None) -> None:
    """Move tensors towards others in place; where `is_good` is a false scalar on the device, not at all."""
    if is_good is None:
        torch._foreach_lerp_(averaged, current, weight)
        return
    for tensor, other in zip(averaged, current, strict=True):
        tensor.lerp_(other, (weight * is_good).to(tensor.dtype))
