"""Indices of large codebooks: stored in uint32 up to 2^32 codes, read back exactly, and refused beyond."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import CodeDigits
from nextblock.data.token_shards import index_dtype, write_shard
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.files.atomic import file_sha256

LAYOUT = BlockLayout.tiles(1, (1, 3))


def make_folder(folder, vocab_size, idx, **fields) -> TokenManifest:
    """Write a folder of one shard."""
    (folder / "data").mkdir(parents=True)
    path = folder / "data" / "train-00000-of-00001.parquet"
    names = [str(n) for n in range(len(idx))]
    write_shard(path, idx, np.zeros(len(idx)), names, np.zeros(len(idx)), [], vocab_size)
    shard = {"file": f"data/{path.name}", "num_rows": len(idx), "sha256": file_sha256(path)}
    manifest = TokenManifest(
        layout=LAYOUT.to_dict(),
        vocab_size=vocab_size,
        embedding_dim=4,
        tokenizer_sha256="",
        image_size=[4, 4],
        class_names=[],
        data={"split": "train", "eval_split": None},
        transform={},
        num_augmented_views=0,
        seed=0,
        splits={"train": {"num_images": len(idx), "num_views": 1, "shards": [shard]}},
        **fields,
    )
    manifest.save(folder)
    return manifest


@pytest.mark.parametrize(
    ("num_bits", "dtype", "max_memory"),
    [(16, "uint16", 1 << 28), (17, "uint32", 1 << 28), (32, "uint32", 1 << 28), (32, "uint32", 0)],
)
def test_indices_come_back_as_they_were(num_bits, dtype, max_memory, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    idx = np.random.default_rng(0).integers(1 << num_bits, size=(5, 3))
    idx[0] = 0, (1 << num_bits) - 1, 1 << (num_bits - 1)
    make_folder(tmp_path / "tokens", 1 << num_bits, idx, code_bases=[2] * num_bits)
    path = tmp_path / "tokens" / "data" / "train-00000-of-00001.parquet"
    assert index_dtype(1 << num_bits) == dtype and str(pq.read_schema(path).field("idx").type.value_type) == dtype
    dataset = TokenDataset(tmp_path / "tokens", "train", max_memory=max_memory)
    labels = dataset.__getitems__(list(range(5)))["labels"]
    assert labels.numpy().tolist() == idx.tolist() and dataset.manifest.code_bases == [2] * num_bits


def test_more_codes_than_uint32_holds_are_refused(tmp_path):
    message = "vocab_size is 4294967297; expected at most 4294967296: uint64 indices are not stored"
    with pytest.raises(ValueError, match=message):
        make_folder(tmp_path / "tokens", (1 << 32) + 1, np.zeros((1, 3), np.int64))
    manifest = make_folder(tmp_path / "others", 16, np.zeros((1, 3), np.int64))
    replace(manifest, vocab_size=(1 << 32) + 1).save(tmp_path / "others")
    with pytest.raises(ValueError, match=message):
        TokenManifest.load(tmp_path / "others")


def test_digits_that_do_not_make_the_codes_are_refused(tmp_path):
    manifest = make_folder(tmp_path / "tokens", 16, np.zeros((1, 3), np.int64))
    for bases in ([2, 2, 2], [16, 1], ["2"], [4, True]):
        replace(manifest, code_bases=bases).save(tmp_path / "tokens")
        with pytest.raises(ValueError, match="is no manifest of a folder of tokens: (code_)?bases"):
            TokenManifest.load(tmp_path / "tokens")


def test_a_tokenizer_of_other_digits_is_refused_where_they_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr("nextblock.data.tokens.model_fingerprint", lambda model: "")
    config = SimpleNamespace(vocab_size=16, image_size=[4, 4])

    def tokenizer(bases):
        digits = None if bases is None else CodeDigits(bases)
        return SimpleNamespace(layout=LAYOUT, config=config, quantizer=SimpleNamespace(digits=digits))

    known = make_folder(tmp_path / "known", 16, np.zeros((1, 3), np.int64), code_bases=[2, 8])
    known.check_tokenizer(tokenizer([2, 8]), tmp_path)
    for bases in ([8, 2], [16], None):
        with pytest.raises(ValueError, match=r"the tokenizer has code_bases .*; expected \[2, 8\]"):
            known.check_tokenizer(tokenizer(bases), tmp_path)
    older = make_folder(tmp_path / "older", 16, np.zeros((1, 3), np.int64))
    older.check_tokenizer(tokenizer([8, 2]), tmp_path)
    assert "code_bases" in known.as_job() and "code_bases" not in older.as_job()
