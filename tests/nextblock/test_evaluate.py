import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.blocks import BlockLayout
from nextblock.data.digits import CLASS_NAMES
from nextblock.evaluate import main
from nextblock.evaluation.digits_judge import DigitSet, class_accuracy, fit_judge
from nextblock.judge_pipeline import layout_name
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of random weights, samples, and the logs of two trainings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    tokenizer = VQVAE(
        VQVAEConfig(image_size=32, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 8])
    )
    config = BlockPriorConfig(
        layout=tokenizer.layout.to_dict(),
        embedding_dim=4,
        num_classes=10,
        class_names=list(CLASS_NAMES),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
    )
    ClassToImagePipeline(tokenizer=tokenizer, prior=BlockPrior(config)).save_pretrained(folder / "pipeline")
    (folder / "samples").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "samples" / "images.npz", images, np.arange(10).repeat(4))
    (folder / "samples" / "config.yaml").write_text("guidance_scale: 1.5\n")
    for stage, loss in (("tokenizer", 0.1), ("prior", 1.5)):
        (folder / stage).mkdir()
        records = [
            {"step": 1, "train/loss": 3.0},
            {"step": 2, "train/loss": 2.0, "eval/loss": loss},
            {"step": 2, "time/total": 12.5},
        ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def _arguments(folder, output_dir):
    return [
        *("--data.source", "digits"),
        *("--pipeline", str(folder / "pipeline")),
        *("--samples", str(folder / "samples")),
        *("--output_dir", str(output_dir)),
    ]


def test_digits_report(folder, tmp_path, capsys):
    arguments = [*_arguments(folder, tmp_path), "--run_dirs", f"[{folder / 'tokenizer'},{folder / 'prior'}]"]
    aims = {
        "scales": {"prior_gain_nats": ">= 1", "reconstruction_psnr": ">= 99"},
        "raster": {"code_usage": ">= 2"},
    }
    main([*arguments, "--aims", json.dumps(aims)])
    report = json.loads((tmp_path / "report.json").read_text())
    figures = report["figures"]

    pipe = ClassToImagePipeline.from_pretrained(folder / "pipeline")
    assert report["parameters"] == {
        "tokenizer": sum(p.numel() for p in pipe.tokenizer.parameters()),
        "prior": sum(p.numel() for p in pipe.prior.parameters()),
    }
    assert report["training_seconds"] == {"tokenizer": 12.5, "prior": 12.5}
    assert report["layout"] == {"name": "scales", "kind": "scales", "scales": [[1, 1], [8, 8]]}
    assert report["data"]["num_heldout_images"] == 360
    assert report["codebook"]["num_tokens"] == 360 * 65
    assert len(report["codebook"]["block_usage"]) == 2
    assert report["samples"] == {"num_images": 40, "sampling": {"guidance_scale": 1.5}}
    assert report["precision"]["dtypes"] == {"tokenizer": "float32", "prior": "float32"}

    assert figures["prior_gain_nats"] == pytest.approx(math.log(pipe.tokenizer.config.vocab_size) - 1.5)
    assert figures["class_accuracy_heldout"] > 0.98
    assert figures["class_accuracy_samples"] < 0.4
    assert figures["frechet_samples_ratio"] == figures["frechet_samples"] / figures["frechet_train"] > 10
    assert figures["nearest_train_p1_ratio"] > 1
    assert set(report["aims"]) == {"prior_gain_nats", "reconstruction_psnr"}
    assert report["aims"]["prior_gain_nats"]["is_met"] and not report["aims"]["reconstruction_psnr"]["is_met"]
    assert report["notes"] == []

    printed = capsys.readouterr().out
    assert "MISSED" in printed and ">= 99" in printed and printed.isascii()
    sizes = {
        "reconstructions": (10 * 66 + 2, 2 * 66 + 2),
        "samples": (4 * 66 + 2, 10 * 66 + 2),
        "curves": (1200, 400),
    }
    for name, size in sizes.items():
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == size


def test_judged_digits_are_the_real_ones(folder, tmp_path):
    """Samples that are the training digits themselves: copies, at the floor, and as good as real."""
    from nextblock.data.augment import TransformConfig
    from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
    from nextblock.data.pixels import to_uint8

    dataset = ImageDataset(load_source(ImageDataConfig(source="digits"), "train"), (32, 32), TransformConfig(), seed=0)
    batch = collate([dataset[index] for index in range(len(dataset))])
    images, class_labels = to_uint8(batch["pixel_values"]), batch["class_labels"].numpy()
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "images.npz", images, class_labels)
    (tmp_path / "samples" / "config.yaml").write_text("{}")
    main([*_arguments(folder, tmp_path / "out"), "--samples", str(tmp_path / "samples")])
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert figures["frechet_samples_ratio"] == 1
    assert figures["nearest_train_p1_samples"] == 0
    assert figures["diversity_ratio"] == pytest.approx(1, abs=0.05)
    train = DigitSet.from_images(images, class_labels)
    assert figures["class_accuracy_samples"] == class_accuracy(fit_judge(train), train)
    assert not (tmp_path / "out" / "curves.png").exists()


