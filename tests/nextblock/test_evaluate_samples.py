"""`nextblock evaluate` of any data, by a tiny network's features."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nextblock.evaluate import main
from nextblock.evaluation.distribution import class_frechet_distances, inception_score, kernel_distance
from nextblock.evaluation.features import load_features
from nextblock.evaluation.inception import Inception2015
from nextblock.evaluation.metrics import frechet_distance
from nextblock.evaluation.neighbours import nearest, neighbour_figures
from nextblock.files.atomic import file_sha256

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
NUM_SAMPLES, NUM_REAL, SIDE = 40, 34, 16


class TinyNetwork(nn.Module):
    """Means of six parts of the picture, of each colour: 18 features."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, (2, 3)).flatten(1)


def _pictures(count, seed, shift=0):
    coarse = np.random.default_rng(seed).integers(0, 200, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((SIDE, SIDE))) for each in coarse + np.uint8(shift)])


def _write(folder, images, labels=None, prefix=""):
    for number, image in enumerate(images):
        place = folder if labels is None else folder / f"{labels[number]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{prefix}{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A network, samples and real images, as folders of three classes and as .npz files."""
    root = tmp_path_factory.mktemp("given")
    torch.jit.script(TinyNetwork()).save(root / "tiny.pt")
    samples, real = _pictures(NUM_SAMPLES, 0), _pictures(NUM_REAL, 1, shift=20)
    labels = [np.arange(len(images)) % 3 for images in (samples, real)]
    for name, images, classes in zip(("samples", "real"), (samples, real), labels, strict=True):
        _write(root / name, images, classes)
        np.savez(root / f"{name}.npz", images, classes)
    return root


@pytest.fixture(scope="module")
def features(given):
    extractor = load_features(str(given / "tiny.pt"))
    return [extractor(np.load(given / f"{name}.npz")["arr_0"]).features for name in ("samples", "real")]


def _evaluate(given, output_dir, *more, samples="samples", reference="real"):
    arguments = ["--samples", str(given / samples), "--features", str(given / "tiny.pt"), "--cpu", "true"]
    arguments += [] if reference is None else ["--reference", str(given / reference)]
    main([*arguments, "--output_dir", str(output_dir), *(str(word) for word in more)])
    return json.loads((output_dir / "result.json").read_text())


FIGURES = ("fid", "fd", "kid", "precision", "recall", "density", "coverage", "fd_per_class_mean")
NEAREST = tuple(f"nearest_train_p1_{name}" for name in ("samples", "real", "ratio"))


