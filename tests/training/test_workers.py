"""Trainings whose process or loader worker fails: they end at once, with a status that says so, and nothing is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# One rank fails in the middle of its third step, while its workers are at the next ones.
PROGRAM = """
import os, sys
from multiprocessing import active_children
from nextblock.tokenizer.task import TokenizerTask
from nextblock.train_tokenizer import main

way, *arguments = sys.argv[1:]
take_step = TokenizerTask.train_step

def fail(self, micro_batches, step):
    if step == 2 and os.environ.get("RANK", "0") == "0":
        workers = active_children()
        assert len(workers) == 2
        if way == "error":
            raise KeyError("an error in a step")
        workers[0].kill()
    return take_step(self, micro_batches, step)

TokenizerTask.train_step = fail
main(arguments)
"""
# Torch says that the worker "is killed by signal", or "exited unexpectedly" where it was just handing a batch over.
MESSAGES = {"error": "an error in a step", "killed worker": "DataLoader worker (pid"}


def members(group: int) -> list[int]:
    """Return the processes of a process group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, member_of = path.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def check_ends(command: list[str], message: str, cwd: Path) -> None:
    """Run a training that fails, and see that it ends with its message, and all that it started with it."""
    with open(cwd / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout=120)
        deadline = time.monotonic() + 3
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        text = (cwd / "log").read_text()
        assert status != 0 and message in text, text
        assert not members(process.pid), text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def arguments(tokenizer_arguments, tmp_path) -> list[str]:
    folders = ["--output_dir", str(tmp_path / "run"), "--loop.tracker", "null"]
    return [*tokenizer_arguments, *folders, "--loop.num_workers", "2", "--loop.num_steps", "40"]


@pytest.mark.parametrize("way", [pytest.param("error", marks=pytest.mark.slow), "killed worker"])
def test_a_training_with_workers_ends_at_once(way, arguments, tmp_path):
    check_ends([sys.executable, "-c", PROGRAM, way, *arguments], MESSAGES[way], tmp_path)


@pytest.mark.slow
def test_so_do_two_processes_and_their_launcher(arguments, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    command = [sys.executable, "-m", *launcher, "program.py", "killed worker", *arguments]
    check_ends(command, MESSAGES["killed worker"], tmp_path)
