"""Verification: a whole folder passes, and each kind of damage is named."""

import json
import os
import shutil

import numpy as np
import pytest

from nextblock.data.token_shards import write_shard
from nextblock.data.tokens import MANIFEST_NAME
from nextblock.files.atomic import file_sha256
from nextblock.verify import VerifyConfig, damage_of, main, verify

SHARD = "data/train-00001-of-00004.parquet"


@pytest.fixture
def folder(tokens_dir, tmp_path):
    return shutil.copytree(tokens_dir, tmp_path / "tokens")


def rewrite(folder, changes=None, file=SHARD, **columns):
    """Write a shard anew with other columns, with its checksum and `changes` in the manifest."""
    columns = {"idx": np.ones((40, 21), int), "class_labels": np.zeros(40, int), "views": np.ones(40, int)} | columns
    columns["idx"] = columns["idx"][: len(columns["views"])]
    names = ["blue tit", "great tit", "wren"] if columns["class_labels"].max() < 3 else ()
    ids = [str(n) for n in range(len(columns["views"]))]
    write_shard(folder / file, **columns, image_ids=ids, class_names=names, vocab_size=24)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        if shard["file"] == file:
            shard |= {"sha256": file_sha256(folder / file)} | (changes or {})
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_a_whole_folder_passes(folder, capsys):
    assert damage_of(folder) == []
    with pytest.raises(SystemExit) as exit_info:
        main(["--tokens", str(folder)])
    assert exit_info.value.code == 0 and "tokens: whole" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged: "), ("[1]", "holds list; expected the manifest")])
def test_a_manifest_that_is_none_is_named(folder, text, message):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} {message}"):
        damage_of(folder)


@pytest.mark.parametrize("name", [SHARD, "rejected.jsonl", MANIFEST_NAME])
def test_a_pipe_in_a_files_place_is_named_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == MANIFEST_NAME:
        with pytest.raises(ValueError, match="has no manifest.json"):
            damage_of(folder)
        return
    (problem,) = damage_of(folder)
    assert name in problem and ("is a pipe" in problem or "is missing" in problem)


def test_damaged_and_missing_files_are_named(folder, capsys):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    (folder / "data" / "stranger.parquet").touch()
    (folder / "rejected.jsonl").write_text('{"split": "test"}\n')
    assert verify(VerifyConfig(tokens=str(folder))) == 1
    stranger, changed, missing, listed, last = capsys.readouterr().out.splitlines()
    assert "stranger.parquet is not in the manifest" in stranger
    assert SHARD in changed and "has changed since it was written" in changed
    assert "test-00000-of-00001.parquet is missing" in missing
    assert "lists 1 images of split 'test'; expected 0" in listed and last.endswith("4 problems")
    (folder / "rejected.jsonl").write_text("no json\n")
    assert "rejected.jsonl cannot be read" in damage_of(folder)[-1]
    (folder / MANIFEST_NAME).unlink()
    assert verify(VerifyConfig(tokens=str(folder))) == 1
    assert "has no manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"idx": np.full((40, 21), 24)}, "idx spans 24 to 24; expected 0 to 23"),
        ({"idx": np.ones((40, 20), int)}, "has rows of 20 tokens; expected 21"),
        ({"class_labels": np.full(40, 3)}, "label spans 3 to 3; expected 0 to 2"),
        ({"views": np.full(40, 3)}, "view spans 3 to 3; expected 0 to 2"),
        ({"views": np.full(40, 2)}, r"split 'train' has \[40, 16, 88\] rows by view; expected \[48, 48, 48\]"),
        ({"views": np.ones(39, int), "class_labels": np.zeros(39, int)}, "has 39 rows; expected 40"),
        ({"rejected": [{"row": 1}]}, "its shards tell of 1 rejected rows"),
    ],
)
def test_rows_that_do_not_fit_are_named(folder, columns, message):
    rewrite(folder, **columns)
    with pytest.raises(AssertionError, match=message):
        assert not damage_of(folder), "\n".join(damage_of(folder))
