"""Reading many rows: mapped into memory they are those in memory, and views are drawn by image and epoch."""

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch

from nextblock.data import token_shards
from nextblock.data.blocks import BlockLayout
from nextblock.data.token_shards import write_shard
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.files.atomic import file_sha256

LAYOUT, NUM_IMAGES, NUM_VIEWS = BlockLayout.scales([1, 2]), 9, 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four views of nine images: row r holds the tokens 10 r … 10 r + 4. One shard is empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tokens"
    (folder / "data").mkdir(parents=True)
    shards = []
    for number, rows in enumerate((range(0, 15), range(15, 15), range(15, 36))):
        file = f"data/train-{number}.parquet"
        rows = np.array(rows, np.int64)
        idx = rows[:, None] * 10 + np.arange(5)
        ids = [str(row % NUM_IMAGES) for row in rows]
        write_shard(folder / file, idx, rows % NUM_IMAGES, ids, rows // NUM_IMAGES, list("abcdefghi"), 400)
        shards.append({"file": file, "num_rows": len(rows), "sha256": file_sha256(folder / file)})
    fields = {"layout": LAYOUT.to_dict(), "vocab_size": 400, "embedding_dim": 4, "tokenizer_sha256": "0"}
    fields |= {"image_size": [8, 8], "class_names": list("abcdefghi"), "data": {}, "transform": {}, "seed": 0}
    fields |= {"splits": {"train": {"num_images": NUM_IMAGES, "num_views": NUM_VIEWS, "shards": shards}}}
    TokenManifest(**fields, num_augmented_views=3).save(folder)
    return folder


@pytest.mark.parametrize("max_memory", [0, 1 << 20])
def test_mapped_rows_are_those_in_memory(folder, max_memory, tmp_path):
    dataset = TokenDataset(folder, "train", max_memory=max_memory)
    order = np.random.default_rng(0).permutation(36).tolist()
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        batch = copy.__getitems__(order)
        assert batch["labels"].tolist() == [[10 * row + n for n in range(5)] for row in order]
        assert batch["class_labels"].tolist() == [row % NUM_IMAGES for row in order]
        assert batch["labels"].dtype == torch.int64
    caches = list((tmp_path / "cache").rglob("*"))
    assert sorted(path.suffix for path in caches if path.is_file()) == ([] if max_memory else [".arrow", ".lock"])


def test_one_of_many_readers_unpacks_while_the_others_wait(folder, monkeypatch):
    num_unpackings, read = [], token_shards._checked_shards

    def read_slowly(*arguments):
        num_unpackings.append(1)
        for rows in read(*arguments):
            time.sleep(0.05)
            yield rows

    monkeypatch.setattr(token_shards, "_checked_shards", read_slowly)
    with ThreadPoolExecutor(4) as executor:
        opened = list(executor.map(lambda _: TokenDataset(folder, "train", max_memory=0), range(4)))
    assert len(num_unpackings) == 1
    for dataset in opened:
        assert dataset.__getitems__(range(36))["labels"][:, 0].tolist() == [10 * row for row in range(36)]
    # Nothing of it is in the memory of a reader.
    assert all(part.base is not None and not part.flags.owndata for part in opened[0]._idx)


def test_who_was_killed_while_unpacking_or_failed_leaves_it_to_the_next(folder, tmp_path, monkeypatch):
    read = token_shards._checked_shards

    def read_and_die(*arguments):
        yield next(read(*arguments))
        os._exit(9)

    def read_and_fail(*arguments):
        yield next(read(*arguments))
        raise OSError("no space left")

    monkeypatch.setattr(token_shards, "_checked_shards", read_and_die)
    child = os.fork()
    if not child:
        TokenDataset(folder, "train", max_memory=0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    caches = tmp_path / "cache" / "nextblock-tokens"
    assert not list(caches.glob("*.arrow"))
    monkeypatch.setattr(token_shards, "_checked_shards", read_and_fail)
    with pytest.raises(OSError, match="no space left"):
        TokenDataset(folder, "train", max_memory=0)
    monkeypatch.setattr(token_shards, "_checked_shards", read)
    assert len(TokenDataset(folder, "train", max_memory=0)) == 36
    assert sorted(path.suffix for path in caches.iterdir()) == [".arrow", ".lock"]


def test_a_changed_shard_is_noticed_though_it_was_unpacked_before(folder):
    TokenDataset(folder, "train", max_memory=0)
    shard = folder / "data" / "train-2.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(ValueError, match="train-2.parquet has changed since it was written"):
        TokenDataset(folder, "train", max_memory=0)
    shard.unlink()
    with pytest.raises(ValueError, match="train-2.parquet is missing"):
        TokenDataset(folder, "train", max_memory=0)


def test_an_epoch_shows_every_image_once_in_a_view_of_its_own(folder):
    dataset = TokenDataset(folder, "train", samples_views=True, view_seed=1)
    assert len(dataset) == NUM_IMAGES

    def views(epoch, dataset=dataset):
        batch = dataset.__getitems__([(epoch, image) for image in range(NUM_IMAGES)])
        rows = batch["labels"][:, 0] // 10
        assert (rows % NUM_IMAGES).tolist() == batch["index"].tolist() == list(range(NUM_IMAGES))
        assert batch["class_labels"].tolist() == batch["index"].tolist()
        return (rows // NUM_IMAGES).tolist()

    drawn = np.array([views(epoch) for epoch in range(200)])
    assert views(5) == drawn[5].tolist()
    assert views(5, TokenDataset(folder, "train", samples_views=True, view_seed=2)) != drawn[5].tolist()
    counts = np.bincount(drawn.flatten(), minlength=NUM_VIEWS)
    assert counts.min() > 380 and counts.max() < 520 and len(counts) == NUM_VIEWS
    mixed = dataset.__getitems__([(3, 0), (5, 0), 1])["labels"][:, 0] // 10 // NUM_IMAGES
    assert mixed.tolist() == [drawn[3, 0], drawn[5, 0], drawn[0, 1]]


def test_rows_that_are_not_there_are_refused(folder):
    for samples_views, length in ((False, 36), (True, 9)):
        dataset = TokenDataset(folder, "train", samples_views=samples_views)
        for row in (length, -length - 1):
            with pytest.raises(IndexError):
                dataset[row]
        assert dataset[-1]["index"].tolist() == [length - 1]