def test_other_sources_get_the_general_figures_alone(folder, tmp_path, capsys):
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for n, image in enumerate(images):
        path = tmp_path / "data" / ("train" if n < 3 else "test") / "flower" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    main(
        [
            *_arguments(folder, tmp_path / "out"),
            "--data.source",
            "folder",
            "--data.path",
            str(tmp_path / "data"),
        ]
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["figures"]) == {
        "reconstruction_psnr",
        "reconstruction_psnr_of_mean_error",
        "code_usage",
        "code_perplexity",
    }
    assert report["data"]["num_heldout_images"] == 3
    assert any("data.source is 'folder'" in note for note in report["notes"])
    assert "data.source is 'folder'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pipeline_is_judged_and_its_samples_are_measured(folder, tmp_path):
    torch.jit.script(torch.nn.AvgPool2d(100)).save(tmp_path / "tiny.pt")
    main([*_arguments(folder, tmp_path / "out"), "--features", str(tmp_path / "tiny.pt"), "--cpu", "true"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["data"]["num_heldout_images"] == 360
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["num_samples"], result["num_reference"], result["training_images"]) == (40, 360, "digits::train")
    assert result["fid"] > 0 and result["sampling_guidance_scale"] == 1.5


def test_wrong_input_is_named(folder, tmp_path, capsys):
    arguments = _arguments(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"images.npz does not exist"):
        main([*arguments, "--samples", str(tmp_path)])
    with pytest.raises(ValueError, match=r"metrics.jsonl does not exist"):
        main([*arguments, "--run_dirs", f"[{folder / 'tokenizer'},{tmp_path}]"])
    with pytest.raises(SystemExit):
        main([*arguments, "--run_dirs", f"[{folder / 'prior'}]"])
    assert "expected two folders" in capsys.readouterr().err
    for aims, message in (
        ({"scales": {"psnr": ">= 1"}}, "aims.scales names ['psnr']"),
        ({"scales": {"code_usage": "0.9"}}, "aim is '0.9'"),
        ({"zigzag": {}}, "aims names the layouts ['zigzag']"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--aims", json.dumps(aims)])
        assert message in capsys.readouterr().err


def test_samples_of_another_size_are_refused(folder, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.int64))
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"images of 16x16; expected 32x32"):
        main([*_arguments(folder, tmp_path / "out"), "--samples", str(tmp_path)])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (BlockLayout.scales([1, 2, 4]), "scales"),
        (BlockLayout.tiles(1, (4, 6)), "raster"),
        (BlockLayout.tiles((1, 6), (4, 6)), "rows"),
        (BlockLayout.tiles((2, 3), (4, 6)), "quadrants"),
        (BlockLayout.tiles((2, 1), (4, 6)), "tiles"),
    ],
)
def test_layouts_are_named(layout, name):
    assert layout_name(layout) == name
