import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from nextblock.data.adm_crop import adm_crop
from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
from nextblock.data.pixels import to_uint8
from nextblock.evaluate_tokenizer import main
from nextblock.evaluation.codebook import code_counts, perplexity, usage
from nextblock.evaluation.features import load_features
from nextblock.evaluation.metrics import frechet_distance, psnr
from nextblock.evaluation.presets import PRESETS
from nextblock.files.atomic import file_sha256
from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenizer import VQVAE, VQVAEConfig


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=32, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 2, 8])
    folder = tmp_path_factory.mktemp("tokenizer")
    VQVAE(config).save_pretrained(folder)
    return folder


def test_report_equals_the_figures_computed_by_hand(tokenizer_dir, tmp_path, capsys):
    output_dir = tmp_path / "out"
    arguments = ["--tokenizer", str(tokenizer_dir), "--output_dir", str(output_dir), "--batch_size", "77"]
    main(["--config", "tokenizer/evaluate-digits", *arguments, "--num_pictures", "5"])
    report = json.loads((output_dir / "report.json").read_text())

    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    dataset = ImageDataset(load_source(ImageDataConfig(source="digits"), "test"), (32, 32), TransformConfig(), seed=0)
    pixel_values = collate([dataset[index] for index in range(len(dataset))])["pixel_values"]
    idx_BL = tokenizer.img_to_idx(pixel_values)
    counts = code_counts(idx_BL, tokenizer.layout.block_lengths, tokenizer.config.vocab_size)
    values = psnr(tokenizer.idx_to_img(idx_BL), pixel_values)

    assert report["data"]["num_images"] == len(dataset) == 360
    assert report["figures"]["reconstruction_psnr"] == pytest.approx(values.mean().item(), abs=1e-4)
    assert report["figures"]["code_usage"] == usage(counts.sum(0)).item()
    assert report["figures"]["code_perplexity"] == pytest.approx(perplexity(counts.sum(0)).item(), rel=1e-3)
    assert report["codebook"]["num_tokens"] == 360 * (1 + 4 + 64)
    assert len(report["codebook"]["block_perplexity"]) == 3
    assert report["parameters"]["tokenizer"] == sum(p.numel() for p in tokenizer.parameters())
    with Image.open(output_dir / "reconstructions.png") as picture:
        assert picture.size == (5 * 66 + 2, 2 * 66 + 2)
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert "<td>none: features is null</td>" in page and page.count("data:image/png") == 1
    assert "peak signal-to-noise ratio, dB" in capsys.readouterr().out


class TinyNetwork(torch.nn.Module):
    """Features of pixels: means of channels, and corners."""

    def forward(self, x):
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0]], dim=1)


@pytest.fixture(scope="module")
def features_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "tiny.pt"
    torch.jit.script(TinyNetwork()).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The options of 23 pictures, a few of which go into a batch."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return ["--data.source", "folder", "--data.path", str(folder), "--split", "train", "--batch_size", "4"]


def test_the_result_has_every_figure_and_says_why_one_is_missing(
    tokenizer_dir, features_file, pictures, tmp_path, capsys, monkeypatch
):
    arguments = ["--tokenizer", str(tokenizer_dir), *pictures]
    main([*arguments, "--output_dir", str(tmp_path / "bare")])
    bare = json.loads((tmp_path / "bare" / "result.json").read_text())
    assert all(not isinstance(value, dict) for value in bare.values())
    assert {name: bare[f"{name}_reason"] for name in ("lpips", "rfid", "fd")} == {
        "lpips": "lpips_network is null", "rfid": "features is null", "fd": "features is null"
    }
    assert bare["lpips"] is bare["rfid"] is bare["fd"] is None and "ssim_reason" not in bare

    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    source = load_source(ImageDataConfig(source="folder", path=pictures[3]), "train")
    dataset = ImageDataset(source, 32, TransformConfig(), seed=0)
    pixel_values = collate(dataset.__getitems__([*range(23)]))["pixel_values"]
    idx_BL = tokenizer.img_to_idx(pixel_values)
    decoded = tokenizer.idx_to_img(idx_BL)
    assert bare["psnr"] == pytest.approx(psnr(decoded, pixel_values).mean().item(), abs=1e-4)
    levels = (decoded + 1) / 2, (pixel_values + 1) / 2
    assert bare["ssim"] == pytest.approx(structural_similarity_index_measure(*levels, data_range=1.0).item(), abs=1e-5)
    assert bare["bits_per_token"] == math.log2(tokenizer.config.vocab_size)
    assert bare["bits_per_pixel"] == bare["bits_per_token"] * (1 + 4 + 64) / 32**2
    counts = torch.bincount(idx_BL.flatten(), minlength=tokenizer.config.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    assert bare["code_entropy_bits_per_token"] == pytest.approx(-(shares * shares.log2()).sum().item(), rel=1e-5)
    assert bare["num_dead_codes"] == (counts == 0).sum().item()
    assert bare["tokenizer_sha256"] == model_fingerprint(tokenizer) and bare["data_num_images"] == 23

    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setattr("nextblock.evaluate_tokenizer.load_lpips", lambda network, option, otherwise: Distance())
    arguments += ["--features", str(features_file), "--lpips_network", "alex"]
    main([*arguments, "--output_dir", str(tmp_path / "features")])
    result = json.loads((tmp_path / "features" / "result.json").read_text())
    extractor = load_features(str(features_file))
    x, y = (extractor(to_uint8(images)).features for images in (pixel_values, decoded))
    assert result["rfid"] == result["fd"] == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert result["features_sha256"] == extractor.record["features_sha256"] and result["psnr"] == bare["psnr"]
    assert result["lpips"] == pytest.approx((decoded - pixel_values).abs().mean().item(), rel=1e-5)
    assert result["lpips_network"] == "alex" and not [name for name in result if name.endswith("_reason")]
    assert "\nFrechet distance of Inception's features" in capsys.readouterr().out


def test_images_are_cropped_as_adm_does(tokenizer_dir, tmp_path):
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "a.png")
    data = ["--data.source", "folder", "--data.path", str(tmp_path / "data"), "--split", "train"]
    arguments = ["--tokenizer", str(tokenizer_dir), *data, "--output_dir", str(tmp_path / "out"), "--crop", "adm"]
    main(arguments)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    pixel_values = torch.from_numpy(np.asarray(adm_crop(Image.fromarray(pixels), 32)).copy()).permute(2, 0, 1)[None]
    pixel_values = pixel_values / 127.5 - 1
    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    expected = psnr(tokenizer.idx_to_img(tokenizer.img_to_idx(pixel_values)), pixel_values)
    assert result["psnr"] == pytest.approx(expected.item(), abs=1e-4) and result["crop"] == "adm"


