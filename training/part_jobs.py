"""Jobs done in parts by any number of processes: their folder, their progress, the threads they compute with.

A job that was killed goes on when it is started again. Its folder holds `job.json`, which comes first and says what the
job is; a different one is refused.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm.auto import tqdm

from .checkpoint import flush_to_disk, write_atomically

JOB_NAME = "job.json"
_LOCK_SECONDS = 20.0


@contextmanager
def claimed_folder(folder: Path, job: Mapping, state: PartialState) -> Iterator[None]:
    """Make a folder this job's, and keep other runs out while processes of this one work in it.

    Args:
        folder: made where it is not there; one that holds this very job already is taken up.
        job: all that the bytes of the result depend on, by name, as JSON can hold it.
        state: every process must call this.

    Raises:
        ValueError: if the folder holds another job, or another run is at work in it.
    """
    path = folder / JOB_NAME
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            if any(entry.name != f".{JOB_NAME}.tmp" for entry in folder.iterdir()):
                raise ValueError(f"output_dir {folder} holds files but no {JOB_NAME}; expected a new folder")
            write_atomically(path, json.dumps(job, indent=2) + "\n")
            flush_to_disk(folder)
    else:
        state.wait_for_everyone()
    # Opened once: closing any handle of the file would give the process's lock up.
    with open(path, "r+", encoding="utf-8") as file:
        _check_job(json.load(file), json.loads(json.dumps(job)), folder)
        if state.is_main_process:
            _wait_for_lock(file, folder)
            fcntl.lockf(file, fcntl.LOCK_SH)
            state.wait_for_everyone()
        else:
            fcntl.lockf(file, fcntl.LOCK_SH)
        yield


def _check_job(found: dict, wanted: dict, folder: Path) -> None:
    """Refuse a folder begun for something else, naming what differs."""
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"output_dir {folder} holds another job, whose {name} is {found.get(name)}; this one has "
                f"{wanted.get(name)}; expected the same job or a new folder"
            )


def _wait_for_lock(file, folder: Path) -> None:
    """Wait for the processes of a killed run to vanish."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"output_dir {folder}: another run is at work there; expected none") from None
            time.sleep(0.2)


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


@contextmanager
def fixed_threads(num_threads: int) -> Iterator[None]:
    """Compute with so many CPU threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
