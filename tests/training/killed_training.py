"""Run trainings in processes of their own and kill or signal them in the middle; a script that test_kill.py starts.

It reads a JSON list of attempts, each {"module", "arguments", "output_dir", "num_processes", "ends"}: "ends" maps a
rank to [signal, step, seconds], the signal that the rank gets so many seconds into that step. For each attempt the
ranks' exit codes and what then lies in output_dir go to stdout.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import torch

from nextblock.training.loop import _Training


def signal_self_at(signal_name: str, step: int, delay: float) -> None:
    """Send this process a signal some time after a step begins."""
    take_step, number = _Training._step, signal.Signals[signal_name]

    def step_and_signal(self, micro_batches, current):
        if current == step:
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)
        take_step(self, micro_batches, current)

    _Training._step = step_and_signal


def run_rank(attempt: dict, rank: int, port: int) -> int:
    """Train as one of several processes; return the exit code."""
    if attempt["num_processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(attempt["num_processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if str(rank) in attempt["ends"]:
        signal_self_at(*attempt["ends"][str(rank)])
    torch.use_deterministic_algorithms(True)
    sys.argv = [attempt["module"], *attempt["arguments"]]
    try:
        importlib.import_module(attempt["module"]).main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(attempt: dict) -> tuple[list[int], list[str]]:
    """Start all ranks; once one has ended badly, kill the others, which wait for it in vain."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = {}
    for rank in range(attempt["num_processes"]):
        pid = os.fork()
        if pid == 0:
            code = run_rank(attempt, rank, port)
            sys.stderr.flush()
            os._exit(code)
        ranks[pid] = rank
    codes = [0] * len(ranks)
    for _ in range(len(ranks)):
        pid, status = os.wait()
        codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(codes):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    folder = Path(attempt["output_dir"])
    return codes, sorted(str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("checkpoints/*")))


if __name__ == "__main__":
    attempts = json.loads(sys.argv[1])
    for attempt in attempts:
        importlib.import_module(attempt["module"])  # Once, before the processes fork, rather than in each of them.
    print(json.dumps([run(attempt) for attempt in attempts]))
