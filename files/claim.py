"""One command at a time in a folder: an exclusive claim, which ends with its processes, however they end.

The claim is a POSIX record lock on a file in the folder: forked workers do not inherit it, and file systems shared by
machines (NFS) know it. The file says who holds the claim and goes with it; one that a killed process left is no claim.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from .atomic import UnwrittenError, writing

LOCK_NAME = ".nextblock.lock"
# How long processes of a killed command have to vanish, and those of a finished one to leave.
_VANISH_SECONDS, _LEAVE_SECONDS = 20.0, 2.0
# Where another command removes the folder that both made, opening is tried again.
_NUM_TRIES = 100
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# What this process holds: to the kernel two claims of one process would be one, and end together.
_held: set[Path] = set()
logger = logging.getLogger(__name__)


class Processes(Protocol):
    """The processes of a command, such as accelerate's `PartialState` or `Accelerator`."""

    is_main_process: bool

    def wait_for_everyone(self) -> None:
        """Wait until every process has called this."""


@contextmanager
def claimed(folder: Path, state: Processes | None = None, *, option: str = "output_dir") -> Iterator[None]:
    """Keep every other command out of a folder while the processes of this one are in the context.

    Args:
        folder: made where it is not there; at the end it goes again if it was made here and nothing is in it.
        state: the command's processes, each of which must enter the context; None for one alone.
        option: what the folder is called in messages.

    Raises:
        ValueError: if another command holds the claim, or the folder cannot be made or written in.
    """
    place = folder.resolve()
    if place in _held:
        raise ValueError(f"{option} {folder} is in use by this very process; expected another folder")
    made, descriptor = [], None
    _held.add(place)
    try:
        if state is None or state.is_main_process:
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            try:
                descriptor = _take(folder, option)
            except BaseException:
                _remove_empty(made)
                raise
            if state is not None:
                # Each process holds a share: it keeps others out for as long as any of them lives.
                _lock(descriptor, fcntl.LOCK_SH, folder)
                state.wait_for_everyone()
        else:
            state.wait_for_everyone()
            # On a machine that does not share the folder there is no such file, and nobody to keep out.
            with suppress(FileNotFoundError):
                descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
                _lock(descriptor, fcntl.LOCK_SH, folder)
        yield
    finally:
        _held.discard(place)
        if descriptor is not None:
            if state is None or state.is_main_process:
                _give_up(descriptor, folder, made)
            os.close(descriptor)


def is_occupied(folder: Path) -> bool:
    """Tell whether a folder holds anything besides a claim."""
    return folder.is_dir() and any(entry.name != LOCK_NAME for entry in folder.iterdir())


def _take(folder: Path, option: str) -> int:
    """Return the open lock file of a folder that is this process's alone now."""
    deadline = time.monotonic() + _VANISH_SECONDS
    while True:
        descriptor = _open(folder, option)
        is_locked = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)
        if is_locked and _is_there(descriptor, folder):
            _sign(descriptor, folder)
            return descriptor
        holder = {} if is_locked else _holder(descriptor)
        os.close(descriptor)
        if is_locked:
            continue  # Whoever had it has just removed the file.
        if _is_alive(holder) or time.monotonic() > deadline:
            who = "process {pid} on {host} since {since}".format_map(holder) if holder else "another process"
            raise ValueError(
                f"{option} {folder} is in use by {who}; expected a folder that no other command works in: wait for "
                "that one, stop it, or choose another folder"
            )
        time.sleep(0.1)


def _sign(descriptor: int, folder: Path) -> None:
    """Write down who holds a claim; what cannot even hold that is given up again."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        with writing(folder / LOCK_NAME):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except UnwrittenError:
        (folder / LOCK_NAME).unlink()
        os.close(descriptor)
        raise


def _open(folder: Path, option: str) -> int:
    """Open the lock file, making it and the folder where they are not there."""
    for num_left in reversed(range(_NUM_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            break
        except OSError as error:
            if not num_left or not isinstance(error, FileNotFoundError):
                raise ValueError(f"{option} {folder}: {error}; expected a folder that can be written in") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{option} {folder}: {LOCK_NAME} is no file; expected none, or what a command has left")
    return descriptor


def _lock(descriptor: int, kind: int, folder: Path) -> bool:
    """Lock a file, or tell that others hold it; where the file system knows no locks, warn and go on."""
    try:
        fcntl.lockf(descriptor, kind)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(f"{folder} cannot be locked ({error}): see to it that no other command works there")
    return True


def _is_there(descriptor: int, folder: Path) -> bool:
    """Tell whether an open lock file is still the folder's."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_NAME, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict:
    """Read who holds a claim; nothing where that is just being written."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.keys() >= {"pid", "host", "since"} else {}


def _is_alive(holder: dict) -> bool:
    """Tell whether the holder of a claim surely lives; one on another machine may or may not."""
    return holder.get("host") == socket.gethostname() and Path(f"/proc/{holder['pid']}").exists()


def _give_up(descriptor: int, folder: Path, made: list[Path]) -> None:
    """Remove the lock file once no other process of the command holds it, and folders made for nothing."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    while not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    if _is_there(descriptor, folder):
        (folder / LOCK_NAME).unlink()
    _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    """Remove folders that were made for nothing."""
    with suppress(OSError):  # Something is in it, or it is gone.
        for each in made:
            each.rmdir()
