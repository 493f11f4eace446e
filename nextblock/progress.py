"""A progress bar over the work of all processes, in a job whose processes do not wait for each other."""

import time
from collections.abc import Callable
from itertools import count

import torch.distributed as dist
from accelerate import PartialState
from tqdm.auto import tqdm

# How long files may take to be seen once all processes have written theirs, on a file system that machines share.
_FILES_SECONDS = 60.0


class MissingPartError(RuntimeError):
    """What a process was to write is not there although it has ended well."""


class Progress:
    """A bar on the main process over the images of all processes.

    Args:
        state: this process and the others.
        name: of the job, shown before the bar.
        num_images: of the whole job.
        num_done: those that an earlier run has written.
    """

    # Jobs of one launch, which all processes begin in the same order, have counters of their own.
    _numbers = count()

    def __init__(self, state: PartialState, name: str, num_images: int, num_done: int):
        # A counter in the launcher's store, because a collective sum would make processes wait for each other.
        self._store = dist.distributed_c10d._get_default_store() if state.num_processes > 1 else None
        self._name = f"nextblock/progress/{next(self._numbers)}"
        self._num_processes = state.num_processes
        self._count = 0
        is_shown = state.is_main_process
        options = {"total": num_images, "initial": num_done, "unit": " images", "mininterval": 1.0}
        self._bar = tqdm(desc=name, disable=not is_shown, **options)

    def add(self, num_images: int) -> None:
        """Count images of this process, 0 to look at the others' only."""
        known = self._count
        self._count = known + num_images if self._store is None else self._store.add(f"{self._name}/images", num_images)
        self._bar.update(self._count - known)

    def finish_share(self) -> None:
        """Tell that this process has written all that it is to write."""
        if self._store is not None:
            self._store.add(f"{self._name}/finished", 1)

    def wait_for_files(self, first_missing: Callable[[], str | None]) -> None:
        """Show the other processes' progress until the files they write are there; `PeerWatch` sees that they live.

        Args:
            first_missing: says what is not there yet; None once all is.

        Raises:
            MissingPartError: if all processes have written their shares and something is not there a minute later.
        """
        # Files and no barrier: a barrier gives up after minutes, and the last part of a process may take hours.
        deadline = None
        while (missing := first_missing()) is not None:
            if deadline is None and self._all_have_finished():
                deadline = time.monotonic() + _FILES_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                raise MissingPartError(
                    f"{missing} is not there, {_FILES_SECONDS:.0f} s after all {self._num_processes} processes have "
                    "written their shares; expected a folder that all machines share and nobody else changes. The same "
                    "command goes on from what is there"
                )
            time.sleep(0.2)
            self.add(0)
        self.add(0)

    def _all_have_finished(self) -> bool:
        """Whether every process has written its share."""
        return self._store is None or self._store.add(f"{self._name}/finished", 0) == self._num_processes

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()
