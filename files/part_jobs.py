"""Jobs done in parts by any number of processes: the folder that is theirs.

A job that was killed goes on when it is started again. Its folder holds `job.json`, which comes first and says what the
job is; a different one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .atomic import write_text_whole
from .claim import LOCK_NAME, Processes
from .regular import read_json

JOB_NAME = "job.json"


def begin_job(folder: Path, job: Mapping, state: Processes) -> None:
    """Make a folder this job's, or take up this very job there.

    Args:
        folder: which the processes have claimed.
        job: all that the bytes of the result depend on, by name, as JSON can hold it.
        state: every process must call this.

    Raises:
        ValueError: if the folder holds another job, or other files.
    """
    path = folder / JOB_NAME
    if state.is_main_process and not path.is_file():
        if any(entry.name not in (f".{JOB_NAME}.tmp", LOCK_NAME) for entry in folder.iterdir()):
            raise ValueError(f"output_dir {folder} holds files but no {JOB_NAME}; expected a new folder")
        write_text_whole(path, json.dumps(job, indent=2) + "\n")
    state.wait_for_everyone()
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"output_dir {folder}: {error}; expected a new folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"output_dir {folder}: {JOB_NAME} holds no job; expected a new folder")
    _check_job(found, json.loads(json.dumps(job)), folder)


def _check_job(found: dict, wanted: dict, folder: Path) -> None:
    """Refuse a folder begun for something else, naming what differs."""
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"output_dir {folder} holds another job, whose {name} is {found.get(name)}; this one has "
                f"{wanted.get(name)}; expected the same job or a new folder"
            )
