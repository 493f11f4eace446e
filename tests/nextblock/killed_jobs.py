"""Run tokenization jobs and kill them: `killed_jobs.py JSON`, a process that forks the processes of every job.

One import serves all jobs. It prints a line for each kill, compares each finished folder with an undisturbed one, and
counts the restarts of unfinished folders by their numbers of processes.
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
from collections import Counter
from pathlib import Path

import datasets  # noqa: F401  the shard writer needs it, and forked processes should find it imported
import torch

from nextblock.command_line import parse_run_config
from nextblock.tokenize_images import TokenizeConfig, tokenize


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
            tokenize(parse_run_config(TokenizeConfig, command="killed", argv=arguments))
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


def shards_in(folder: Path) -> int:
    """The number of whole shards, −1 before there is a folder."""
    return len(list(folder.glob("data/[!.]*"))) if folder.exists() else -1


def wait_for_shards(folder: Path, num_shards: int, seconds: float) -> None:
    """Wait until so many shards are there, but no longer than so."""
    deadline = time.monotonic() + seconds
    while shards_in(folder) < num_shards and time.monotonic() < deadline:
        time.sleep(0.002)


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
    num_kills, number, num_shards, restarts = 0, 0, [], Counter()
    while num_kills < options["num_kills"]:
        folder = root / f"killed_{number}"
        arguments = [*options["arguments"], "--output_dir", str(folder)]
        for _ in range(2):
            if num_kills == options["num_kills"]:
                break
            pids = start(2, arguments)
            # Starting takes most of a short job, so every other moment is one between the first shard and the last.
            if num_kills % 2:
                time.sleep(rng.uniform(0, 0.9 * seconds))
            else:
                wait_for_shards(folder, rng.randrange(1, shards_in(reference)), 2 * seconds)
            if kill(pids):
                num_kills += 1
                num_shards.append(shards_in(folder))
                print(f"kill {num_kills}: {num_shards[-1]} shards of {shards_in(reference)}", flush=True)
        num_processes = 1 + number % 3
        restarts[num_processes] += not (folder / "manifest.json").exists()
        finish(start(num_processes, arguments))
        assert_same(folder, reference)
        number += 1
    counts = {"kills": num_kills, "equal_folders": number, "restarts": [restarts[n] for n in (1, 2, 3)]}
    print(json.dumps(counts | {"num_shards": num_shards}))


if __name__ == "__main__":
    main()