def test_figures_are_those_of_the_features(given, features, tmp_path, capsys):
    result = _evaluate(given, tmp_path)
    samples, real = features
    classes = [torch.arange(len(rows)) % 3 for rows in features]
    per_class = class_frechet_distances(samples, classes[0], real, classes[1])
    expected = {
        "num_samples": NUM_SAMPLES,
        "num_reference": NUM_REAL,
        "num_features": 18,
        "fid": frechet_distance(samples, real),
        "fd_per_class_mean": np.mean(list(per_class.values())),
        "fd_per_class_worst": max(per_class.values()),
        "fd_per_class_num_classes": 3,
        **neighbour_figures(real, samples)._asdict(),
        "nearest_train_p1_samples": nearest(samples, real).distances.quantile(0.01).item(),
        "nearest_train_p1_real": nearest(real, real, is_same_set=True).distances.quantile(0.01).item(),
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert result["fd"] == result["fid"] and result["nearest_train_is_reference"]
    # Subsets are drawn; the sets differ in size, so these are not all of both.
    kid = kernel_distance(real, samples, torch.Generator().manual_seed(3)).mean
    assert result["kid"] == pytest.approx(kid, abs=4 * result["kid_std"] / 10)
    assert result["inception_score"] is None and "class scores" in result["inception_score_reason"]
    assert result["sfid"] is None and "no covariance of ADM's spatial features" in result["sfid_reason"]
    found = np.load(tmp_path / "nearest.npz")
    assert np.array_equal(nearest(samples, real).distances[found["sample_numbers"]].shape, found["distances"].shape)
    printed = capsys.readouterr().out
    assert "FID" in printed and "no inception_score: the features come without class scores" in printed


def test_results_hold_all_that_is_needed_to_repeat_them(given, tmp_path):
    result = _evaluate(given, tmp_path, samples="samples.npz", reference="real.npz")
    assert result["features_sha256"] == file_sha256(given / "tiny.pt")
    assert result["samples_sha256"] == file_sha256(given / "samples.npz")
    assert result["reference_sha256"] == file_sha256(given / "real.npz")
    expected = {
        "features_variant": "torch-fidelity", "features_resize": "tf1_bilinear", "features_side": 299, "seed": 0,
        "samples_format": "npz", "image_size": [SIDE, SIDE], "reference_kind": "images", "reference_crop": None,
        "num_processes": 1, "num_threads": 1, "device": "cpu", "samples_num_classes": 3, "preset": None,
        "version_torch": torch.__version__, "inception_score_order": "as stored",
        "sampling_reason": "the samples' folder has no job.json or config.yaml",
    }  # fmt: skip
    assert {name: result[name] for name in expected} == expected
    assert all(not isinstance(value, dict) for value in result.values())
    # What is null has its reason, but for settings that were not given.
    settings = {"preset", "reference_crop", "training_images", "training_images_sha256", "device_name"}
    nulls = {name for name, value in result.items() if value is None and not name.startswith("features_")} - settings
    assert nulls and all(f"{name}_reason" in result for name in nulls)


def test_equal_for_any_order_names_batches_and_format(given, tmp_path):
    expected = _evaluate(given, tmp_path / "a")
    samples = np.load(given / "samples.npz")
    order = np.random.default_rng(5).permutation(NUM_SAMPLES)
    _write(tmp_path / "renamed", samples["arr_0"][order], samples["arr_1"][order], prefix="x")
    other = {"fid", "kid", "precision", "recall", "density", "coverage", *NEAREST, "fd_per_class_mean"}
    for number, options in enumerate(
        [
            {"samples": tmp_path / "renamed"},
            {"samples": "samples.npz", "reference": "real.npz"},
            {"more": ["--batch_size", 7]},
        ]
    ):
        more = options.pop("more", [])
        found = _evaluate(given, tmp_path / str(number), *more, **options)
        assert {name: found[name] for name in other} == {name: expected[name] for name in other}


def test_a_kept_reference_gives_the_same_figures_and_is_taken_up(given, tmp_path, capsys):
    kept = tmp_path / "kept.npz"
    expected = _evaluate(given, tmp_path / "a", "--reference_file", kept)
    assert "those kept in" not in capsys.readouterr().out
    again = _evaluate(given, tmp_path / "b", "--reference_file", kept)
    assert f"those kept in {kept}" in capsys.readouterr().out
    as_reference = _evaluate(given, tmp_path / "c", reference=kept)
    assert as_reference["reference_kind"] == "statistics" and as_reference["num_reference"] == NUM_REAL
    for name in (*FIGURES, *NEAREST):
        assert again[name] == as_reference[name] == expected[name], name
    # Made another way, it is neither taken up nor accepted.
    _evaluate(given, tmp_path / "d", "--reference_file", kept, "--features_variant", "clean-fid")
    assert "those kept in" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with features_variant clean-fid; expected torch-fidelity"):
        _evaluate(given, tmp_path / "e", reference=kept)


def test_statistics_alone_and_with_images_as_adm_has_them(given, features, tmp_path):
    real = features[1].double().numpy()
    statistics = {"mu": real.mean(0), "sigma": np.cov(real, rowvar=False)}
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "adm.npz", arr_0=np.load(given / "real.npz")["arr_0"][:20], **statistics)
    expected = _evaluate(given, tmp_path / "a")
    alone = _evaluate(given, tmp_path / "b", reference=tmp_path / "statistics.npz")
    assert alone["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert alone["reference_kind"] == "statistics" and alone["num_reference"] is None
    for name in ("kid", "precision", "recall", "density", "coverage"):
        assert alone[name] is None and "statistics alone" in alone[f"{name}_reason"]
    assert alone["nearest_train_p1_samples"] is None and not (tmp_path / "b" / "nearest.npz").exists()
    both = _evaluate(given, tmp_path / "c", reference=tmp_path / "adm.npz")
    assert both["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert both["reference_kind"] == "statistics and images" and both["num_reference_features"] == 20
    assert both["precision"] == neighbour_figures(features[1][:20], features[0]).precision


def test_pictures_of_other_sizes_are_cropped_and_it_is_said(given, tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "photos").mkdir()
    for number in range(9):
        size = (20 + 3 * number, 50 - 2 * number, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    result = _evaluate(given, tmp_path / "a", reference=tmp_path / "photos")
    assert (result["reference_crop"], result["num_reference"]) == ("center", 9)
    other = _evaluate(given, tmp_path / "b", "--reference_crop", "adm", reference=tmp_path / "photos")
    assert other["reference_crop"] == "adm" and other["fid"] != result["fid"]


def test_training_images_are_told_from_the_reference(given, features, tmp_path):
    shutil.copytree(given / "samples", tmp_path / "train")
    result = _evaluate(given, tmp_path / "a", "--training_images", tmp_path / "train")
    # The samples are the training images themselves.
    assert result["nearest_train_p1_samples"] == 0 == result["nearest_train_p1_ratio"]
    expected = nearest(features[1], features[0]).distances.quantile(0.01).item()
    assert result["nearest_train_p1_real"] == pytest.approx(expected, rel=1e-9)
    assert not result["nearest_train_is_reference"] and len(result["training_images_sha256"]) == 64


@pytest.mark.slow
def test_digits_and_datasets_serve_as_references(given, tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    by_name = _evaluate(given, tmp_path / "a", "--reference", "digits", reference=None)
    assert by_name["num_reference"] == 360 and by_name["reference"] == "digits::test"
    real = np.load(given / "real.npz")
    columns = {"image": [Image.fromarray(image) for image in real["arr_0"]], "label": real["arr_1"].tolist()}
    kinds = Features(image=ImageFeature(), label=ClassLabel(names=["a", "b", "c"]))
    DatasetDict(test=Dataset.from_dict(columns, features=kinds)).save_to_disk(tmp_path / "saved")
    found = _evaluate(given, tmp_path / "c", reference=tmp_path / "saved")
    assert found["fid"] == pytest.approx(_evaluate(given, tmp_path / "d")["fid"], rel=1e-9)


def test_data_give_the_reference_and_the_training_images(given, tmp_path):
    images = _pictures(12, 9)
    for split, some in (("train", images[:7]), ("held", images[7:])):
        _write(tmp_path / "data" / split / "cat", some)
    options = ["--data.source", "folder", "--data.path", tmp_path / "data", "--data.eval_split"]
    result = _evaluate(given, tmp_path / "a", *options, "held", reference=None)
    assert result["num_reference"] == 5 and not result["nearest_train_is_reference"]
    assert result["reference"].endswith(":held") and result["training_images"].endswith(":train")
    result = _evaluate(given, tmp_path / "b", *options, "held", "--reference_split", "train", reference=None)
    assert result["num_reference"] == 7 and result["nearest_train_is_reference"]
    result = _evaluate(given, tmp_path / "c", *options, "null", reference=None)
    assert result["num_reference"] == 7 and result["training_images"] is None


def test_the_sampling_job_is_in_the_result(given, tmp_path):
    job = {"seed": 7, "guidance_scale": 1.5, "class_labels": [0, 1], "num_images_per_label": 20}
    (tmp_path / "job").mkdir()
    shutil.copy(given / "samples.npz", tmp_path / "job" / "images.npz")
    (tmp_path / "job" / "job.json").write_text(json.dumps(job))
    result = _evaluate(given, tmp_path / "a", samples=tmp_path / "job")
    assert {name: result[f"sampling_{name}"] for name in job} == job
    (tmp_path / "job" / "job.json").unlink()
    (tmp_path / "job" / "config.yaml").write_text("seed: 8\nsampling:\n  top_k: 5\n")
    result = _evaluate(given, tmp_path / "b", samples=tmp_path / "job")
    assert (result["sampling_seed"], result["sampling_sampling_top_k"]) == (8, 5)


@pytest.mark.slow
def test_inception_has_scores_and_spatial_features(given, tmp_path):
    torch.manual_seed(0)
    torch.save(Inception2015().eval().state_dict(), tmp_path / "inception.pth")
    samples, real = _pictures(9, 0), _pictures(8, 1)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    options = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "real.npz"}
    result = _evaluate(given, tmp_path / "a", "--features", tmp_path / "inception.pth", **options)
    own, others = (load_features(str(tmp_path / "inception.pth"))(images) for images in (samples, real))
    assert result["inception_score"] == pytest.approx(inception_score(own.class_probabilities).mean, rel=1e-9)
    assert result["fid"] == pytest.approx(frechet_distance(own.features, others.features), rel=1e-6)
    spatial = frechet_distance(own.spatial_features, others.spatial_features)
    assert result["sfid"] == pytest.approx(spatial, rel=1e-6)


@pytest.mark.slow
def test_few_kept_features_change_no_frechet_distance(given, tmp_path):
    expected = _evaluate(given, tmp_path / "a")
    found = _evaluate(given, tmp_path / "b", "--max_features", 12)
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert found["num_sample_features"] == found["num_reference_features"] == 12
    assert any("12 of 40 samples are compared one by one" in note for note in found["notes"])


def _launch(num_processes, arguments, cwd):
    """Start the command on several processes as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    command += ["--num_processes", str(num_processes), "-m", "nextblock", "evaluate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_and_three_processes_give_what_one_gives(given, tmp_path):
    expected = _evaluate(given, tmp_path / "one")
    for num_processes in (2, 3):
        folder = tmp_path / str(num_processes)
        arguments = ["--samples", given / "samples", "--reference", given / "real", "--features", given / "tiny.pt"]
        arguments += ["--output_dir", folder, "--cpu", "true", "--batch_size", 8]
        _launch(num_processes, arguments, tmp_path)
        found = json.loads((folder / "result.json").read_text())
        assert found["num_processes"] == num_processes and not (folder / "parts").exists()
        for name in (*FIGURES, *NEAREST):
            assert found[name] == expected[name], name
