"""Data-loading workers that live on when a whole process group is signalled, and never longer than who loads."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

# Each is a whole python; a number typed wrong must not fill the machine with them.
MAX_WORKERS = 256
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Name and value of Linux's sys/prctl.h.
_PR_SET_PDEATHSIG = 1


def start_worker(worker_id: int) -> None:
    """Be a loader's `worker_init_fn`: ignore signals to the group, for the step at hand still needs its samples.

    Args:
        worker_id: number of the worker.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # A worker that outlives its process holds the process's connections open, and other processes wait at them.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The process may have ended before that, and then no signal comes.
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """Iterate over a loader in a context, at whose end its workers are gone, whatever ends it.

    Args:
        loader: whose `worker_init_fn` is `start_worker`; without workers it is merely iterated.
    """
    # A signal that comes before a worker ignores it must wait until then.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield iterator
    finally:
        if loader.num_workers:
            _kill_workers(iterator)


def _kill_workers(iterator: Any) -> None:
    """End an iterator's workers at once."""
    # Its own way asks them one by one, waits for each, and then sends a signal that they ignore; at a program's end
    # multiprocessing waits for them for ever. One that the kernel killed may hold a lock that asking would wait for.
    iterator._shutdown = True
    if iterator._worker_pids_set:  # Else it came to its end.
        iterator._worker_pids_set = False
        _remove_worker_pids(id(iterator))
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()
