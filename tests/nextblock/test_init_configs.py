"""Configs for a folder of pictures: they say what the folder shows, and work as they are."""

import numpy as np
import pytest
import yaml
from PIL import Image

from nextblock import __main__ as cli
from nextblock.data.images import ImageDataConfig, load_source
from nextblock.init_configs import main
from nextblock.pipelines import ClassToImagePipeline

TINY = {
    "train-tokenizer": "--loop.num_steps 2 --loop.num_workers 0 --loop.cpu true --model.hidden_dim 4 "
    "--model.num_res_blocks 0 --model.vocab_size 16 --loop.tracker null --loop.batch_size 4",
    "tokenize": "--cpu true",
    "train-prior": "--loop.num_steps 2 --loop.cpu true --model.hidden_size 8 --model.num_layers 1 --model.num_heads 1 "
    "--loop.tracker null --loop.batch_size 4",
    "sample": "--cpu true --num_images_per_label 2",
}


def write_pictures(root, folders, count=6, size=(40, 36)):
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(root / folder / f"{n}.png")
    return root


def read(folder, name):
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def test_pictures_become_samples_by_the_written_configs(tmp_path, monkeypatch, capsys, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "my pictures: a", ["cat", "dog"])
    cli.main(["init", "my pictures: a", "--output_dir", "configs"])
    out = capsys.readouterr().out
    assert "12 pictures, 2 classes" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("  nextblock ")]
    assert [line[1] for line in lines] == list(TINY)
    for _, command, *arguments in lines:
        cli.main([command, *arguments, *TINY[command].split()])
    with np.load(tmp_path / "configs" / "samples" / "images.npz") as arrays:
        assert len(arrays["arr_0"]) == 4
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "configs" / "pipeline")
    assert pipe.class_names == ["cat", "dog"] and pipe.sampling.guidance_schedule == "linear"


@pytest.mark.parametrize(
    ("folders", "data", "num_classes"),
    [
        (["train/a", "train/b", "val/a"], {"eval_split": "val"}, 2),
        (["training/a", "validation/a"], {"split": "training", "eval_split": "validation"}, 1),
        (["train/a"], {"eval_fraction": 0.1}, 1),
        (["test", "b"], {"eval_split": "heldout", "eval_fraction": 0.1}, 2),
        (["."], {"eval_fraction": 0.1}, 0),
    ],
)
def test_splits_and_classes_are_found(folders, data, num_classes, tmp_path):
    root = write_pictures(tmp_path / "images", folders, count=30)
    main([str(root), "--output_dir", str(tmp_path / "configs")])
    written = read(tmp_path / "configs", "tokenizer")["data"]
    assert written == {"source": "folder", "path": str(root), **data}
    config = ImageDataConfig(**written)
    train, heldout = (load_source(config, split) for split in (config.split, config.eval_split))
    assert len(train.class_names) == num_classes and len(heldout) > 0
    guidance = read(tmp_path / "configs", "prior")["sampling"].get("guidance_scale", 1.0)
    assert (guidance > 1) == (num_classes > 0)


@pytest.mark.parametrize(
    ("size", "side", "grid"), [((20, 30), 32, 8), ((70, 64), 64, 16), ((300, 200), 128, 8), ((999, 800), 256, 16)]
)
def test_sizes_decide_the_model(size, side, grid, tmp_path):
    write_pictures(tmp_path / "images", ["."], count=3, size=size)
    main([str(tmp_path / "images"), "--output_dir", str(tmp_path / "configs")])
    model = read(tmp_path / "configs", "tokenizer")["model"]
    assert model["image_size"] == side and model["scales"][-1] == grid
    transform = read(tmp_path / "configs", "tokenizer")["transform"]
    assert transform.keys() == {"horizontal_flip", "resize_ratio", "random_crop"}


def test_too_few_pictures_hold_none_out(tmp_path):
    write_pictures(tmp_path / "images", ["."], count=1)
    main([str(tmp_path / "images"), "--output_dir", str(tmp_path / "configs")])
    assert read(tmp_path / "configs", "tokenizer")["data"]["eval_split"] is None


def test_what_is_there_is_not_overwritten_and_what_is_none_is_refused(tmp_path):
    write_pictures(tmp_path / "images", ["."])
    arguments = [str(tmp_path / "images"), "--output_dir", str(tmp_path / "configs")]
    main(arguments)
    with pytest.raises(ValueError, match="holds .*'prior.yaml'.*; expected a folder without them"):
        main(arguments)
    with pytest.raises(ValueError, match="is not a folder"):
        main([str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "other")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of the pictures looked at can be opened"):
        main([str(tmp_path / "broken"), "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
