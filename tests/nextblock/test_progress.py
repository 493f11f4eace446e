"""Waiting for the files of other processes has an end."""

from types import SimpleNamespace

import pytest

from nextblock import progress


def test_a_file_that_does_not_come_is_named_and_waited_for_no_longer(monkeypatch):
    monkeypatch.setattr(progress, "_FILES_SECONDS", 0.3)
    bar = progress.Progress(SimpleNamespace(num_processes=1, is_main_process=False), "test", 10, 0)
    missing = ["late", "late", None]
    bar.wait_for_files(lambda: missing.pop(0))
    assert missing == []
    message = "part 7 of rank 1 is not there, 0 s after all 1 processes .* all machines share"
    with pytest.raises(progress.MissingPartError, match=message):
        bar.wait_for_files(lambda: "part 7 of rank 1")


def test_a_process_that_is_still_at_work_is_waited_for(monkeypatch):
    monkeypatch.setattr(progress, "_FILES_SECONDS", 0.0)
    counts = {}

    class Store:
        def add(self, name: str, number: int) -> int:
            counts[name] = counts.get(name, 0) + number
            return counts[name]

    monkeypatch.setattr(progress.dist.distributed_c10d, "_get_default_store", Store)
    bar = progress.Progress(SimpleNamespace(num_processes=2, is_main_process=False), "test", 10, 0)
    other = progress.Progress(SimpleNamespace(num_processes=2, is_main_process=False), "next job", 10, 0)
    bar.finish_share()
    other.finish_share()
    looks = ["part"] * 4 + [None]
    bar.wait_for_files(lambda: looks.pop(0))
    bar.finish_share()  # The other process's.
    with pytest.raises(progress.MissingPartError, match="part is not there"):
        bar.wait_for_files(lambda: "part")
