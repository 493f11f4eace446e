"""The account at the end of a tokenization job, every image a row or a reject; `manifest.json` comes last."""

from __future__ import annotations

import json
from pathlib import Path

from nextblock.files.atomic import file_sha256, flush_to_disk, write_text_whole

from .token_card import token_card
from .token_jobs import RowDataset, Shard
from .token_shards import damage_of_shard, read_footer
from .tokens import TokenManifest

REJECTED_NAME = "rejected.jsonl"


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
            problem = damage_of_shard(path, len(shard.rows))
            if problem is not None:
                raise ValueError(problem)
            num_rows, out = read_footer(path)
            rejected += out
            entries.append({"file": f"data/{shard.name}", "num_rows": num_rows, "sha256": file_sha256(path)})
        num_rejected = _check_rejected(rejected, len(dataset.source), dataset.num_views, split)
        if num_rejected == len(dataset.source):
            raise ValueError(f"split {split!r}: all {num_rejected} images were rejected; expected some usable ones")
        for entry in rejected[:num_rejected]:
            lines.append({"split": split} | {name: entry[name] for name in ("image_id", "reason", "detail")})
        job.splits[split] |= {"num_rejected": num_rejected, "shards": entries}
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_whole(folder / REJECTED_NAME, text)
    write_text_whole(folder / "README.md", token_card(job))
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
