"""Token shards and their manifest: what is written is read back, and what does not fit is refused."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from nextblock.data.blocks import BlockLayout
from nextblock.data.token_shards import index_dtype, write_shard
from nextblock.data.tokens import MANIFEST_NAME, TokenDataset, TokenManifest, collate_tokens
from nextblock.files.atomic import file_sha256
from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.order import StepSampler

LAYOUT = BlockLayout.scales([1, 2])
CLASS_NAMES = ["one", "two", "three"]


def make_rows(num_rows: int, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random indices (N, L), the largest among them, and labels (N,)."""
    rng = np.random.default_rng(seed)
    idx = rng.integers(0, vocab_size, (num_rows, LAYOUT.num_tokens))
    idx[0, 0] = vocab_size - 1
    return idx, rng.integers(0, len(CLASS_NAMES), num_rows)


def make_folder(folder, vocab_size: int = 24, class_names=tuple(CLASS_NAMES), **manifest):
    """A folder of tokens: a training split of 7 + 5 rows and a held-out one of 3."""
    (folder / "data").mkdir(parents=True)
    splits, rows = {}, {}
    for split, counts in (("train", (7, 5)), ("test", (3,))):
        idx, class_labels = make_rows(sum(counts), vocab_size)
        rows[split], shards, start = (idx, class_labels), [], 0
        for number, count in enumerate(counts):
            file, end = f"data/{split}-{number:05d}.parquet", start + count
            ids = [f"{split}/{row}" for row in range(start, end)]
            views = np.zeros(count, dtype=np.int64)
            labels = class_labels[start:end]
            write_shard(folder / file, idx[start:end], labels, ids, views, class_names, vocab_size)
            shards.append({"file": file, "num_rows": count, "sha256": file_sha256(folder / file)})
            start = end
        splits[split] = {"num_images": sum(counts), "num_views": 1, "shards": shards}
    fields = {"layout": LAYOUT.to_dict(), "vocab_size": vocab_size, "embedding_dim": 4, "tokenizer_sha256": "0"}
    fields |= {"image_size": [8, 8], "class_names": list(class_names), "data": {}, "transform": {}}
    fields |= {"num_augmented_views": 0, "seed": 0, "splits": splits}
    TokenManifest(**fields | manifest).save(folder)
    return rows


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = make_folder(tmp_path)
    for split, (idx, class_labels) in rows.items():
        dataset = TokenDataset(tmp_path, split)
        assert len(dataset) == len(idx) and dataset.layout == LAYOUT
        keys = [len(idx) - 1, 0, (4, 1)]
        batch = dataset.__getitems__(keys)
        assert batch["labels"].tolist() == idx[[len(idx) - 1, 0, 1]].tolist()
        assert batch["class_labels"].tolist() == class_labels[[len(idx) - 1, 0, 1]].tolist()
        assert batch["index"].tolist() == [len(idx) - 1, 0, 1]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert dataset[2]["labels"].tolist() == [idx[2].tolist()]
        with pytest.raises(IndexError):
            dataset[len(idx)]


def test_a_loader_with_the_step_sampler_yields_batches(tmp_path):
    idx, class_labels = make_folder(tmp_path)["train"]
    options = {"num_micro_batches": 2, "seed": 1, "steps": range(4), "rank": 1, "world_size": 2}
    sampler = StepSampler(len(idx), 4, **options)
    loader = DataLoader(TokenDataset(tmp_path, "train"), batch_sampler=sampler, collate_fn=collate_tokens)
    for keys, batch in zip(sampler, loader, strict=True):
        rows = [row for _, row in keys]
        assert batch["index"].tolist() == rows and batch["labels"].tolist() == idx[rows].tolist()
        assert batch["class_labels"].tolist() == class_labels[rows].tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_indices_are_as_narrow_as_the_codebook_allows(tmp_path, vocab_size, dtype):
    assert index_dtype(vocab_size) == dtype
    idx, _ = make_folder(tmp_path, vocab_size)["train"]
    batch = TokenDataset(tmp_path, "train").__getitems__(range(12))
    assert batch["labels"][0, 0] == vocab_size - 1 and batch["labels"].tolist() == idx.tolist()
    schema = pq.read_schema(tmp_path / "data" / "train-00000.parquet")
    assert str(schema.field("idx").type.value_type) == dtype


def test_shards_open_with_the_datasets_library(tmp_path):
    idx, class_labels = make_folder(tmp_path)["train"]
    files = {"train": str(tmp_path / "data" / "train-*.parquet"), "test": str(tmp_path / "data" / "test-*.parquet")}
    opened = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert opened.num_rows == {"train": 12, "test": 3}
    assert opened["train"].features == datasets.Features(
        {
            "idx": datasets.List(datasets.Value("uint16")),
            "label": datasets.ClassLabel(names=CLASS_NAMES),
            "image_id": datasets.Value("string"),
            "view": datasets.Value("int32"),
        }
    )
    assert opened["train"][:]["idx"] == idx.tolist()
    assert opened["train"][:]["label"] == class_labels.tolist()
    assert opened["train"][8]["image_id"] == "train/8"


