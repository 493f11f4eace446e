"""A tokenization job that is killed at random moments and started again leaves the folder of an undisturbed one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nextblock.data.tokens import TokenDataset

SCRIPT = Path(__file__).with_name("killed_jobs.py")


def run_killed_jobs(root: Path, arguments: list[str], num_kills: int) -> str:
    options = {"root": str(root), "arguments": arguments, "num_kills": num_kills, "seed": 5}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    assert [json.loads(line)["image_id"] for line in rejected] == ["train/blue tit/a.jpg", "train/wren/00.png"]


def test_a_job_killed_twice_ends_as_if_it_had_not_been(broken_arguments, tmp_path):
    output = run_killed_jobs(tmp_path, broken_arguments, num_kills=2)
    assert re.search(r"^2 kills, \d+ folders equal$", output, re.MULTILINE)
    check(tmp_path)


@pytest.mark.slow
def test_a_job_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(broken_arguments, tmp_path):
    output = run_killed_jobs(tmp_path, broken_arguments, num_kills=20)
    assert re.search(r"^20 kills, \d\d folders equal$", output, re.MULTILINE)
    check(tmp_path)
