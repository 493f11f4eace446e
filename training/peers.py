"""Watching over a run's other processes and its launcher: nobody waits for ever for one that died.

Every process counts on in the launch's store, from a thread of its own, so that long steps and busy devices do not
matter, and looks whether the others do.
"""

import os
import signal
import socket
import sys
import threading
import time
from itertools import count
from multiprocessing import active_children
from typing import Protocol

import torch.distributed as dist

INTERVAL_SECONDS = 1.0
# How long a process may be silent. Nothing that it computes keeps its thread from counting.
PATIENCE_SECONDS = 60.0
# How long connections that broke have to end a process with an error of their own.
GRACE_SECONDS = 10.0
_LEFT, _STOPPED, _FAILED = "left", "stopped", "failed"


class Stopped(BaseException):
    """A job was asked to stop by a signal.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


class Processes(Protocol):
    """The processes of a run, such as accelerate's `PartialState` or `Accelerator`."""

    process_index: int
    num_processes: int


class PeerWatch:
    """End this process when another one has died, and stop it, as SIGTERM does, when its launcher has; a context.

    A process that leaves the context with an error counts as dead, one that leaves it with `Stopped` stops the others.

    Args:
        state: this process and the others; all of them must enter the context at about the same time.
        patience_seconds: silence after which a process counts as dead.
    """

    # Contexts of one launch, which all processes enter in the same order, have keys of their own.
    _numbers = count()

    def __init__(self, state: Processes, patience_seconds: float = PATIENCE_SECONDS):
        self._number = next(self._numbers)
        self._rank, self._num_processes = state.process_index, state.num_processes
        # Counted in looks of this process's own, not read from a clock: who is suspended and goes on looks on too.
        self._patience = round(patience_seconds / INTERVAL_SECONDS)
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._has_launchers_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store: dist.Store | None = None
        # Where this one is and the others are, known once they have been heard of.
        self._hosts: dict[int, str] = {self._rank: socket.gethostname()}
        self._has_left = threading.Event()
        self._num_looks = 0
        self._store_is_gone = False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._watch_store)]

    def __enter__(self) -> "PeerWatch":
        if self._num_processes > 1:
            # A connection of its own: one that somebody waits at would hold up this thread too.
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set(f"{self._key(self._rank)}/host", self._hosts[self._rank])
        if self._store is not None or self._launcher is not None:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, error_class: type | None, error: BaseException | None, traceback: object) -> None:
        self._has_left.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(GRACE_SECONDS)
        if self._store is None:
            return
        is_stopped = isinstance(error, Stopped)
        failure = f"{_FAILED}: {error_class.__name__}: {error}" if error is not None and not is_stopped else None
        try:
            self._store.set(self._key(self._rank), failure or (_STOPPED if is_stopped else _LEFT))
            if failure is None and self._rank == 0 and not self._has_launchers_store:
                self._wait_for_peers()
        except RuntimeError:
            pass  # Who held the store has ended, and with it everybody who would have read this.

    def _key(self, rank: int) -> str:
        return f"nextblock/peers/{self._number}/{rank}"

    def _peers(self) -> list[int]:
        return [rank for rank in range(self._num_processes) if rank != self._rank]

    def _read(self, rank: int) -> str | None:
        """Return what a process has written last, None before it has."""
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _wait_for_peers(self) -> None:
        """Keep the store, which ends with this process, until the others have left too."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any((self._read(peer) or "0").isdecimal() for peer in self._peers()):
            time.sleep(0.02)

    def _watch(self) -> None:
        """Be the thread that counts on and looks around, until the context is left."""
        # What each of the others has written last, and since how many looks.
        seen: dict[int, tuple[str | None, int]] = {peer: (None, 0) for peer in self._peers()}
        while not self._has_left.wait(INTERVAL_SECONDS if self._num_looks else 0):
            self._num_looks += 1
            if self._launcher is not None and os.getppid() != self._launcher:
                _say(f"the launcher (process {self._launcher}) is gone: stopping as after SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
                self._launcher = None
                if self._has_launchers_store:
                    self._store_is_gone = True
                    return
            if self._store is None:
                continue
            try:
                self._store.set(self._key(self._rank), str(self._num_looks))
                self._look_around(seen)
            except RuntimeError as error:
                self._lose_store(error)
                return

    def _watch_store(self) -> None:
        """Be the thread that ends this process when the other one waits for the store, whose machine is lost."""
        before, num_waits = 0, 0
        while not self._has_left.wait(INTERVAL_SECONDS) and not self._store_is_gone:
            num_waits = num_waits + 1 if self._num_looks == before else 0
            before = self._num_looks
            if num_waits > self._patience:
                where = "the launcher" if self._has_launchers_store else self._name(0)
                self._end(f"{where} has not been heard of for {self._patience * INTERVAL_SECONDS:.0f} s")

    def _look_around(self, seen: dict[int, tuple[str | None, int]]) -> None:
        """Compare what the others have written with what they had."""
        for peer, (before, num_looks) in list(seen.items()):
            text = self._read(peer)
            if text is not None and peer not in self._hosts:
                self._hosts[peer] = self._store.get(f"{self._key(peer)}/host").decode()
            seen[peer] = text, num_looks + 1 if text == before else 0
            if num_looks > self._patience:
                silence = f"{self._patience * INTERVAL_SECONDS:.0f} s"
                self._end(f"{self._name(peer)} has not been heard of for {silence}")
            if text is None or text.isdecimal():
                continue
            del seen[peer]
            if text == _STOPPED:
                os.kill(os.getpid(), signal.SIGTERM)
            elif text != _LEFT and not self._has_left.wait(GRACE_SECONDS):
                self._end(f"{self._name(peer)} {text}")

    def _name(self, peer: int) -> str:
        """Name a process by its rank and machine."""
        return f"rank {peer} of {self._num_processes} on {self._hosts.get(peer, 'a machine not heard of yet')}"

    def _lose_store(self, error: RuntimeError) -> None:
        """End this process if it was rank 0's end that closed the store; a launcher's end is another matter."""
        self._store_is_gone = True
        if self._has_launchers_store or self._has_left.wait(GRACE_SECONDS):
            return
        self._end(f"rank 0 of {self._num_processes}, which keeps the connections, is gone ({error})")

    def _end(self, reason: str) -> None:
        """End this process, whatever it waits for."""
        _say(f"{reason}; rank {self._rank} ends, because it would wait for ever; a restart goes on from what is whole")
        for worker in active_children():
            worker.kill()
        os._exit(1)


def _say(message: str) -> None:
    """Tell on standard error, whichever process this is."""
    print(f"nextblock: {message}", file=sys.stderr, flush=True)
