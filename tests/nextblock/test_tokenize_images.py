"""Tokenization: rows are the images' indices, views are as promised, and any number of processes writes the same."""

import json

import datasets
import numpy as np
import pytest
import torch

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
from nextblock.data.tokens import MANIFEST_NAME, TokenDataset, TokenManifest
from nextblock.files.atomic import file_sha256
from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenize_images import TokenizeConfig, main, tokenize
from nextblock.tokenizer import VQVAE

NUM_TRAIN, NUM_TEST, NUM_VIEWS = 48, 15, 3
TRANSFORM = TransformConfig(max_shift=2, horizontal_flip=True)


@pytest.fixture(scope="module")
def tokenize_here(run_here, tokenize_arguments):
    """Tokenize the generated images in this process."""

    def run(output_dir, *options) -> TokenizeConfig:
        return run_here(tokenize, TokenizeConfig, *tokenize_arguments, "--output_dir", output_dir, *options)

    return run


def indices(folder, split: str = "train") -> np.ndarray:
    """All rows of a split, (N, L)."""
    rows = TokenDataset(folder, split)
    return rows.__getitems__(range(len(rows)))["labels"].numpy()


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_says_what_the_folder_holds(tokens_dir, tokenizer_dir, image_folder):
    manifest = TokenManifest.load(tokens_dir)
    model = VQVAE.from_pretrained(tokenizer_dir)
    assert manifest.layout == model.layout.to_dict() and manifest.vocab_size == 24
    assert (manifest.image_size, manifest.embedding_dim) == ([16, 16], 4)
    assert manifest.class_names == ["blue tit", "great tit", "wren"]
    assert manifest.tokenizer_sha256 == model_fingerprint(model)
    # Where images lie is no part of what the result depends on.
    assert manifest.data["path"] is None and str(image_folder) not in (tokens_dir / MANIFEST_NAME).read_text()
    assert manifest.transform["max_shift"] == 2.0
    assert manifest.views == ["center crop", "augmentation 1", "augmentation 2"]
    assert (manifest.num_augmented_views, manifest.seed) == (2, 3)
    # 3 × 48 rows of training images and 15 held-out ones, in shards of 40.
    counts = {split: [shard["num_rows"] for shard in entry["shards"]] for split, entry in manifest.splits.items()}
    assert counts == {"train": [40, 40, 40, 24], "test": [15]}
    assert {split: entry["num_images"] for split, entry in manifest.splits.items()} == {"train": 48, "test": 15}
    assert {split: entry["num_views"] for split, entry in manifest.splits.items()} == {"train": 3, "test": 1}
    listed = [shard for entry in manifest.splits.values() for shard in entry["shards"]]
    others = {MANIFEST_NAME, "job.json", "rejected.jsonl", "README.md", "source-train.npz", "source-test.npz"}
    assert {shard["file"] for shard in listed} == files_of(tokens_dir).keys() - others
    assert all(file_sha256(tokens_dir / shard["file"]) == shard["sha256"] for shard in listed)
    assert listed[0]["file"] == "data/train-00000-of-00004.parquet"
    manifest.check_tokenizer(model, tokens_dir)


def test_rows_are_the_indices_of_the_views(tokens_dir, tokenizer_dir, image_folder):
    model = VQVAE.from_pretrained(tokenizer_dir)
    data = ImageDataConfig(source="folder", path=str(image_folder))
    rows = TokenDataset(tokens_dir, "train")
    source = load_source(data, "train")
    originals = ImageDataset(source, (16, 16), TransformConfig(), seed=3)
    augmented = ImageDataset(source, (16, 16), TRANSFORM, seed=3)
    for view in range(NUM_VIEWS):
        items = [augmented[(view, i)] if view else originals[i] for i in range(NUM_TRAIN)]
        batch = collate(items)
        expected = model.layout.join(model.img_to_idxBl(batch["pixel_values"])).numpy()
        got = rows.__getitems__(range(view * NUM_TRAIN, (view + 1) * NUM_TRAIN))
        assert np.array_equal(got["labels"], expected)
        assert torch.equal(got["class_labels"], batch["class_labels"])
    views = indices(tokens_dir).reshape(NUM_VIEWS, NUM_TRAIN, -1)
    assert (views[0] != views[1]).any(1).mean() > 0.9 and (views[1] != views[2]).any(1).mean() > 0.9
    held_out = ImageDataset(load_source(data, "test"), (16, 16), TransformConfig(), seed=0)
    batch = collate([held_out[i] for i in range(NUM_TEST)])
    expected = model.layout.join(model.img_to_idxBl(batch["pixel_values"]))
    assert np.array_equal(indices(tokens_dir, "test"), expected)


def test_shards_open_with_the_datasets_library(tokens_dir, image_folder, tmp_path):
    files = {split: f"{tokens_dir}/data/{split}-*.parquet" for split in ("train", "test")}
    opened = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert opened.num_rows == {"train": NUM_VIEWS * NUM_TRAIN, "test": NUM_TEST}
    train = opened["train"]
    assert train.features["idx"] == datasets.List(datasets.Value("uint16"))
    assert train.features["label"] == datasets.ClassLabel(names=["blue tit", "great tit", "wren"])
    assert train[:]["view"] == [view for view in range(NUM_VIEWS) for _ in range(NUM_TRAIN)]
    source = load_source(ImageDataConfig(source="folder", path=str(image_folder)), "train")
    assert train[:]["image_id"] == NUM_VIEWS * [source.identifier(i) for i in range(NUM_TRAIN)]
    assert train[:]["label"] == NUM_VIEWS * [source.label(i) for i in range(NUM_TRAIN)]
    assert train[:]["idx"] == indices(tokens_dir).tolist()


