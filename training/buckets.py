"""One layout of gradient buckets from the first step on: a resumed training sums in the order of one never stopped.

DDP sums gradients in flat buckets, which it lays out anew after its first backward pass, and where a gradient lies in
its bucket decides in which order the processes' shares are added. Two numbers have one sum in either order; three have
several.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class _SumOfParameters(nn.Module):
    """Stands in for a model, whose buffers DDP looks for, and touches its trained parameters in their order."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        # A chain, so that the backward pass meets the last parameter first, as that of the model by and large does.
        total = torch.zeros(())
        for parameter in _trained_parameters(self.model):
            total = total.to(parameter.device) + parameter.sum(dtype=torch.float32)
        return total * 0


def _trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have gradients, in the order in which the model declares them."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def settle_gradient_buckets(modules: Sequence[nn.Module]) -> None:
    """Have DDP lay out its buckets now, by the model alone; every process must call it before its first backward pass.

    A pass of zero gradients runs through DDP without the model: no weight, buffer or random number changes. It costs
    one sum of all gradients, once a start.

    Args:
        modules: prepared models; those that DDP does not wrap are left alone.
    """
    for module in modules:
        if not isinstance(module, DistributedDataParallel):
            continue
        model = module.module
        module.module = _SumOfParameters(model)
        try:
            module().backward()
        finally:
            module.module = model
        for parameter in _trained_parameters(model):
            parameter.grad = None
