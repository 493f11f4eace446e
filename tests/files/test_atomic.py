"""Files are whole or not there."""

import pytest

from nextblock.files.atomic import write_text_whole


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
    assert path.read_text(encoding="utf-8") == "nöw"