def test_unconditional_shards_have_plain_labels(tmp_path):
    make_folder(tmp_path, class_names=())
    files = str(tmp_path / "data" / "test-*.parquet")
    opened = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert opened["train"].features["label"] == datasets.Value("int64")


def test_a_shard_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def crash(path):
        raise OSError("disk full")

    idx, labels = make_rows(2, 24)
    monkeypatch.setattr("nextblock.files.atomic.flush_to_disk", crash)
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "a.parquet", idx, labels, ["a", "b"], np.zeros(2), CLASS_NAMES, 24)
    assert not (tmp_path / "a.parquet").exists()


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    make_folder(tmp_path, seed=9)
    manifest = TokenManifest.load(tmp_path)
    assert (manifest.seed, manifest.vocab_size, manifest.class_names) == (9, 24, CLASS_NAMES)
    assert BlockLayout.from_dict(manifest.layout) == LAYOUT
    before = (tmp_path / MANIFEST_NAME).read_text()
    manifest.save(tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", MANIFEST_NAME]


def test_an_unfinished_folder_and_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no manifest.json; expected a folder that `nextblock tokenize` finished"):
        TokenManifest.load(tmp_path)
    make_folder(tmp_path, format_version=2)
    with pytest.raises(ValueError, match="has format_version 2; expected 1"):
        TokenDataset(tmp_path, "train")


def test_damaged_shards_are_refused_by_name(tmp_path):
    make_folder(tmp_path)
    shard = tmp_path / "data" / "train-00001.parquet"
    content = shard.read_bytes()
    # A byte of the first page of indices, which Parquet itself would not miss.
    for damaged in (content[:-1], content[:12] + bytes([content[12] ^ 1]) + content[13:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-00001.parquet has changed since it was written"):
            TokenDataset(tmp_path, "train")
    shard.unlink()
    with pytest.raises(ValueError, match="train-00001.parquet is missing; its manifest lists it"):
        TokenDataset(tmp_path, "train")
    assert len(TokenDataset(tmp_path, "test")) == 3


def test_a_manifest_that_does_not_fit_its_shards_is_refused(tmp_path):
    make_folder(tmp_path)
    path = tmp_path / MANIFEST_NAME
    fields = json.loads(path.read_text())
    with pytest.raises(ValueError, match=r"split is 'validation'; .* has the splits \['train', 'test'\]"):
        TokenDataset(tmp_path, "validation")
    for changes, message in (
        ({"layout": BlockLayout.scales([1, 3]).to_dict()}, "rows of 5 tokens from 0 to 23; expected 10 tokens from 0"),
        ({"vocab_size": 23}, "rows of 5 tokens from 0 to 23; expected 5 tokens from 0 to 22"),
    ):
        path.write_text(json.dumps(fields | changes))
        with pytest.raises(ValueError, match=message):
            TokenDataset(tmp_path, "train")
    fields["splits"]["train"]["shards"][0]["num_rows"] = 8
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="train-00000.parquet has 7 rows; expected 8 as in its manifest"):
        TokenDataset(tmp_path, "train")


def make_tokenizer(seed: int = 0, **options) -> VQVAE:
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "hidden_dim": 4, "embedding_dim": 4, "vocab_size": 24, "layout": "scales"}
    return VQVAE(VQVAEConfig(**sizes | {"scales": [1, 2], "num_phi": 1} | options)).eval()


def test_the_fingerprint_covers_weights_and_arithmetic(tmp_path):
    model = make_tokenizer()
    fingerprint = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(VQVAE.from_pretrained(tmp_path)) == fingerprint
    assert model_fingerprint(make_tokenizer().train()) == fingerprint
    others = [make_tokenizer(seed=1), make_tokenizer().bfloat16()]
    others += [make_tokenizer(phi_ratio=0.25), make_tokenizer(codebook_metric="cosine")]
    others += [make_tokenizer(has_unit_codes=True), make_tokenizer(codebook_metric="cosine", has_unit_codes=True)]
    others += [make_tokenizer(var_phi_names="shared")]
    with torch.no_grad():
        others.append(make_tokenizer())
        others[-1].quantizer.codebook.weight[-1, -1] += 1e-6
    assert len({fingerprint, *map(model_fingerprint, others)}) == 9


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(tmp_path):
    model = make_tokenizer()
    make_folder(tmp_path, tokenizer_sha256=model_fingerprint(model))
    manifest = TokenManifest.load(tmp_path)
    manifest.check_tokenizer(model, tmp_path)
    vqgan = {"autoencoder": "vqgan", "width_multipliers": [1, 1, 1, 1], "num_res_blocks": 1}
    for options, difference in (
        ({"layout": "tiles", "scales": None}, "layout {'kind': 'tiles', 'tile': .* expected {'kind': 'scales'"),
        ({"vocab_size": 25}, "vocab_size 25; expected 24"),
        ({"image_size": 16, "scales": [1, 4]}, "layout"),
        ({"image_size": 16} | vqgan, r"image_size \[16, 16\]; expected \[8, 8\]"),
        ({"seed": 1}, "weights [0-9a-f]{64}; expected [0-9a-f]{64}, of the tokenizer that made"),
    ):
        with pytest.raises(ValueError, match=f"the tokenizer has {difference}"):
            manifest.check_tokenizer(make_tokenizer(**options), tmp_path)
