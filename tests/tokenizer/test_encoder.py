"""The parts of a job: encoding options, shards that are missing or counted, one run at a time, sources that agree."""

import json
import multiprocessing
import shutil
import tarfile

import numpy as np
import pytest
import torch

from nextblock import tokenize_images
from nextblock.data.token_jobs import Shard
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.files.claim import claimed
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.encoder import Encoder


@pytest.fixture
def tokenize_here(run_here, tokenize_arguments):
    def run(output_dir, *options):
        run_here(tokenize, TokenizeConfig, *tokenize_arguments, "--output_dir", output_dir, *options)

    return run


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_pixels(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (6, 16, 16, 3), generator=generator, dtype=torch.uint8)


def test_the_encoder_gives_the_models_indices(tokenizer_dir):
    model, pixels = VQVAE.from_pretrained(tokenizer_dir).eval(), make_pixels()
    pixel_values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = model.layout.join(model.img_to_idxBl(pixel_values)).numpy()
    assert np.array_equal(Encoder(model, False, False, False)(pixels), expected)
    channels_last = Encoder(model, False, True, False)
    weight = next(module.weight for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert (channels_last(pixels) == expected).mean() > 0.98


def test_autocast_encodes_in_bf16_and_searches_in_float32(tokenizer_dir):
    model, pixels = VQVAE.from_pretrained(tokenizer_dir).eval(), make_pixels()
    encoder = Encoder(model, True, False, False)
    assert encoder.features(pixels).dtype == torch.bfloat16
    same = (encoder(pixels) == Encoder(model, False, False, False)(pixels)).mean()
    assert 0.5 < same


def test_compiling_compiles_the_encoder(tokenizer_dir, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = VQVAE.from_pretrained(tokenizer_dir).eval()
    Encoder(model, False, False, False)
    assert compiled == []
    Encoder(model, False, False, True)
    assert compiled == [model.encoder]


def test_every_option_reaches_the_manifest_and_the_encoder(tokenize_here, tmp_path, monkeypatch):
    seen = []

    class SeenEncoder(Encoder):
        def __init__(self, model, *options):
            seen.append((*options, torch.get_num_threads()))
            super().__init__(model, options[0], options[1], False)

    monkeypatch.setattr("nextblock.tokenize_images.Encoder", SeenEncoder)
    options = ["--mixed_precision", "bf16", "--is_channels_last", "true", "--is_compiled", "true"]
    before = torch.get_num_threads()
    tokenize_here(tmp_path / "new", *options, "--num_threads", before + 1)
    assert seen == [(True, True, True, before + 1)] and torch.get_num_threads() == before
    assert TokenManifest.load(tmp_path / "new").encoding == {
        "device": "cpu",
        "mixed_precision": "bf16",
        "is_channels_last": True,
        "is_compiled": True,
        "batch_size": 16,
        "num_threads": before + 1,
    }


def test_options_out_of_range_are_refused(tokenize_here, tmp_path, capsys):
    for options, message in (
        (["--num_threads", 0], "num_threads is 0; expected at least 1"),
        (["--min_image_side", 0], "min_image_side is 0; expected at least 1"),
        (["--seed", -1], "seed is -1; expected at least 0"),
        (["--ten_crop_ratio", 0.9], "ten_crop_ratio is 0.9; expected a number from 1 to 16, or null"),
    ):
        with pytest.raises(SystemExit):
            tokenize_here(tmp_path / "new", *options)
        assert message in capsys.readouterr().err
    for name in ("on_error", "mixed_precision"):
        with pytest.raises(ValueError, match=f"{name} is 'x'; expected one of"):
            TokenizeConfig(tokenizer="t", output_dir="o", **{name: "x"})
    with pytest.raises(ValueError, match="rows_per_shard is 200000000; expected under 102261126"):
        tokenize_here(tmp_path / "new", "--rows_per_shard", 200_000_000)


def test_shards_cover_the_rows_once():
    shards = Shard.plan("train[:90%]", 25, 10)
    assert [shard.name for shard in shards] == [f"train__90__-0000{n}-of-00003.parquet" for n in range(3)]
    assert [row for shard in shards for batch in shard.batches(4) for row in batch] == list(range(25))
    assert [len(batch) for batch in shards[0].batches(4)] == [4, 4, 2]


def test_only_missing_shards_are_made_again(tokenize_here, tokens_dir, tmp_path):
    folder = shutil.copytree(tokens_dir, tmp_path / "copy")
    missing = folder / "data" / "train-00002-of-00004.parquet"
    missing.unlink()
    (folder / "data" / f".{missing.name}.tmp").write_bytes(b"half of it")
    kept = {path: path.stat().st_mtime_ns for path in (folder / "data").glob("*.parquet")}
    tokenize_here(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files_of(folder) == files_of(tokens_dir)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_damaged_shards_are_named_and_written_again(tokenize_here, tokens_dir, tmp_path, capsys, has_manifest):
    folder = shutil.copytree(tokens_dir, tmp_path / "copy")
    if not has_manifest:
        (folder / "manifest.json").unlink()
    empty, short, torn = (folder / "data" / f"train-0000{n}-of-00004.parquet" for n in range(3))
    empty.write_bytes(b"")
    shutil.copy(folder / "data" / "test-00000-of-00001.parquet", short)
    torn.write_bytes(torn.read_bytes()[:-100])
    tokenize_here(folder)
    output = capsys.readouterr().out
    assert f"shard {short} has 15 rows and 0 rejects; expected 40: written again" in output
    assert f"shard {empty} cannot be read" in output and f"shard {torn} cannot be read" in output
    assert output.count(": written again") == 3 and files_of(folder) == files_of(tokens_dir)


def test_a_job_does_not_go_on_with_other_images(run_here, tokenize_arguments, image_folder, tokens_dir, tmp_path):
    images, folder = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "out"

    def run(*options) -> None:
        arguments = [*tokenize_arguments, "--data.path", images, "--output_dir", folder, *options]
        run_here(tokenize, TokenizeConfig, *arguments)

    run()
    assert {name: content for name, content in files_of(folder).items() if ".npz" not in name} == {
        name: content for name, content in files_of(tokens_dir).items() if ".npz" not in name
    }
    shutil.copy(images / "train" / "wren" / "01.png", images / "train" / "wren" / "12.png")
    run()  # All there already.
    shard = folder / "data" / "train-00001-of-00004.parquet"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="train/wren/12.png is not the file .*, or go on with source_check 'names'"):
        run()
    assert not shard.exists()
    run("--source_check", "names")
    assert shard.read_bytes() != content


def test_images_replaced_while_a_job_is_at_work_are_named(
    run_here, tokenize_arguments, image_folder, tmp_path, monkeypatch
):
    images, folder = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "out"
    arguments = [*tokenize_arguments, "--data.path", images, "--output_dir", folder]

    write_shards = tokenize_images.write_shards

    def write_and_replace(*given, **options) -> None:
        write_shards(*given, **options)
        shutil.copy(images / "test" / "wren" / "01.png", images / "test" / "wren" / "00.png")

    monkeypatch.setattr(tokenize_images, "write_shards", write_and_replace)
    for _ in range(2):  # All shards are there the second time.
        with pytest.raises(ValueError, match="test/wren/00.png is not the file"):
            run_here(tokenize, TokenizeConfig, *arguments)
    assert not (folder / "manifest.json").exists()


def hold_claim(folder, ready, done) -> None:
    with claimed(folder):
        ready.set()
        done.wait(60)


def test_two_runs_do_not_work_in_one_folder(tokenize_here, tokens_dir, tmp_path):
    folder = shutil.copytree(tokens_dir, tmp_path / "copy")
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_claim, args=(folder, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on"):
            tokenize_here(folder)
    finally:
        done.set()
        other.join()
    tokenize_here(folder)


def test_a_folder_and_tar_files_give_the_same_tokens(tokenize_here, tokens_dir, image_folder, tmp_path):
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for label, name in enumerate(("blue tit", "great tit", "wren")):
                (tmp_path / f"{label}.cls").write_text(str(label))
                for file in sorted((image_folder / split / name).iterdir()):
                    archive.add(file, f"{label}{file.name}")
                    archive.add(tmp_path / f"{label}.cls", f"{label}{file.stem}.cls")
    tokenize_here(tmp_path / "new", "--data.source", "webdataset", "--data.path", tmp_path)
    for split in ("train", "test"):
        got, expected = TokenDataset(tmp_path / "new", split), TokenDataset(tokens_dir, split)
        rows = range(len(expected))
        for name in ("labels", "class_labels"):
            assert torch.equal(got.__getitems__(rows)[name], expected.__getitems__(rows)[name])
    assert got.manifest.class_names == ["0", "1", "2"]


def test_the_card_names_the_splits_for_the_hub(tokens_dir):
    import datasets

    card = (tokens_dir / "README.md").read_text()
    assert "| train | 48 | 0 | 3 | 144 | 4 |" in card and "| test | 15 | 0 | 1 | 15 | 1 |" in card
    assert "1. augmentation 1" in card and TokenManifest.load(tokens_dir).tokenizer_sha256 in card
    builder = datasets.load_dataset_builder(str(tokens_dir))
    assert {split: len(files) for split, files in builder.config.data_files.items()} == {"train": 4, "test": 1}


def test_job_and_manifest_agree(tokens_dir):
    job, manifest = (json.loads((tokens_dir / name).read_text()) for name in ("job.json", "manifest.json"))
    for split, entry in job["splits"].items():
        assert entry.items() <= manifest["splits"][split].items()
    # A job without captions and digits does not speak of them, so that older ones go on.
    silent = {"condition": "class", "text_encoder": {}, "code_bases": []}
    assert {**job, **silent, "splits": None} == {**manifest, "splits": None}
