"""Processes whose peer or launcher dies: they end within a bound, and say which it was. With models: test_kill.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# Pairs of processes; one of a pair ends as told while the other waits. Silence lasts four seconds, grace three. While
# they begin, which takes a busy machine long, they have more patience.
PROGRAM = """
import json, os, signal, socket, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from nextblock.training import peers

def run(rank, port, failing, end, wait, log):
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    with peers.PeerWatch(SimpleNamespace(process_index=rank, num_processes=2), patience_seconds=30.0) as watch:
        while len(watch._hosts) < 2:  # Until the other one has been heard of.
            time.sleep(0.05)
        dist.barrier()  # Else one might fall silent before the other has heard of it.
        watch._patience = 4
        if rank == failing:
            time.sleep(1)  # Else the other might still be at the barrier.
        exec(end if rank == failing else wait)

peers.GRACE_SECONDS = 3.0
ranks, codes = {}, {}
for name, (failing, end, wait) in json.loads(sys.argv[1]).items():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                run(rank, port, failing, end, wait, f"{name} {rank}")
            except BaseException as error:
                print(repr(error))
                os._exit(2)
            os._exit(0)
        ranks[pid] = name, rank
        if rank != failing:
            codes[name] = None
deadline = time.monotonic() + 60
while None in codes.values() and time.monotonic() < deadline:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid == 0:
        time.sleep(0.05)
        continue
    name, rank = ranks.pop(pid)
    if rank != json.loads(sys.argv[1])[name][0]:
        codes[name] = os.waitstatus_to_exitcode(status)
for pid in ranks:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(codes))
"""
HOST = socket.gethostname()
RANK_1 = f"rank 1 of 2 on {HOST}"
SILENT = "os.kill(os.getpid(), signal.SIGSTOP)"
# What happens to a rank, to which, what the other one does meanwhile, and how that one ends.
CASES = {
    "silence of 1": (1, SILENT, "dist.barrier()", 1, f"{RANK_1} has not been heard of for 4 s; rank 0 ends"),
    "silence of 0": (0, SILENT, "time.sleep(60)", 1, f"rank 0 of 2 on {HOST} has not been heard of for 4 s; rank 1"),
    "an error": (1, "raise KeyError('x')", "time.sleep(60)", 1, f"{RANK_1} failed: KeyError: 'x'; rank 0 ends"),
    "death of 0": (0, "os._exit(3)", "time.sleep(60)", 1, "rank 0 of 2, which keeps the connections, is gone"),
    "stop of 0": (0, "raise peers.Stopped(signal.SIGTERM)", "time.sleep(60)", -signal.SIGTERM, ""),
    "stop of 1": (1, "raise peers.Stopped(signal.SIGINT)", "time.sleep(60)", -signal.SIGTERM, ""),
    "0 leaves first": (0, "pass", "time.sleep(1.5)", 0, ""),
    "1 leaves first": (1, "pass", "time.sleep(7)", 0, ""),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[int | None, str]]:
    """How the other process of every case ended, and what it said."""
    folder = tmp_path_factory.mktemp("peers")
    cases = json.dumps({name: case[:3] for name, case in CASES.items()})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cases],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (codes[name], (folder / f"{name} {1 - case[0]}").read_text()) for name, case in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_nobody_waits_for_a_process_that_has_died(case, ends):
    *_, code, message = CASES[case]
    assert ends[case][0] == code and message in ends[case][1], ends[case]


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_a_training_saves_and_stops_when_its_launcher_is_killed(tokenizer_arguments, tmp_path):
    arguments = [*tokenizer_arguments, "--loop.num_steps", "100000", "--loop.save_every", "5", "--loop.tracker", "null"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(port), "-m", "nextblock", "train-tokenizer", *arguments]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        launcher = subprocess.Popen(
            [*command, "--output_dir", str(tmp_path / "run")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    children: list[int] = []
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("run/checkpoints/step_*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(children) >= 2, (tmp_path / "log").read_text()
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 30
        while any(map(is_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.1)
        text = (tmp_path / "log").read_text()
        assert not any(map(is_alive, children)), text
        assert f"the launcher (process {launcher.pid}) is gone" in text
        assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["outcome"] == "stopped by SIGTERM"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# Rank 1 falls silent where a training opens its images, long before its first step.
BEFORE_FIT = """
import os, signal, sys
from nextblock import train_tokenizer
from nextblock.__main__ import main
from nextblock.training.peers import PeerWatch

PeerWatch.__init__.__defaults__ = (2.0,)
if os.environ["RANK"] == "1":
    train_tokenizer.open_training_images = lambda *args, **options: os.kill(os.getpid(), signal.SIGSTOP)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_process_that_dies_before_the_first_step_is_not_waited_for(tokenizer_arguments, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = ["train-tokenizer", *tokenizer_arguments, "--loop.tracker", "null", "--data.on_error", "skip"]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BEFORE_FIT, *arguments, "--output_dir", str(tmp_path / "run")],
            env=os.environ | names | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = ranks[0].communicate(timeout=120)[0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 1 and f"{RANK_1} has not been heard of for 2 s; rank 0 ends" in output, output
