"""Run tokenization jobs and kill them: `killed_jobs.py JSON`, a process that forks the processes of every job.

One import serves all jobs. It prints a line for each kill and compares each finished folder with an undisturbed one.
"""

import filecmp
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401  the shard writer needs it, and forked processes should find it imported
import torch

from nextblock.tokenizer.tokenize_dataset import TokenizeConfig, tokenize
from nextblock.training.config import parse_run_config


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(num_processes: int, arguments: list[str]) -> list[int]:
    """Fork the processes of a job."""
    port, pids = free_port(), []
    for rank in range(num_processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            torch.use_deterministic_algorithms(True)
            if num_processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            tokenize(parse_run_config(TokenizeConfig, prog="killed", argv=arguments))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def finish(pids: list[int]) -> None:
    """Wait for a job to end well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids), codes


def kill(pids: list[int]) -> bool:
    """SIGKILL every process of a job; whether any was still at work."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return -signal.SIGKILL in codes


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same(folder: Path, expected: Path) -> None:
    assert content(folder) == content(expected), set(content(folder)) ^ set(content(expected))
    for name in content(expected):
        assert filecmp.cmp(folder / name, expected / name, shallow=False), name


def main() -> None:
    options = json.loads(sys.argv[1])
    root, rng = Path(options["root"]), random.Random(options["seed"])
    reference = root / "undisturbed"
    finish(start(1, [*options["arguments"], "--output_dir", str(reference)]))
    started = time.monotonic()
    finish(start(2, [*options["arguments"], "--output_dir", str(root / "two")]))
    seconds = time.monotonic() - started
    assert_same(root / "two", reference)
    num_kills, number = 0, 0
    while num_kills < options["num_kills"]:
        folder = root / f"killed_{number}"
        arguments = [*options["arguments"], "--output_dir", str(folder)]
        for _ in range(2):
            if num_kills == options["num_kills"]:
                break
            pids = start(2, arguments)
            time.sleep(rng.uniform(0, 0.9 * seconds))
            if kill(pids):
                num_kills += 1
                shards = len(list(folder.glob("data/[!.]*"))) if folder.exists() else -1
                print(f"kill {num_kills}: {shards} shards of {len(list(reference.glob('data/*')))}", flush=True)
        finish(start(1 + number % 3, arguments))
        assert_same(folder, reference)
        number += 1
    print(f"{num_kills} kills, {number} folders equal")


if __name__ == "__main__":
    main()
