"""What the files of a source were when a job began, so that one that goes on does not mix old images with new ones.

Names and labels are the affair of `source_fingerprint`; this is what lies behind the names. Legend: N files.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from nextblock.files.atomic import write_whole
from nextblock.files.regular import NotRegularError, open_regular

Check = Literal["sizes", "files", "content"]
_NUM_READERS = 8
_DIGEST_SIZE = 16


def check_files(
    record: Path, root: Path | None, names: Sequence[str], check: Check, *, is_begun: bool, hint: str
) -> None:
    """Compare files with what a job's record says of them; a job that is not begun, or has no record, gets one.

    Args:
        record: file of the record, in the job's folder.
        root: folder of the files; None where there are none.
        names: N paths below it.
        check: "sizes"; "files", sizes and times of change; or "content", which reads every file.
        is_begun: whether anything was made of the files yet.
        hint: what to do where files have changed.

    Raises:
        ValueError: naming the first file that has changed, or if there is no record of the content.
    """
    if root is None:
        return
    found = _look_at(root, names, check)
    if not is_begun or not record.is_file():
        write_whole(record, partial(np.savez, **found))
        return
    try:
        with np.load(record) as arrays:
            known = dict(arrays)
    except Exception as error:  # A zip file's readers raise whatever a broken one makes them trip over
        raise ValueError(f"{record} is damaged ({error}); {hint}") from error
    if check == "content" and "digests" not in known:
        raise ValueError(f"{record} does not tell of the files' content, which was not asked for at first; {hint}")
    if len(known["sizes"]) != len(names) or not np.array_equal(known["names"], found["names"]):
        raise ValueError(f"{root} has {len(names)} other files than the {len(known['sizes'])} of {record}; {hint}")
    columns = {"sizes": ["sizes"], "files": ["sizes", "times"], "content": ["sizes", "digests"]}[check]
    for name in columns:
        changed = np.flatnonzero((known[name] != found[name]).reshape(len(names), -1).any(1))
        if len(changed):
            first = changed[0]
            what = _describe(name, known[name][first], found[name][first])
            count = f"{len(changed)} of {len(names)} files have changed"
            raise ValueError(f"{root / names[first]} is not the file that was begun with: {what} ({count}); {hint}")


def _look_at(root: Path, names: Sequence[str], check: Check) -> dict[str, np.ndarray]:
    """Return sizes (N,), times of change (N,) in ns and, where asked for, digests (N, 16) of the content."""
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        states = list(executor.map(_size_and_time, [root / name for name in names]))
        sizes, times = np.array(states, np.int64).reshape(-1, 2).T
        found = {"sizes": sizes, "times": times}
        if check == "content":
            digests = b"".join(executor.map(_digest, [root / name for name in names]))
            found["digests"] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST_SIZE)
    listed = "\n".join(names).encode("utf-8", "surrogateescape")
    return found | {"names": np.frombuffer(hashlib.sha256(listed).digest(), np.uint8)}


def _size_and_time(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; of a link that leads nowhere, which is an unreadable image, none."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> bytes:
    """Hash a file; one that cannot be read has a digest too."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").digest()[:_DIGEST_SIZE]
    except (OSError, NotRegularError):
        return bytes(_DIGEST_SIZE)


def _describe(column: str, before: np.ndarray, after: np.ndarray) -> str:
    """Say how a file has changed."""
    if column == "sizes":
        return f"it has {after} bytes and had {before}" if after >= 0 else "it is gone"
    if column == "times":
        before, after = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at / 1e9)) for at in (before, after))
        return f"it was changed at {after}, before that at {before}"
    return "its content is another"
