"""Exponential moving average of a model's weights and floating-point buffers (the codebook's among them)."""

import copy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn


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
        weight = weight if is_looked_at else weight * is_good
        for averaged, current in zip(_tensors(self.module), _tensors(model), strict=True):
            if n == 0 or not averaged.is_floating_point():
                averaged.copy_(current)
            else:
                averaged.lerp_(current, weight if is_looked_at else weight.to(averaged.dtype))
        self.num_updates += 1

    def state_dict(self) -> dict:
        """Return what `load_state_dict` takes: the number of updates and the averaged model's tensors."""
        return {"num_updates": self.num_updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from where another average of the same kind of model was.

        Args:
            state: from `state_dict`.
        """
        self.num_updates = state["num_updates"]
        self.module.load_state_dict(state["module"])


def saved_average(checkpoint: Path) -> dict[str, Tensor] | None:
    """Return the averaged model's tensors from a checkpoint; None if its training has no average.

    Args:
        checkpoint: folder that accelerate saved a training in.
    """
    # Objects registered for checkpointing are numbered; a discriminator's records may be another one.
    for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.keys() == {"num_updates", "module"}:
            return state["module"]
    return None


def _tensors(model: nn.Module) -> chain[Tensor]:
    """Iterate over parameters and buffers, those that no checkpoint keeps too."""
    return chain(model.parameters(), model.buffers())
