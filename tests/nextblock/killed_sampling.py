"""Run sampling jobs and kill them: `killed_sampling.py JSON`, a process that forks the processes of every job.

One import serves all jobs. It prints what each kill left, and compares the folder in the end with an undisturbed one.
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

from nextblock.sample import main as sample


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(num_processes: int, root: Path, arguments: list[str]) -> list[int]:
    """Fork the processes of a job whose output goes to `out` in a folder."""
    root.mkdir(exist_ok=True)
    port, pids = free_port(), []
    for rank in range(num_processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.chdir(root)
            if num_processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            sample([*arguments, "--output_dir", "out"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def end(pids: list[int]) -> list[int]:
    """Wait for a job's processes; return their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def main() -> None:
    options = json.loads(sys.argv[1])
    root, rng = Path(options["root"]), random.Random(options["seed"])
    assert end(start(1, root / "undisturbed", options["arguments"])) == [0]
    assert end(start(2, root / "two", options["arguments"])) == [0, 0]
    num_entries = len(content(root / "undisturbed"))
    for number in range(options["num_kills"]):
        pids = start(2, root / "killed", options["arguments"])
        # From the very start of a run to well into it, but with work left for the runs to come.
        target = len(content(root / "killed")) + rng.randrange(options["num_parts"] // 12)
        while len(content(root / "killed")) < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert end(pids) == [-signal.SIGKILL] * 2, f"the job ended before kill {number + 1}"
        print(f"kill {number + 1} left {len(content(root / 'killed'))} entries; {num_entries} in the end", flush=True)
    num_processes = options["num_processes"]
    assert end(start(num_processes, root / "killed", options["arguments"])) == [0] * num_processes
    for folder in (root / "two", root / "killed"):
        names = content(root / "undisturbed")
        assert content(folder) == names, set(content(folder)) ^ set(names)
        files = [name for name in names if (folder / name).is_file()]
        assert filecmp.cmpfiles(folder, root / "undisturbed", files, shallow=False) == (files, [], [])
    print(f"{options['num_kills']} kills, {len(files)} files equal")


if __name__ == "__main__":
    main()
