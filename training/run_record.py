"""run.json: what every start of a training ran on, with what, and how it ended."""

import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from nextblock.evaluation.report import environment
from nextblock.evaluation.training_log import RECORD_NAME, read_starts
from nextblock.files.atomic import set_aside, write_text_whole

logger = get_logger(__name__)


class RunRecord:
    """Keep `run.json` while a training runs; use it as a context.

    The file lists the starts of the run, resumed ones too. A start whose "ended" is null was killed or still runs.

    Args:
        accelerator: knows devices, processes and precision; its main process writes.
        output_dir: the run's folder.
        first_step: steps already taken; 0 begins a new file.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int):
        self._path = output_dir / RECORD_NAME
        self._is_writer = accelerator.is_main_process
        self._start = describe_start(accelerator, first_step) if self._is_writer else {}
        self.outcome = "finished"
        """How the run ended, if it ends without an error."""
        self.last_step = first_step
        """Steps taken so far."""

    def __enter__(self) -> "RunRecord":
        if self._is_writer:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._earlier = self._read_earlier() if self._start["first_step"] > 0 and self._path.exists() else []
            self._write()
        return self

    def __exit__(self, error_class: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._is_writer:
            outcome = self.outcome if error is None else f"{error_class.__name__}: {error}"
            self._start |= {"ended": now(), "last_step": self.last_step, "outcome": outcome}
            self._write()

    def _read_earlier(self) -> list[dict]:
        """Return the starts before this one; a damaged file, which no step depends on, makes room for a new one."""
        try:
            return read_starts(self._path.parent)
        except ValueError as error:
            logger.warning(f"{error}; it is set aside as {set_aside(self._path)}, and a new one is begun")
            return []

    def _write(self) -> None:
        content = {"starts": [*self._earlier, self._start]}
        write_text_whole(self._path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def describe_start(accelerator: Accelerator, first_step: int) -> dict:
    """Say what a training runs on and with what.

    Args:
        accelerator: the training's.
        first_step: steps already taken.

    Returns:
        What JSON can hold.
    """
    device = accelerator.device
    is_cuda = device.type == "cuda"
    return {
        "started": now(),
        "ended": None,
        "first_step": first_step,
        "last_step": None,
        "outcome": None,
        "command": shlex.join(sys.orig_argv),
        "git": git_state(Path.cwd()),
        "num_processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type} ({platform.machine()})",
        "mixed_precision": accelerator.mixed_precision,
        "versions": environment() | ({"cuda": torch.version.cuda} if is_cuda else {}),
    }


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Return the commit checked out where a folder lies, and whether files differ from it.

    Args:
        folder: any folder.

    Returns:
        "commit" and "is_dirty"; None outside a repository, before its first commit, or without git.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "is_dirty": bool(_git(folder, "status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def now() -> str:
    """Return the time to the second, with its distance from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
