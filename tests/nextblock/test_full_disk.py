"""A full disk is one message that names the file; what was whole before stays, and the command goes on later."""

import os

import pytest

from nextblock.__main__ import main
from nextblock.files.atomic import UnwrittenError
from nextblock.tokenizer import VQVAE

SAMPLE = ["--num_images_per_label", "2", "--batch_size", "10", "--seed", "5", "--cpu", "true"]
TRAIN = ["--loop.num_steps", "4", "--loop.save_every", "2", "--loop.tracker", "null", "--loop.cpu", "true"]


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fails(full_disk, capsys, fresh_accelerate):
    """Run a command on a disk that is full, and return its message."""

    def run(num_bytes: int, *arguments) -> str:
        with full_disk(num_bytes), pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 1 and "could not be written: " in error, error
        return error

    return run


# A part, which is 30 kB large; the archive of two; the grid of pictures at the end.
@pytest.mark.parametrize(
    ("output_format", "num_bytes", "named"),
    [
        ("npz", 20_000, "parts/0000000"),
        ("npz", 40_000, "images.npz"),
        ("png", 10_000, "samples.png"),
    ],
)
def test_sampling_loses_nothing(ten_class_pipeline_dir, tmp_path, fails, monkeypatch, output_format, num_bytes, named):
    arguments = ["sample", "--pipeline", ten_class_pipeline_dir, *SAMPLE, "--output_format", output_format]
    arguments = [str(argument) for argument in arguments]
    folders = [tmp_path / "full" / "out", tmp_path / "undisturbed" / "out"]
    for folder in folders:
        folder.parent.mkdir()
        monkeypatch.chdir(folder.parent)
        if folder == folders[0]:
            assert f"out/{named}" in fails(num_bytes, *arguments, "--output_dir", "out")
            assert list(folder.rglob("*.tmp")) == []
        main([*arguments, "--output_dir", "out"])
    assert files_of(folders[0]) == files_of(folders[1])


def test_tokenizing_loses_nothing(tokenize_arguments, tokens_dir, tmp_path, fails):
    arguments = ["tokenize", *tokenize_arguments, "--output_dir", str(tmp_path / "out")]
    smallest = min(path.stat().st_size for path in tokens_dir.glob("data/*"))
    assert f"{tmp_path / 'out' / 'data'}/train-00000" in fails(smallest, *arguments)
    assert list((tmp_path / "out" / "data").iterdir()) == []
    main(arguments)
    assert files_of(tmp_path / "out") == files_of(tokens_dir)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_training_keeps_the_checkpoint_before(tokenizer_arguments, tmp_path, fails, monkeypatch, file):
    arguments = ["train-tokenizer", *tokenizer_arguments, *TRAIN, "--output_dir", str(tmp_path / "run")]
    main([*arguments, "--loop.num_steps", "2"])
    first = tmp_path / "run" / "checkpoints" / "step_00000002"
    before = files_of(first)
    arguments += ["--loop.resume_from_checkpoint", "latest", "--loop.accepts_changed_options", "true"]
    error = fails((first / file).stat().st_size - 100, *arguments)
    assert f"{first.with_name('step_00000004')} could not be written" in error
    assert os.listdir(first.parent) == [first.name] and files_of(first) == before
    main(arguments)
    assert sorted(os.listdir(first.parent)) == ["step_00000002", "step_00000004"]


def test_models_and_reports_name_what_was_not_written(tokenizer_dir, image_folder, tmp_path, fails, full_disk):
    folder = tmp_path / "out"
    options = ["--output_dir", folder]
    evaluate = ["evaluate-tokenizer", "--tokenizer", tokenizer_dir, "--data.source", "folder", "--data.path"]
    for num_bytes, named, *arguments in (
        (300, f"{folder}/report.json", *evaluate, image_folder, *options),
        (3000, f"{folder}/reconstructions.png", *evaluate, image_folder, *options),
        (500, f"{folder}/tokenizer.yaml", "init", image_folder, *options),
    ):
        assert named in fails(num_bytes, *arguments)
    assert list(tmp_path.rglob("*.tmp")) == []
    model = VQVAE.from_pretrained(tokenizer_dir)
    with full_disk(3000), pytest.raises(UnwrittenError, match=f"{tmp_path}/model could not be written: "):
        model.save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path / "model") == []
