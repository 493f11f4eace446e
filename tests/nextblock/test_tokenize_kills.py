"""A tokenization job that is killed at random moments and started again leaves the folder of an undisturbed one."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nextblock.data.tokens import TokenDataset


@pytest.fixture
def broken_arguments(image_folder, tmp_path, tokenize_arguments):
    """The job over pictures of which two cannot be used."""
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in sorted(path.name for path in (image_folder / split).iterdir()):
            (images / split / name).mkdir(parents=True)
            for file in (image_folder / split / name).iterdir():
                os.link(file, images / split / name / file.name)
    (images / "train" / "wren" / "00.png").unlink()
    (images / "train" / "wren" / "00.png").write_bytes(b"no picture")
    (images / "train" / "blue tit" / "a.jpg").write_bytes(b"")
    small = ["--rows_per_shard", "9", "--batch_size", "4", "--on_error", "skip"]
    return [*tokenize_arguments, "--data.path", str(images), *small]


def check(root: Path) -> None:
    tokens = TokenDataset(root / "undisturbed", "train")
    assert len(tokens) == 3 * (3 * 16 - 1)
    rejected = (root / "undisturbed" / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line)["image_id"] for line in rejected]
    assert rejected == ["train/blue tit/a.jpg", "train/wren/00.png"]
    # Every image and view is there once; the folders that were killed have the same bytes.
    shards = [pq.read_table(path) for path in sorted((root / "undisturbed" / "data").glob("train-*.parquet"))]
    rows = Counter((row["image_id"], row["view"]) for shard in shards for row in shard.to_pylist())
    files = [path.relative_to(root / "images").as_posix() for path in (root / "images" / "train").rglob("*.*")]
    assert rows == Counter((file, view) for file in set(files) - set(rejected) for view in range(3))


@pytest.mark.slow
def test_a_job_killed_twice_ends_as_if_it_had_not_been(broken_arguments, run_killed_jobs, tmp_path):
    assert run_killed_jobs(tmp_path, broken_arguments, num_kills=2)["kills"] == 2
    check(tmp_path)


@pytest.mark.slow
def test_a_job_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(broken_arguments, run_killed_jobs, tmp_path):
    counts = run_killed_jobs(tmp_path, broken_arguments, num_kills=20)
    assert counts["kills"] == 20 and counts["equal_folders"] >= 10
    # On one process, on two and on three.
    assert min(counts["restarts"]) >= 2
    assert sum(num_shards > 0 for num_shards in counts["num_shards"]) >= 8
    check(tmp_path)
