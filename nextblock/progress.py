"""A progress bar over the work of all processes, in a job whose processes do not wait for each other."""

import time
from collections.abc import Callable

import torch.distributed as dist
from accelerate import PartialState
from tqdm.auto import tqdm


class Progress:
    """A bar on the main process over the images of all processes.

    Args:
        state: this process and the others.
        name: of the job, shown before the bar.
        num_images: of the whole job.
        num_done: those that an earlier run has written.
    """

    def __init__(self, state: PartialState, name: str, num_images: int, num_done: int):
        # A counter in the launcher's store, because a collective sum would make processes wait for each other.
        self._store = dist.distributed_c10d._get_default_store() if state.num_processes > 1 else None
        self._count = 0
        is_shown = state.is_main_process
        options = {"total": num_images, "initial": num_done, "unit": " images", "mininterval": 1.0}
        self._bar = tqdm(desc=name, disable=not is_shown, **options)

    def add(self, num_images: int) -> None:
        """Count images of this process, 0 to look at the others' only."""
        known = self._count
        self._count = known + num_images if self._store is None else self._store.add("nextblock/images", num_images)
        self._bar.update(self._count - known)

    def wait_while(self, is_unfinished: Callable[[], bool]) -> None:
        """Show the other processes' progress until the files they write are there."""
        # Files and no barrier: a barrier gives up after minutes, and the last part of a process may take hours.
        while is_unfinished():
            time.sleep(0.2)
            self.add(0)
        self.add(0)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()
