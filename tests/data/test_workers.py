"""Loader workers end with the process that they load for, however it ends, and not before."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import pytest
from torch.utils.data import DataLoader, Dataset

from nextblock.data.workers import STOP_SIGNALS, batches_of, start_worker

# Two workers, of which one is at a sample that takes an hour.
PROGRAM = """
import os, signal, sys, time
from multiprocessing import active_children
from torch.utils.data import DataLoader, Dataset
from nextblock.data.workers import batches_of, start_worker

class Samples(Dataset):
    def __getitem__(self, index):
        time.sleep(3600 if index == 1 else 0)
        return index
    def __len__(self):
        return 9

with batches_of(DataLoader(Samples(), num_workers=2, worker_init_fn=start_worker)) as batches:
    next(batches)
    print(*[worker.pid for worker in active_children()], flush=True)
    END
"""
ENDS = {
    "an error": ("raise KeyError('an error of the main process')", 1, "an error of the main process"),
    "a killed worker": ("active_children()[0].kill(); next(batches)", 1, "Error"),
    "a killed process": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    "leaving early": ("sys.exit(0)", 0, ""),
}


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_at_once_and_its_workers_with_it(end):
    statement, status, message = ENDS[end]
    program = [sys.executable, "-c", PROGRAM.replace("END", statement)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and message in done.stderr, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    deadline = time.monotonic() + 3
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(is_running, pids))


class Numbers(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_live_through_signals_and_end_with_the_context(num_workers):
    loader = DataLoader(Numbers(), num_workers=num_workers, worker_init_fn=start_worker, collate_fn=list)
    before = set(active_children())
    with batches_of(loader) as batches:
        seen = next(batches)
        workers = set(active_children()) - before
        for worker in workers:
            for number in STOP_SIGNALS:
                os.kill(worker.pid, number)
        seen += [index for batch in batches for index in batch]
    assert len(workers) == num_workers and not set(active_children()) - before
    assert seen == list(range(40))
