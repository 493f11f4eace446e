"""No command reads images that nobody named: given ones, those of the tokenizer's training, or a message."""

import json

import pytest
import yaml

from nextblock import evaluate_tokenizer, tokenize_images, train_prior, train_tokenizer
from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.tokens import TokenManifest
from nextblock.run_data import data_of_run
from nextblock.tokenizer import VQVAE


@pytest.fixture
def trained(tokenizer_dir, image_folder, tmp_path):
    """A tokenizer in the folder of the training that it comes from, as far as commands look at it."""
    folder = tmp_path / "trained"
    VQVAE.from_pretrained(tokenizer_dir).save_pretrained(folder)
    options = {
        "data": {"source": "folder", "path": str(image_folder), "split": "train", "eval_split": "test"},
        "transform": {"max_shift": 2.0},
        "output_dir": str(folder),
    }
    # A job that takes over the images has an option of its own for those that cannot be read.
    options["data"]["on_error"] = "skip"
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


NO_IMAGES = "no images are given: data.source is missing.*expected --data.source folder --data.path"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (train_tokenizer.main, ["--output_dir", "out"]),
        (train_prior.main, ["--tokenizer", "t", "--output_dir", "out", "--pipeline_dir", "p", "--data", "{}"]),
        (tokenize_images.main, ["--tokenizer", "t", "--output_dir", "out", "--cpu", "true"]),
        (evaluate_tokenizer.main, ["--tokenizer", "t", "--output_dir", "out"]),
    ],
)
def test_a_command_without_images_says_so_and_leaves_nothing(main, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=NO_IMAGES):
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_no_source_is_assumed():
    with pytest.raises(ValueError, match=NO_IMAGES):
        load_source(ImageDataConfig(), "train")
    with pytest.raises(ValueError, match="data.source is missing; expected one of .* with data.path"):
        ImageDataConfig(path="my_images")


def test_tokenize_takes_images_and_views_of_the_tokenizers_training(trained, image_folder, tmp_path, fresh_accelerate):
    arguments = ["--tokenizer", str(trained), "--cpu", "true", "--num_augmented_views", "1"]
    tokenize_images.main([*arguments, "--output_dir", str(tmp_path / "taken")])
    given = ["--data.source", "folder", "--data.path", str(image_folder), "--transform.max_shift", "2"]
    tokenize_images.main([*arguments, *given, "--output_dir", str(tmp_path / "given")])
    manifests = [TokenManifest.load(tmp_path / name) for name in ("taken", "given")]
    assert manifests[0] == manifests[1]
    assert manifests[0].transform["max_shift"] == 2.0 and manifests[0].splits["train"]["num_images"] == 48
    # What is given counts, all of it.
    with pytest.raises(SystemExit):
        tokenize_images.main([*arguments, *given[:4], "--output_dir", str(tmp_path / "plain")])


def test_evaluation_takes_them_too(trained, tmp_path):
    evaluate_tokenizer.main(["--tokenizer", str(trained), "--output_dir", str(tmp_path / "report"), "--cpu", "true"])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["data"]["num_images"] == 15 and report["data"]["source"] == "folder"


def test_options_that_a_training_left(trained, image_folder):
    assert data_of_run(str(trained)) == (
        ImageDataConfig(source="folder", path=str(image_folder), on_error="skip"),
        TransformConfig(max_shift=2.0),
    )
    for text, message in (
        ("data: null\n", NO_IMAGES),
        ("data: {source: folder, path: x, colour: red}\n", r"data holds \['colour'\]"),
        ("data: {source: nowhere}\n", "Given value: nowhere"),
    ):
        (trained / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            data_of_run(str(trained))
    with pytest.raises(ValueError, match=NO_IMAGES):
        data_of_run(None)
