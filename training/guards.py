"""Guard against a loss or gradient that is not finite: such steps change nothing, many in a row end the training."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .checkpoint import saved_steps
from .sharding import local_part, whole_tensor


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class StepGuard:
    """Make steps with a non-finite loss or gradient leave no trace, without waiting for a GPU.

    An optimizer with non-finite gradients takes no step; buffers, and parameters beside buffers (a codebook and its
    counts), return to what they were. Under fp16, whose scaler skips steps as a matter of course, gradients are the
    scaler's, and the loss alone is guarded. Use it as a context, in which optimizers carry its hook.

    Args:
        accelerator: knows the device, the other processes, and whether a scaler guards the gradients.
        modules: all that are trained, prepared by the accelerator.
        optimizers: theirs, prepared too.
        max_steps: non-finite steps in a row that end the training.
        first_step: steps already taken.
        checkpoints: folder of the checkpoints, the newest of which the error names.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Sequence[nn.Module],
        optimizers: Sequence[AcceleratedOptimizer],
        *,
        max_steps: int,
        first_step: int,
        checkpoints: Path,
    ):
        self._max_steps = max_steps
        self._checkpoints = checkpoints
        self._device = accelerator.device
        # Looking costs a GPU a wait, so there `check` alone looks.
        self._looks_every_step = self._device.type == "cpu"
        self._is_alone = accelerator.num_processes == 1
        self._num_done = first_step
        unwrapped = [accelerator.unwrap_model(module) for module in modules]
        self._modules = [part for module in unwrapped for part in module.modules()]
        has_scaler = accelerator.scaler is not None
        self._optimizers = [] if has_scaler else [prepared.optimizer for prepared in optimizers]
        self._handles: list = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._has_bad_gradient = self._flag(False)
        self._num_bad, self._streak, self._longest = (self._flag(False).long() for _ in range(3))

    def __enter__(self) -> "StepGuard":
        self._handles = [optimizer.register_step_pre_hook(self._look_at_gradients) for optimizer in self._optimizers]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _flag(self, value: bool) -> Tensor:
        return torch.full((), value, dtype=torch.bool, device=self._device)

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember what a step may change without an optimizer."""
        tensors = []
        for module in self._modules:
            buffers = list(module.buffers(recurse=False))
            tensors += buffers + (list(module.parameters(recurse=False)) if buffers else [])
        self._before = [(tensor, local_part(tensor).clone()) for tensor in tensors]
        self._has_bad_gradient = self._flag(False)

    @torch.no_grad()
    def _look_at_gradients(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Keep an optimizer from stepping on gradients that are not finite, just before it would."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        is_bad = ~whole_tensor(norm).isfinite()
        self._has_bad_gradient = self._has_bad_gradient | is_bad
        if optimizer.defaults.get("fused"):
            # Fused optimizers skip a step on the device when a gradient scaler says so; here the guard says so.
            optimizer.found_inf = is_bad.float()
        elif is_bad:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, metrics: dict[str, Tensor | float]) -> Tensor:
        """Undo what a bad step did; on a CPU also do what `check` does.

        Args:
            metrics: of this process; "loss", and "grad_norm" if there is one, are looked at.

        Returns:
            Whether the step was good, a scalar bool tensor on the device, equal on every process.

        Raises:
            NonFiniteError: on a CPU, if too many steps in a row were bad.
        """
        self._num_done += 1
        is_bad = self._has_bad_gradient
        for name in ["loss", "grad_norm"] if self._optimizers else ["loss"]:
            value = metrics.get(name)
            if isinstance(value, Tensor):
                is_bad = is_bad | ~whole_tensor(value).isfinite().to(self._device)
        if not self._is_alone:
            flag = is_bad.int()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            is_bad = flag.bool()
        if self._looks_every_step and not is_bad:
            self._streak.zero_()
            return ~is_bad
        for tensor, before in self._before:
            local_part(tensor).copy_(torch.where(is_bad, before, local_part(tensor)))
        self._num_bad += is_bad
        self._streak = (self._streak + 1) * is_bad
        self._longest = torch.maximum(self._longest, self._streak)
        if self._looks_every_step:
            self._refuse_long_streaks()
        return ~is_bad

    def check(self) -> str | None:
        """Look at the steps since the last call, which waits for the device.

        Returns:
            A warning if some were bad.

        Raises:
            NonFiniteError: if too many in a row were.
        """
        num_bad = int(self._num_bad)
        self._refuse_long_streaks()
        self._num_bad.zero_()
        if num_bad == 0:
            return None
        return (
            f"{num_bad} step(s) up to step {self._num_done} had a loss or gradient that is not finite and were "
            f"skipped; the training stops at {self._max_steps} in a row (loop.max_nonfinite_steps)"
        )

    def _refuse_long_streaks(self) -> None:
        if int(self._longest) < self._max_steps:
            return
        saved = saved_steps(self._checkpoints)
        raise NonFiniteError(
            f"step {self._num_done}: loss or gradient was not finite in {int(self._longest)} steps in a row, which "
            f"were skipped; last good checkpoint: {saved[-1] if saved else 'none yet'}. Lower optimizer.learning_rate, "
            "lengthen optimizer.warmup_steps, train with loop.mixed_precision no, or look at the data of these steps"
        )
