"""Training with images that cannot be read: left out, named, the same on every number of processes and on resume."""

import json
import shutil

import pytest

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.unreadable import UnreadableImageError
from nextblock.evaluate_tokenizer import main as evaluate_tokenizer
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenize_images import TokenizeConfig
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train as train_tokenizer

SKIP = ["--data.on_error", "skip"]
BAD = {"train/blue tit/03.png": b"", "train/wren/caf\udce9.png": b"no picture", "test/wren/00.png": b"\x89PNG\r\n"}
PRIOR = """
    --model.hidden_size 16 --model.num_layers 1 --model.num_heads 2 --num_pictures_per_class 1 --loop.cpu true
    --loop.mixed_precision no --loop.log_every 1 --loop.num_steps 2 --loop.batch_size 8 --loop.tracker null
""".split()


@pytest.fixture(scope="module")
def broken_folder(image_folder, tmp_path_factory):
    """The images with three that cannot be read, two of them in the place of good ones."""
    root = shutil.copytree(image_folder, tmp_path_factory.mktemp("broken") / "images")
    for name, content in BAD.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def usable_folder(broken_folder, tmp_path_factory):
    """The same images without those."""
    root = shutil.copytree(broken_folder, tmp_path_factory.mktemp("usable") / "images")
    for name in BAD:
        (root / name).unlink()
    return root


@pytest.fixture(scope="module")
def arguments(tokenizer_arguments, broken_folder):
    return [*tokenizer_arguments, "--loop.tracker", "null", "--data.path", str(broken_folder)]


@pytest.fixture(scope="module")
def skipping(run_here, arguments, tmp_path_factory):
    """A run that leaves them out."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    run_here(train_tokenizer, TokenizerTrainConfig, *arguments, *SKIP, "--output_dir", folder)
    return folder


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_training_stops_at_them_by_default(run_here, arguments, tmp_path):
    with pytest.raises(UnreadableImageError, match=r"(03|caf.*|00)\.png.*\(corrupt; data.on_error=skip leaves"):
        run_here(train_tokenizer, TokenizerTrainConfig, *arguments, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "unreadable.json").exists()


def test_a_training_without_them_is_that_of_the_others(
    run_here, arguments, usable_folder, skipping, tmp_path, read_metrics
):
    usable = [*arguments, "--data.path", str(usable_folder)]
    run_here(train_tokenizer, TokenizerTrainConfig, *usable, "--output_dir", tmp_path / "run")
    assert weights(skipping) == weights(tmp_path / "run")
    assert read_metrics(skipping) == read_metrics(tmp_path / "run")


def test_they_are_named_with_the_reason(skipping):
    found = json.loads((skipping / "unreadable.json").read_text(encoding="utf-8"))
    assert {split: (entry["num_images"], len(entry["unreadable"])) for split, entry in found.items()} == {
        "train": (49, 2),
        "test": (15, 1),
    }
    names = {entry["image_id"]: entry["reason"] for split in found.values() for entry in split["unreadable"]}
    assert names == {
        "train/blue tit/03.png": "corrupt",
        "train/wren/caf\\xe9.png": "corrupt",
        "test/wren/00.png": "corrupt",
    }


def test_one_line_of_the_log_says_how_many(run_here, arguments, tmp_path, caplog):
    run_here(train_tokenizer, TokenizerTrainConfig, *arguments, *SKIP, "--output_dir", tmp_path / "run")
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 2 and "2 of 49 images of split 'train' cannot be read" in lines[0]
    assert "corrupt 2" in lines[0] and "blue tit/03.png" in lines[0] and "unreadable.json" in lines[0]


def test_a_resumed_training_leaves_out_the_same(run_here, arguments, broken_folder, skipping, tmp_path, monkeypatch):
    """One of them is whole again when the run goes on, which must not change its order."""
    root = shutil.copytree(broken_folder, tmp_path / "images")
    changing = [*arguments, "--data.path", str(root), *SKIP, "--output_dir", tmp_path / "run"]
    train_step = TokenizerTask.train_step

    def interrupted(self, micro_batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_here(train_tokenizer, TokenizerTrainConfig, *changing)
    shutil.copy(root / "train" / "blue tit" / "04.png", root / "train" / "blue tit" / "03.png")
    resumed = [*changing, "--loop.resume_from_checkpoint", "latest"]
    run_here(train_tokenizer, TokenizerTrainConfig, *resumed)
    assert weights(tmp_path / "run") == weights(skipping)
    shutil.copy(root / "train" / "blue tit" / "04.png", root / "train" / "blue tit" / "new.png")
    with pytest.raises(ValueError, match=r"not the 49 of .*unreadable.json, which the run began with"):
        run_here(train_tokenizer, TokenizerTrainConfig, *resumed)


@pytest.mark.slow
def test_two_processes_leave_out_the_same(launch_two, arguments, skipping, tmp_path):
    two = [*arguments, *SKIP, "--output_dir", "run"]
    launch_two("train-tokenizer", *two, cwd=tmp_path)
    assert (tmp_path / "run" / "unreadable.json").read_bytes() == (skipping / "unreadable.json").read_bytes()


def test_a_prior_and_an_evaluation_leave_them_out_too(run_here, broken_folder, tokenizer_dir, tmp_path, capsys):
    source = ["--data.source", "folder", "--data.path", str(broken_folder), *SKIP, "--tokenizer", str(tokenizer_dir)]
    folders = ["--output_dir", tmp_path / "run", "--pipeline_dir", tmp_path / "pipeline"]
    run_here(train_prior, PriorTrainConfig, *PRIOR, *source, *folders)
    assert len(json.loads((tmp_path / "run" / "unreadable.json").read_text())["train"]["unreadable"]) == 2
    evaluate_tokenizer([*source, "--output_dir", str(tmp_path / "evaluated"), "--cpu", "true"])
    assert "1 of 15 images of split 'test' cannot be read and are left out" in capsys.readouterr().out
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    assert report["data"]["num_images"] == 14


def test_images_that_cannot_be_read_at_all_end_the_run(run_here, arguments, tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    broken = [*arguments, "--data.path", str(tmp_path), *SKIP, "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        run_here(train_tokenizer, TokenizerTrainConfig, *broken)


def test_a_fault_of_the_machine_is_no_reason_to_leave_an_image_out(run_here, arguments, tmp_path, monkeypatch):
    source = load_source(ImageDataConfig(source="folder", path=arguments[-1]), "train")

    def failing(self, index):
        raise UnreadableImageError("an image", "", OSError(24, "Too many open files"))

    monkeypatch.setattr(type(source), "image", failing)
    with pytest.raises(UnreadableImageError, match="Too many open files"):
        run_here(train_tokenizer, TokenizerTrainConfig, *arguments, *SKIP, "--output_dir", tmp_path / "run")


def test_a_job_has_an_option_of_its_own():
    with pytest.raises(ValueError, match="data.on_error is 'skip'; expected on_error"):
        TokenizeConfig(tokenizer="x", output_dir="y", data=ImageDataConfig(source="digits", on_error="skip"))
    with pytest.raises(ValueError, match="on_error='ignore': expected one of"):
        ImageDataConfig(source="digits", on_error="ignore")
