"""Verification: a whole folder passes, and each kind of damage is named."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nextblock.__main__ import main as run_command
from nextblock.data.token_shards import write_shard
from nextblock.data.tokens import MANIFEST_NAME, TokenDataset
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


def changed(value, *place, to):
    """Return a copy of nested JSON with another value at a place, or without it."""
    copied = json.loads(json.dumps(value))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    if to is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = to
    return copied


TRAIN = "splits", "train"
FIRST = *TRAIN, "shards", 0


@pytest.mark.parametrize(
    ("place", "to", "message"),
    [
        (("vocab_size",), KeyError, "it misses vocab_size; expected layout, vocab_size"),
        (("more",), 1, "it has more; expected layout"),
        (("vocab_size",), -3, "vocab_size is -3; expected a whole number of at least 0"),
        (("vocab_size",), "24", "vocab_size is '24'; expected a whole number"),
        (("vocab_size",), 24.0, "vocab_size is 24.0"),
        (("vocab_size",), True, "vocab_size is True"),
        (("vocab_size",), None, "vocab_size is None"),
        (("seed",), "x", "seed is 'x'; expected a int"),
        (("layout",), [], r"layout is \[\]; expected a dict"),
        (("layout",), {"kind": "rings"}, "layout is .*rings"),
        (("layout", "scales"), [1, 10**9], "tokens; expected at most"),
        (("image_size",), [16, "16"], r"image_size is \[16, '16'\]; expected a list\[int\]"),
        (("class_names",), "ab", "class_names is 'ab'; expected a list"),
        (("class_names",), [1], r"class_names is \[1\]"),
        (("splits",), [1], r"splits is \[1\]; expected a dict"),
        (("splits", "train"), 7, "splits is .*; expected a dict"),
        ((*TRAIN, "num_views"), 0, r"splits\['train'\].num_views is 0; expected at least 1"),
        ((*TRAIN, "num_views"), KeyError, r"splits\['train'\] misses num_views"),
        ((*TRAIN, "num_images"), -1, r"splits\['train'\].num_images is -1"),
        ((*TRAIN, "num_rejected"), -1, r"splits\['train'\].num_rejected is -1"),
        ((*TRAIN, "shards"), {}, "shards is {}; expected a list"),
        (FIRST, "x", "shards is .*; expected a list"),
        ((*FIRST, "file"), KeyError, r"shards\[0\] misses file"),
        ((*FIRST, "file"), 3, r"shards\[0\].file is 3; expected a str"),
        ((*FIRST, "file"), "/etc/passwd", "file is '/etc/passwd'; expected a file in the folder"),
        ((*FIRST, "file"), "../x.parquet", "file is '../x.parquet'; expected a file in the folder"),
        ((*FIRST, "num_rows"), "40", r"shards\[0\].num_rows is '40'"),
        ((*FIRST, "sha256"), None, r"shards\[0\].sha256 is None; expected a str"),
        ((*TRAIN, "num_views"), 10**12, r"split 'train' has 144 rows; expected 48 in each of 1000000000000 views"),
        ((*TRAIN, "num_rejected"), KeyError, "split 'train' does not say how many images were rejected"),
        ((*TRAIN, "shards"), [], "split 'train' has 0 rows; expected 48 in each of 3 views"),
    ],
)
def test_a_manifest_whose_fields_are_not_what_they_must_be_is_refused_by_name(folder, capsys, place, to, message):
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(changed(json.loads(path.read_text()), *place, to=to)))
    assert verify(VerifyConfig(tokens=str(folder))) == 1
    said = capsys.readouterr().out
    assert re.search(message, said), said


def test_a_manifest_without_end_is_refused(folder):
    (folder / MANIFEST_NAME).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged"):
        damage_of(folder)


def test_a_folder_that_is_not_there_is_a_mistake(folder, capsys):
    for wrong in (folder / "nowhere", folder / MANIFEST_NAME):
        with pytest.raises(SystemExit) as ended:
            run_command(["verify", "--tokens", str(wrong)])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"nextblock verify: error: tokens is '{wrong}'; expected a folder of tokens\n"


COLUMNS = {
    "idx": pa.array([[1] * 21] * 40, pa.list_(pa.uint16())),
    "label": pa.array([0] * 40, pa.int64()),
    "view": pa.array([1] * 40, pa.int32()),
}


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({"idx": pa.array([[1.5] * 21] * 40)}, None, "column idx holds list.*double>; expected lists of integers"),
        ({"idx": pa.array([["1"] * 21] * 40)}, None, "column idx holds list.*string>; expected lists of integers"),
        ({"idx": pa.array([1] * 40)}, None, "column idx holds int64; expected lists of integers"),
        ({"idx": pa.array([[-1] * 21] * 40)}, None, "idx spans -1 to -1; expected 0 to 23"),
        ({"idx": pa.array([[None] * 21] * 40, pa.list_(pa.int32()))}, None, "has 840 values that are null"),
        ({"idx": pa.array([None] * 40, pa.list_(pa.int32()))}, None, "has 40 values that are null"),
        ({"label": pa.array([0.0] * 40)}, None, "column label holds double; expected integers"),
        ({"label": pa.array([None] * 40, pa.int64())}, None, "has 40 values that are null; expected integers"),
        ({"view": pa.array(["1"] * 40)}, None, "column view holds string; expected integers"),
        ({"view": None}, None, r"has the columns \['idx', 'label'\]; expected idx, label and view"),
        ({}, b"{", "has a list of rejected images that is damaged"),
        ({}, b"7", "has b'7' for its rejected images; expected a list of objects"),
        ({}, b"[7]", "for its rejected images; expected a list of objects"),
    ],
)
def test_columns_that_hold_something_else_are_named(folder, columns, metadata, message):
    columns = {name: column for name, column in (COLUMNS | columns).items() if column is not None}
    table = pa.table(columns).replace_schema_metadata({} if metadata is None else {b"nextblock.rejected": metadata})
    pq.write_table(table, folder / SHARD)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (shard,) = (entry for entry in manifest["splits"]["train"]["shards"] if entry["file"] == SHARD)
    shard["sha256"] = file_sha256(folder / SHARD)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    said = "\n".join(damage_of(folder))
    assert re.search(f"{SHARD}.*{message}", said), said
    if metadata is None:  # What was rejected is no matter to a reader.
        with pytest.raises(ValueError, match=f"{SHARD}|rows of 21 tokens from -1"):
            TokenDataset(folder, "train")


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