def test_what_breaks_the_preset_is_named(tokenizer_dir, features_file, pictures, tmp_path, monkeypatch):
    arguments = ["--tokenizer", str(tokenizer_dir), *pictures, "--output_dir", str(tmp_path / "out")]
    arguments += ["--features", str(features_file), "--preset", "rfid-imagenet-256"]
    message = (
        "preset is 'rfid-imagenet-256', which is broken: the tokenizer's images are 32x32; expected 256x256; "
        "there are 23 images; expected 50000; crop is 'center'; expected 'adm'; expected the 50 000 images of ImageNet"
    )
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--crop", "center"])
    smaller = replace(PRESETS["rfid-imagenet-256"], num_reference_images=23, image_size=(32, 32))
    monkeypatch.setitem(PRESETS, "rfid-imagenet-256", smaller)
    with pytest.raises(ValueError, match="features is .*tiny.pt.*; expected, for the preset 'rfid-imagenet-256'"):
        main(arguments)
    monkeypatch.setitem(
        PRESETS, "rfid-imagenet-256", replace(smaller, features_sha256=file_sha256(features_file))
    )
    main(arguments)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["preset"], result["crop"]) == ("rfid-imagenet-256", "adm") and result["rfid"] > 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tokenizer_dir, features_file, pictures, tmp_path, launch_two):
    arguments = ["--tokenizer", str(tokenizer_dir), *pictures, "--num_pictures", "9", "--cpu", "true"]
    arguments += ["--features", str(features_file)]
    main([*arguments, "--output_dir", str(tmp_path / "one")])
    launch_two("evaluate-tokenizer", *arguments, "--output_dir", str(tmp_path / "two"), cwd=tmp_path)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    for name, value in one.items():
        assert two[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    drawn = [(tmp_path / name / "reconstructions.png").read_bytes() for name in ("one", "two")]
    assert drawn[0] == drawn[1]


def test_options_are_checked(tokenizer_dir, tmp_path, capsys, monkeypatch):
    arguments = ["--tokenizer", str(tokenizer_dir), "--output_dir", str(tmp_path), "--data.source", "digits"]
    for wrong, message in (
        (["--data.eval_split", "null"], "split and data.eval_split are both null"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--num_threads", "0"], "num_threads is 0"),
        (["--features_variant", "clean-fid"], "features_variant is 'clean-fid', but features is null"),
        (["--preset", "rfid-imagenet-256"], "preset is 'rfid-imagenet-256', but features is null"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert message in capsys.readouterr().err
    for wrong, message in (
        (["--features", str(tmp_path / "nowhere.pt")], "features is .*nowhere.pt"),
        (["--lpips_network", "alex"], "lpips_network is 'alex', which needs torchvision.*; null leaves LPIPS out"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, *wrong])

    class Subtraction(torch.nn.Conv2d):
        def forward(self, x, y):
            return super().forward(x) - super().forward(y)

    monkeypatch.setattr("nextblock.evaluate_tokenizer.load_lpips", lambda *given: Subtraction(3, 1, 33))
    with pytest.raises(ValueError, match=r"lpips_network is 'alex'; expected one that takes images of \[32, 32\]"):
        main([*arguments, "--lpips_network", "alex"])
    with pytest.raises(ValueError, match="nowhere"):
        main([*arguments, "--split", "nowhere"])
