"""Tokenization and sampling jobs that are signalled: they stop at once, say what is done, and exit with 0."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Parts so small that a job is signalled in the middle of its work.
TOKENIZE = ["--rows_per_shard", "2", "--batch_size", "2", "--num_workers", "2"]
SAMPLE = ["--num_images_per_label", "20", "--batch_size", "2", "--cpu", "true"]


@pytest.fixture
def jobs(tokenize_arguments, ten_class_pipeline_dir) -> dict[str, list[str]]:
    return {
        "tokenize": [*tokenize_arguments, *TOKENIZE],
        "sample": ["--pipeline", str(ten_class_pipeline_dir), *SAMPLE],
    }


def start(command: str, arguments: list[str], folder: Path, rank: int | None = None, port: int = 0) -> subprocess.Popen:
    names = {"OMP_NUM_THREADS": "1"}
    if rank is not None:
        names |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        names |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", "nextblock", command, *arguments, "--output_dir", str(folder)],
        env=os.environ | names,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def num_parts(folder: Path) -> int:
    return len([*folder.glob("data/[!.]*"), *folder.glob("parts/[!.]*")])


def wait_for_parts(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while num_parts(folder) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def check_stopped(folder: Path, output: str, command: str, signal_name: str) -> None:
    unit = "shards" if command == "tokenize" else "images"
    found = re.search(rf"stopped by {signal_name}: (\d+) of (\d+) {unit} are in .*; the same command goes on", output)
    assert found and "Traceback" not in output, output
    assert 3 <= int(found[1]) < int(found[2])
    assert not list(folder.rglob(".*.tmp"))
    assert not [name for name in ("manifest.json", "images.npz") if (folder / name).exists()]


@pytest.mark.parametrize(
    ("command", "signal_name"),
    [pytest.param("tokenize", "SIGINT", marks=pytest.mark.slow), ("sample", "SIGTERM")],
)
def test_a_signalled_job_stops_cleanly(command, signal_name, jobs, tmp_path):
    folder = tmp_path / "out"
    process = start(command, jobs[command], folder)
    wait_for_parts(folder, process)
    for _ in range(2):  # To all of the job's processes, and twice, as from a terminal by way of a launcher.
        os.killpg(process.pid, signal.Signals[signal_name])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    check_stopped(folder, output, command, signal_name)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(jobs, tmp_path):
    folder = tmp_path / "out"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [start("sample", jobs["sample"], folder, rank, port) for rank in range(2)]
    wait_for_parts(folder, processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    check_stopped(folder, outputs[0], "sample", "SIGTERM")
    assert "Traceback" not in outputs[1], outputs[1]
