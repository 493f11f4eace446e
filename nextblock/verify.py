"""Check a folder of tokens: checksums, row counts, ranges, and that every image is accounted for.

nextblock verify --tokens DIR
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextblock.data.blocks import BlockLayout
from nextblock.data.text_columns import check_texts
from nextblock.data.token_account import REJECTED_NAME
from nextblock.data.token_shards import read_footer, read_shard
from nextblock.data.tokens import TokenManifest
from nextblock.files.regular import read_text

from .command_line import parse_run_config


@dataclass(kw_only=True)
class VerifyConfig:
    """Read every shard of a folder of tokens and compare it with the manifest."""

    tokens: str
    """Folder of the tokens."""


def damage_of(folder: Path) -> list[str]:
    """Find what is wrong with a folder of tokens.

    Args:
        folder: that a job has finished.

    Returns:
        A sentence for each thing that is wrong, none for a whole folder.

    Raises:
        ValueError: if there is no manifest that can be read.
    """
    manifest = TokenManifest.load(folder)
    problems = []
    known = {folder / shard["file"] for entry in manifest.splits.values() for shard in entry["shards"]}
    strangers = sorted(path for path in (folder / "data").glob("*") if path not in known)
    problems += [f"{path} is not in the manifest" for path in strangers]
    for split, entry in manifest.splits.items():
        if "num_rejected" not in entry:
            problems.append(f"split {split!r} does not say how many images were rejected")
            continue
        num_rejected, views = 0, []
        for shard in entry["shards"]:
            try:
                views.append(_check_shard(folder / shard["file"], shard, manifest, entry["num_views"]))
                num_rejected += len(read_footer(folder / shard["file"])[1])
            except ValueError as error:
                problems.append(str(error))
        if len(views) == len(entry["shards"]):
            problems += _count(split, entry, np.concatenate([[], *views]).astype(np.int64), num_rejected)
    try:
        # Names may hold characters at which splitlines would end a line too.
        lines = read_text(folder / REJECTED_NAME).split("\n")
        splits = [json.loads(line)["split"] for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [*problems, f"{folder / REJECTED_NAME} cannot be read: {error}"]
    for split, entry in manifest.splits.items():
        if "num_rejected" in entry and splits.count(split) != entry["num_rejected"]:
            problems.append(
                f"{folder / REJECTED_NAME} lists {splits.count(split)} images of split {split!r}; "
                f"expected {entry['num_rejected']}"
            )
    return problems


def _check_shard(path: Path, shard: dict, manifest: TokenManifest, num_views: int) -> np.ndarray:
    """Return a shard's column of views, or raise a ValueError."""
    rows = read_shard(path, shard["num_rows"], shard["sha256"], manifest.text_names)
    if rows.texts:
        check_texts(path, rows.texts, manifest.text_width)
    num_tokens = BlockLayout.from_dict(manifest.layout).num_tokens
    num_classes = max(1, len(manifest.class_names))
    if not len(rows.idx):
        return rows.views
    if rows.idx.shape[1] != num_tokens:
        raise ValueError(f"shard {path} has rows of {rows.idx.shape[1]} tokens; expected {num_tokens}")
    columns = (("idx", rows.idx, manifest.vocab_size), ("label", rows.class_labels, num_classes))
    for name, values, end in (*columns, ("view", rows.views, num_views)):
        if values.min() < 0 or values.max() >= end:
            raise ValueError(f"shard {path}: {name} spans {values.min()} to {values.max()}; expected 0 to {end - 1}")
    return rows.views


def _count(split: str, entry: dict, views: np.ndarray, num_rejected: int) -> list[str]:
    """Say where rows and rejects do not add up to the images."""
    num_usable, num_views = entry["num_images"] - entry["num_rejected"], entry["num_views"]
    problems = []
    # Before anything is as long as the number of views, which may be anything.
    if len(views) != num_usable * num_views and num_views > len(views):
        problems.append(f"split {split!r} has {len(views)} rows; expected {num_usable} in each of {num_views} views")
    elif (rows_by_view := np.bincount(views, minlength=num_views).tolist()) != (expected := [num_usable] * num_views):
        problems.append(f"split {split!r} has {rows_by_view} rows by view; expected {expected}")
    if num_rejected != entry["num_rejected"] * entry["num_views"]:
        problems.append(
            f"split {split!r}: its shards tell of {num_rejected} rejected rows; expected "
            f"{entry['num_rejected']} images in {entry['num_views']} views"
        )
    return problems


def verify(config: VerifyConfig) -> int:
    """Print what is wrong with a folder of tokens.

    Args:
        config: which folder.

    Returns:
        0 for a whole folder, else 1.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = Path(config.tokens)
    if not folder.is_dir():  # No damage but a mistake.
        raise ValueError(f"tokens is {config.tokens!r}; expected a folder of tokens")
    try:
        problems = damage_of(folder)
    except ValueError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem)
    print(f"{config.tokens}: {len(problems)} problems" if problems else f"{config.tokens}: whole")
    return 1 if problems else 0


def main(argv: Sequence[str]) -> None:
    """Read the command line and check."""
    sys.exit(verify(parse_run_config(VerifyConfig, command="verify", argv=argv)))
