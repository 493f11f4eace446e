"""Stopping when asked: SIGTERM or SIGINT at any process makes all processes stop after the same step."""

import signal
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from nextblock.data.workers import STOP_SIGNALS


class StopRequest:
    """Remember a signal instead of dying of it, and agree with the other processes on the step to stop after.

    Use it as a context; the handlers from before come back at its end. Outside a program's main thread, where Python
    admits no handlers, signals do what they always do.

    Args:
        accelerator: knows the device and the other processes.
    """

    def __init__(self, accelerator: Accelerator):
        self._device = accelerator.device
        self._is_alone = accelerator.num_processes == 1
        # A GPU's answer is read a step later, when it has long been there: waiting for it would leave the GPU idle.
        self._is_lagged = self._device.type != "cpu"
        self._signal_number = 0
        self._read_last: Callable[[], int] | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that Python did not install and cannot bring back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: object) -> None:
        """Be the signal handler. A second signal changes nothing: launchers pass on what the terminal sent already."""
        self._signal_number = number

    def agreed(self) -> signal.Signals | None:
        """Return the signal to stop for, None to go on; the same on every process, and every process must call it."""
        number = self._signal_number if self._is_alone else self._highest_anywhere()
        return signal.Signals(number) if number else None

    def _highest_anywhere(self) -> int:
        """Return the highest signal number noted by any process, on a GPU as it was one call ago."""
        # Filled, not copied from a number of the host's, which would wait for the device.
        highest = torch.full((), self._signal_number, dtype=torch.int32, device=self._device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        if not self._is_lagged:
            return int(highest)
        read_last, self._read_last = self._read_last, read_later(highest)
        return 0 if read_last is None else read_last()


def read_later(value: Tensor) -> Callable[[], int]:
    """Start copying an integer to the host; what comes back waits for that copy alone and returns it."""
    if value.device.type == "cpu":
        return value.clone().item
    on_host = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    copied = torch.Event(device=value.device.type)
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(on_host)

    return read
