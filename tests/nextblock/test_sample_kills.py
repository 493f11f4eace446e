"""Sampling jobs that are killed end with the files of an undisturbed one, and leave no process waiting."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

ARGUMENTS = "--num_images_per_label 40 --batch_size 4 --cpu true".split()


def run(command: list[str], cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("output_format", "num_processes"), [("npz", 1), ("npz", 3), ("png", 2)])
def test_a_job_killed_five_times_on_two_processes_ends_as_if_it_had_not_been(
    ten_class_pipeline_dir, tmp_path, output_format, num_processes
):
    seed = random.SystemRandom().randrange(2**32)
    arguments = ["--pipeline", str(ten_class_pipeline_dir), "--output_format", output_format, *ARGUMENTS]
    options = {"root": str(tmp_path), "arguments": arguments, "num_kills": 5, "num_processes": num_processes}
    options |= {"seed": seed, "num_parts": {"npz": 100, "png": 400}[output_format]}
    script = str(Path(__file__).with_name("killed_sampling.py"))
    process = run([script, json.dumps(options)], tmp_path)
    try:
        output = process.communicate(timeout=600)[0]
    finally:
        stop(process)
    assert process.returncode == 0, f"random.Random({seed})\n{output}"
    num_files = {"npz": 4, "png": 403}[output_format]
    assert output.splitlines()[-1] == f"5 kills, {num_files} files equal", seed


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_the_job_goes_on_later(ten_class_pipeline_dir, tmp_path):
    arguments = ["--pipeline", str(ten_class_pipeline_dir), "--output_dir", "out", "--batch_size", "1"]
    arguments += ["--num_images_per_label", "60", "--cpu", "true"]
    command = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0".split()
    command += ["-m", "nextblock", "sample", *arguments]
    launched = run(command, tmp_path)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/parts/*.npy"))) < 10:
            assert launched.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = children(launched.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        output = launched.communicate(timeout=120)[0]
    finally:
        stop(launched)
    assert launched.returncode != 0 and "SIGKILL" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (tmp_path / "out" / "images.npz").exists()
    finished = run(["-m", "nextblock", "sample", *arguments], tmp_path)
    assert "600 images, " in finished.communicate(timeout=240)[0] and finished.returncode == 0
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        assert len(arrays["arr_0"]) == 600
