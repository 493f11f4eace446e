"""Files are whole or not there, on a full disk too."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nextblock.files.atomic import UnwrittenError, write_text_whole, write_whole, writing


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text_whole(path, "old")
    write_text_whole(path, "nöw")
    assert path.read_text(encoding="utf-8") == "nöw" and [entry.name for entry in tmp_path.iterdir()] == ["file.json"]

    def crash(path):
        raise OSError("disk full")

    monkeypatch.setattr("nextblock.files.atomic.flush_to_disk", crash)
    with pytest.raises(OSError, match="disk full"):
        write_text_whole(path, "never")
    assert path.read_text(encoding="utf-8") == "nöw" and os.listdir(tmp_path) == ["file.json"]


def test_a_file_that_is_not_what_was_to_be_written_is_not_put_in_place(tmp_path):
    def check(path):
        assert path.read_bytes() == b"new"
        raise ValueError("not what was meant")

    with pytest.raises(ValueError, match="not what was meant"):
        write_whole(tmp_path / "file", lambda file: file.write(b"new"), check)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, full_disk, size):
    path, content = tmp_path / "file", b"x" * size
    tensors = {"x": torch.zeros(size)}
    writers = {
        "text": lambda: write_text_whole(path, content.decode()),
        "torch": lambda: write_whole(path, lambda file: torch.save(tensors, file)),
        "archive": lambda: write_whole(path, lambda file: np.savez(file, np.frombuffer(content, np.uint8))),
    }
    for name, write in writers.items():
        with full_disk(500), pytest.raises(UnwrittenError, match=f"{path} could not be written: File too large"):
            write()
        assert os.listdir(tmp_path) == [], name
    for save in (torch.save, save_file):
        with full_disk(500), pytest.raises(UnwrittenError, match=f"{path} could not be written: "), writing(path):
            save(tensors, path)


def test_faults_are_not_taken_for_a_full_disk(tmp_path):
    for error in (RuntimeError("shapes do not fit"), KeyError("x"), ValueError("y")):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
