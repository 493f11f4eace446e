"""Exponential moving average of a model's weights and floating-point buffers (the codebook's among them)."""

import copy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from nextblock.files.state_dicts import read_state_dict

AVERAGE_NAME = "average"
_COUNT, _PREFIX = "num_updates", "module."


class WeightAverage:
    """A moving average of a model, which starts as a copy of the model at its first update.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training does not drag its initial weights
    along. Buffers of integers and bools (counters, masks) have no average and are copied.

    Args:
        model: an unwrapped model.
        decay: weight of the old average in the long run, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        """A model like the one given, in evaluation mode, without gradients."""
        self.num_updates = 0
        """Updates so far; skipped ones count where the device alone knows of them."""
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, is_good: Tensor) -> None:
        """Move towards the model, unless the step just taken was bad and so left the model as it was.

        Args:
            model: the one that the average was made of.
            is_good: scalar bool; on a CPU it is looked at, elsewhere the device decides and the host does not wait.
        """
        is_looked_at = is_good.device.type == "cpu"
        if is_looked_at and not is_good:
            return
        n = self.num_updates
        weight = 1 - min(self._decay, (1 + n) / (10 + n))
        averaged, current = list(_tensors(self.module)), list(_tensors(model))
        is_copied = [n == 0 or not tensor.is_floating_point() for tensor in averaged]
        pairs = list(zip(averaged, current, is_copied, strict=True))
        copied = [(old, new) for old, new, is_copy in pairs if is_copy]
        moved = [(old, new) for old, new, is_copy in pairs if not is_copy]
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))
        if moved and is_looked_at:
            torch._foreach_lerp_(*map(list, zip(*moved, strict=True)), weight)
        elif moved:
            # No operation of many tensors interpolates by a number that the device alone knows.
            old, new = map(list, zip(*moved, strict=True))
            steps = torch._foreach_sub(new, old)
            torch._foreach_mul_(steps, weight * is_good)
            torch._foreach_add_(old, steps)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return what `load_state_dict` takes: the number of updates and the averaged model's tensors."""
        tensors = {_PREFIX + name: tensor for name, tensor in self.module.state_dict().items()}
        return {_COUNT: torch.tensor(self.num_updates)} | tensors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where another average of the same kind of model was.

        Args:
            state: from `state_dict`.
        """
        self.num_updates = int(state[_COUNT])
        self.module.load_state_dict(_of_module(state))


def saved_average(checkpoint: Path) -> dict[str, Tensor] | None:
    """Return the averaged model's tensors from a checkpoint; None if its training has no average.

    Args:
        checkpoint: folder that a training was saved in.
    """
    path = checkpoint / f"{AVERAGE_NAME}.safetensors"
    return _of_module(read_state_dict(path)) if path.is_file() else None


def _of_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a saved average's tensors by the model's own names."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name != _COUNT}


def _tensors(model: nn.Module) -> chain[Tensor]:
    """Iterate over parameters and buffers, those that no checkpoint keeps too."""
    return chain(model.parameters(), model.buffers())
