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
        n = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
    average.module.requires_grad_(False)
    return average.eval()
