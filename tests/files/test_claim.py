"""One command at a time in a folder: who comes second is told who is there, and a claim ends with its process."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from nextblock.files import claim
from nextblock.files.atomic import UnwrittenError
from nextblock.files.claim import LOCK_NAME, claimed, is_occupied

fork = multiprocessing.get_context("fork")


class Alone:
    """A process among others for whom it never waits."""

    def __init__(self, is_main_process: bool):
        self.is_main_process = is_main_process

    def wait_for_everyone(self) -> None:
        pass


def compete(folder, barrier, won, done) -> None:
    """Try to claim a folder at the moment when the others do."""
    barrier.wait()
    try:
        with claimed(folder):
            won.put(os.getpid())
            done.wait(60)
    except ValueError as error:
        won.put(str(error))


@pytest.mark.parametrize("number", range(5))
def test_of_many_that_start_in_one_instant_one_works(tmp_path, number):
    folder = tmp_path / "new" / "out"
    if number % 2:  # With what a killed command has left.
        folder.mkdir(parents=True)
        (folder / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere", "since": "long ago"}')
    barrier, won, done = fork.Barrier(6), fork.Queue(), fork.Event()
    processes = [fork.Process(target=compete, args=(folder, barrier, won, done)) for _ in range(6)]
    for process in processes:
        process.start()
    answers = [won.get(timeout=30) for _ in processes]
    (winner,) = [answer for answer in answers if isinstance(answer, int)]
    for answer in answers:
        if answer != winner:
            assert f"output_dir {folder} is in use by process {winner} on {socket.gethostname()} since 20" in answer
    assert os.listdir(folder) == [LOCK_NAME] and json.loads((folder / LOCK_NAME).read_text())["pid"] == winner
    done.set()
    for process in processes:
        process.join(30)
    assert list(tmp_path.rglob(LOCK_NAME)) == [] and (folder.exists() or not number % 2)


def hold(folder, is_main_process, ready, forks_child=False) -> None:
    with claimed(folder, Alone(is_main_process)):
        if forks_child:
            os.fork()
        ready.release()
        time.sleep(60)


def test_a_claim_ends_with_its_process_though_a_forked_worker_lives_on(tmp_path):
    ready = fork.Semaphore(0)
    process = fork.Process(target=hold, args=(tmp_path, True, ready, True))
    process.start()
    assert ready.acquire(timeout=30) and ready.acquire(timeout=30)
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="utf-8") as file:
        (worker,) = map(int, file.read().split())
    with pytest.raises(ValueError, match=f"is in use by process {process.pid} on"), claimed(tmp_path):
        pass
    process.kill()
    process.join()
    with claimed(tmp_path):
        os.kill(worker, signal.SIGKILL)  # It is alive.
    assert os.listdir(tmp_path) == []


def test_each_process_of_a_command_keeps_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_VANISH_SECONDS", 0.3)
    ready = fork.Semaphore(0)
    ranks = [fork.Process(target=hold, args=(tmp_path, is_main, ready)) for is_main in (True, False)]
    for process in ranks:
        process.start()
        assert ready.acquire(timeout=30)
    ranks[0].kill()
    ranks[0].join()
    with pytest.raises(ValueError, match=f"is in use by process {ranks[0].pid} on"), claimed(tmp_path):
        pass
    threading.Timer(0.2, ranks[1].kill).start()
    monkeypatch.setattr(claim, "_VANISH_SECONDS", 30.0)
    with claimed(tmp_path):  # The processes of a killed command are waited for.
        assert not ranks[1].is_alive()


def test_a_folder_is_left_as_it_was_found(tmp_path):
    with ExitStack() as stack:
        stack.enter_context(claimed(tmp_path / "a" / "b"))
        assert not is_occupied(tmp_path / "a" / "b") and is_occupied(tmp_path / "a")
        with pytest.raises(ValueError, match="pipeline_dir .*b is in use by this very process"):
            stack.enter_context(claimed(tmp_path / "a" / ".." / "a" / "b", option="pipeline_dir"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), claimed(tmp_path / "a"):
        (tmp_path / "a" / "kept").touch()
        raise KeyError
    assert os.listdir(tmp_path / "a") == ["kept"]


def test_what_cannot_be_claimed_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / LOCK_NAME)
    (tmp_path / "linked").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "linked" / LOCK_NAME).symlink_to("../precious")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "file/below", "link", "pipe", "linked"):
        with pytest.raises(ValueError, match=f"output_dir .*/{name}.*; expected"), claimed(tmp_path / name):
            pass
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "precious").read_text() == "precious"


def test_a_disk_that_cannot_even_hold_a_claim_is_named(tmp_path, full_disk):
    with full_disk(0), pytest.raises(UnwrittenError, match="new/.nextblock.lock could not be written: "):
        with claimed(tmp_path / "new"):
            pass
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, kind):
        raise OSError(claim.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", refuse)
    with claimed(tmp_path / "out"):
        assert "cannot be locked" in caplog.text
    assert os.listdir(tmp_path) == []
