"""Jobs done in parts by any number of processes: the folder that is theirs.

A job that was killed goes on when it is started again. Its folder holds `job.json`, which comes first and says what the
job is; a different one is refused.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .atomic import write_text_whole

JOB_NAME = "job.json"
_LOCK_SECONDS = 20.0


class Processes(Protocol):
    """The processes of a job, such as accelerate's `PartialState`."""

    is_main_process: bool

    def wait_for_everyone(self) -> None:
        """Wait until every process has called this."""


@contextmanager
def claimed_folder(folder: Path, job: Mapping, state: Processes) -> Iterator[None]:
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
            write_text_whole(path, json.dumps(job, indent=2) + "\n")
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
