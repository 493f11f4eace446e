"""Jobs that SIGTERM and SIGINT stop at once and cleanly: what is whole stays, and the same command goes on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from accelerate import PartialState

from nextblock.data.workers import STOP_SIGNALS
from nextblock.training.peers import PeerWatch, Stopped


@dataclass
class Job:
    """What there is to say about a job that is stopped."""

    done: Callable[[], str] = lambda: "nothing is written yet"
    """What is done so far, in words."""


@contextmanager
def stoppable_job(state: PartialState) -> Iterator[Job]:
    """Run a job on all processes, until it is done, one of them is signalled, or one of them has died.

    Args:
        state: every process must enter the context.

    Returns:
        The job, which is to be told how to describe what is done; the context ends at once when a signal comes.
    """
    job = Job()
    try:
        with _raising_stopped(), PeerWatch(state):
            yield job
    except Stopped as stopped:
        if state.is_main_process:
            print(f"stopped by {stopped.signal.name}: {job.done()}; the same command goes on from there", flush=True)


@contextmanager
def _raising_stopped() -> Iterator[None]:
    """Raise `Stopped` at the first signal and ignore further ones: launchers pass on what the terminal sent already.

    Outside a program's main thread, where Python admits no handlers, signals do what they always do.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS} if is_main_thread else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None stands for a handler that Python did not install and cannot bring back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