def test_two_processes_write_the_same_bytes_as_one(two_process_runs, tokens_dir):
    assert files_of(two_process_runs / "tokens") == files_of(tokens_dir)


def test_the_command_and_its_workers_write_the_same_bytes(
    tokenize_arguments, tokens_dir, tmp_path, monkeypatch, fresh_accelerate, capsys
):
    monkeypatch.chdir(tmp_path)
    main([*tokenize_arguments, "--num_workers", "2", "--output_dir", "tokens"])
    assert files_of(tmp_path / "tokens") == files_of(tokens_dir)
    assert "tokens: 144 rows of train, 15 rows of test" in capsys.readouterr().out


def test_another_seed_changes_the_augmented_views_alone(tokenize_here, tokens_dir, tmp_path):
    tokenize_here(tmp_path / "new", "--seed", 4)
    got, other = indices(tmp_path / "new"), indices(tokens_dir)
    assert np.array_equal(got[:NUM_TRAIN], other[:NUM_TRAIN])
    assert not np.array_equal(got[NUM_TRAIN:], other[NUM_TRAIN:])


def test_a_finished_job_stays_and_another_one_is_refused_its_folder(
    tokenize_here, tokens_dir, tokenizer_dir, plain_image_folder, tmp_path
):
    def state():
        return {path: path.stat().st_mtime_ns for path in tokens_dir.rglob("*")}

    before = state()
    tokenize_here(tokens_dir)
    assert state() == before
    VQVAE.from_pretrained(tokenizer_dir, revival_threshold=0.5).save_pretrained(tmp_path / "other")
    for wrong, difference in (
        (["--seed", 4], "seed is 3; this one has 4"),
        (["--rows_per_shard", 41], "rows_per_shard is 40; this one has 41"),
        (["--num_augmented_views", 1], "num_augmented_views is 2; this one has 1"),
        (["--batch_size", 8], "encoding is .*'batch_size': 16.*; this one has .*'batch_size': 8"),
        (["--tokenizer", tmp_path / "other"], "tokenizer_sha256 is "),
        (["--data.path", plain_image_folder], "class_names is .*; this one has "),
    ):
        with pytest.raises(ValueError, match=f"holds another job, whose {difference}"):
            tokenize_here(tokens_dir, *wrong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(ValueError, match="holds files but no job.json; expected a new folder"):
        tokenize_here(tmp_path / "full")
    assert state() == before


def test_an_unfinished_job_is_finished(tokenize_here, tokens_dir, tmp_path, monkeypatch):
    before = files_of(tokens_dir)

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenManifest, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            tokenize_here(tmp_path / "new")
    with pytest.raises(ValueError, match="has no manifest.json"):
        TokenDataset(tmp_path / "new", "train")
    tokenize_here(tmp_path / "new")
    assert files_of(tmp_path / "new") == before


def test_images_without_classes_and_without_a_held_out_split(tokenize_here, plain_image_folder, tmp_path):
    options = ["--data.path", plain_image_folder, "--data.eval_split", "null", "--num_augmented_views", 0]
    tokenize_here(tmp_path / "new", *options)
    manifest = TokenManifest.load(tmp_path / "new")
    assert manifest.class_names == [] and list(manifest.splits) == ["train"]
    rows = TokenDataset(tmp_path / "new", "train")
    assert len(rows) == 12 and not rows.class_labels.any()
    assert (tmp_path / "new" / "rejected.jsonl").read_text() == ""


def test_a_half_precision_tokenizer_is_used_in_float32(tokenize_here, tokenizer_dir, tokens_dir, tmp_path):
    VQVAE.from_pretrained(tokenizer_dir).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenize_here(tmp_path / "new", "--tokenizer", tmp_path / "half")
    manifest = TokenManifest.load(tmp_path / "new")
    manifest.check_tokenizer(VQVAE.from_pretrained(tmp_path / "half", dtype=torch.float32), tmp_path / "new")
    assert manifest.tokenizer_sha256 != TokenManifest.load(tokens_dir).tokenizer_sha256


def test_jobs_that_do_not_fit_are_refused(tokenize_here, tmp_path, capsys):
    for wrong, message in (
        (["--rows_per_shard", 0], "rows_per_shard is 0; expected at least 1"),
        (["--batch_size", 0], "batch_size is 0; expected at least 1"),
        (["--num_augmented_views", -1], "num_augmented_views is -1; expected at least 0"),
        (["--transform", json.dumps({"max_shift": 0, "horizontal_flip": False})], "changes nothing at random"),
        (["--rows_per_shards", 1], "rows_per_shards"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            tokenize_here(tmp_path / "new", *wrong)
        assert exit_info.value.code == 2 and message in capsys.readouterr().err
    for wrong, message in (
        (["--data.path", tmp_path / "nowhere"], "is not a folder"),
        (["--data.split", "nowhere"], "is not a sub-folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_here(tmp_path / "new", *wrong)
    assert not (tmp_path / "new").exists()
