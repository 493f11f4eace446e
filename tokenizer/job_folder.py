"""The folder of a tokenization job: what it is for, who works in it, and the account at its end.

`job.json` comes first and is refused to any other job; `manifest.json` comes last.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from nextblock.data.token_shards import read_footer
from nextblock.data.tokens import TokenManifest
from nextblock.training.checkpoint import file_sha256, flush_to_disk, write_atomically

from .shard_jobs import RowDataset, Shard
from .token_card import token_card

JOB_NAME = "job.json"
REJECTED_NAME = "rejected.jsonl"
_LOCK_SECONDS = 20.0


@contextmanager
def claimed_folder(folder: Path, job: TokenManifest, state: PartialState) -> Iterator[None]:
    """Make a folder this job's, and keep other runs out while processes of this one work in it.

    Args:
        folder: made where it is not there; one that holds this very job already is taken up.
        job: the manifest as far as it is known before any image is read.
        state: every process must call this.

    Raises:
        ValueError: if the folder holds another job, or another run is at work in it.
    """
    path = folder / JOB_NAME
    if state.is_main_process:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ("data", f".{JOB_NAME}.tmp"))
            if others or any((folder / "data").iterdir()):
                raise ValueError(f"output_dir {folder} holds files but no {JOB_NAME}; expected a new folder")
            write_atomically(path, json.dumps(asdict(job), indent=2) + "\n")
            flush_to_disk(folder)
    else:
        state.wait_for_everyone()
    # Opened once: closing any handle of the file would give the process's lock up.
    with open(path, "r+", encoding="utf-8") as file:
        _check_job(json.load(file), json.loads(json.dumps(asdict(job))), folder)
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


def check_finished(folder: Path) -> dict[str, int]:
    """Compare the shards of a finished folder with its manifest, by row counts.

    Returns:
        Rows by split.

    Raises:
        ValueError: if a count differs.
    """
    manifest = TokenManifest.load(folder)
    for entry in manifest.splits.values():
        for shard in entry["shards"]:
            num_rows, _ = read_footer(folder / shard["file"])
            if num_rows != shard["num_rows"]:
                raise ValueError(f"{folder / shard['file']} has {num_rows} rows; its manifest says {shard['num_rows']}")
    return {split: sum(shard["num_rows"] for shard in entry["shards"]) for split, entry in manifest.splits.items()}


def finish(folder: Path, job: TokenManifest, plans: dict[str, tuple[RowDataset, list[Shard]]]) -> dict[str, int]:
    """Account for every image and write the reject list, the card and, last, the manifest.

    Args:
        folder: with all shards.
        job: the manifest without shards, which are filled in.
        plans: data set and shards of each split.

    Returns:
        Rows by split.

    Raises:
        ValueError: if an image is neither in a shard nor rejected, or is in one view and not in another.
    """
    lines = []
    for split, (dataset, shards) in plans.items():
        entries, rejected = [], []
        for shard in shards:
            path = folder / "data" / shard.name
            num_rows, out = read_footer(path)
            if num_rows + len(out) != len(shard.rows):
                raise ValueError(f"{path} has {num_rows} rows and {len(out)} rejects; expected {len(shard.rows)}")
            rejected += out
            entries.append({"file": f"data/{shard.name}", "num_rows": num_rows, "sha256": file_sha256(path)})
        num_rejected = _check_rejected(rejected, len(dataset.source), dataset.num_views, split)
        if num_rejected == len(dataset.source):
            raise ValueError(f"split {split!r}: all {num_rejected} images were rejected; expected some usable ones")
        for entry in rejected[:num_rejected]:
            lines.append({"split": split} | {name: entry[name] for name in ("image_id", "reason", "detail")})
        job.splits[split] |= {"num_rejected": num_rejected, "shards": entries}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder / REJECTED_NAME, text)
    write_atomically(folder / "README.md", token_card(job))
    job.save(folder)
    flush_to_disk(folder)
    return check_finished(folder)


def _check_rejected(rejected: list[dict], num_images: int, num_views: int, split: str) -> int:
    """Return how many images were rejected, the same ones in every view; they come view by view."""
    by_view = [set() for _ in range(num_views)]
    for entry in rejected:
        by_view[entry["row"] // num_images].add(entry["row"] % num_images)
    for view, images in enumerate(by_view):
        if images != by_view[0]:
            raise ValueError(
                f"split {split!r}: {len(by_view[0])} images were rejected in view 0 and {len(images)} in view {view}; "
                "expected the same images: files have changed during the job, which a new folder gets over"
            )
    return len(by_view[0])
