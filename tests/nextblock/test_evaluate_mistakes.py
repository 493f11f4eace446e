"""What `nextblock evaluate` of samples refuses: one message each, naming the option, its value, what is expected.

A line of the table is what is given, over arguments that work, and what the message says.
"""

import io
import json
import shlex
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nextblock import __main__ as cli
from nextblock.evaluation.presets import PRESETS, check_features, check_reference, check_samples
from nextblock.evaluation.references import OpenedReference

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SIDE = 8


class TinyNetwork(nn.Module):
    """Means of the colours."""

    def forward(self, x):
        return x.mean(dim=(2, 3))


class NanNetwork(nn.Module):
    """No numbers."""

    def forward(self, x):
        return x.mean(dim=(2, 3)) / 0 * 0


def _images(count, side=SIDE):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _folder(path, images, suffix="png"):
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number}.{suffix}")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What works, and all that does not."""
    root = tmp_path_factory.mktemp("given")
    torch.jit.script(TinyNetwork()).save(root / "tiny.pt")
    torch.jit.script(NanNetwork()).save(root / "nan.pt")
    _folder(root / "samples", _images(8))
    _folder(root / "real", _images(9))
    _folder(root / "mixed", _images(2))
    Image.fromarray(_images(1, 12)[0]).save(root / "mixed" / "larger.png")
    (root / "empty").mkdir()
    (root / "text.txt").write_text("text")
    _folder(root / "damaged", _images(3, 32))
    content = (root / "damaged" / "1.png").read_bytes()
    (root / "damaged" / "1.png").write_bytes(content[: len(content) // 2])
    (root / "broken").mkdir()
    (root / "broken" / "1.png").write_bytes((root / "real" / "1.png").read_bytes()[:60])
    arrays = {
        "floats": {"arr_0": _images(3) / 255},
        "grey": {"arr_0": _images(3)[..., 0]},
        "other": {"pictures": _images(3)},
        "labels": {"arr_0": _images(3), "arr_1": np.arange(2)},
        "none": {"arr_0": _images(0)},
        "below": {"arr_0": _images(3), "arr_1": np.array([0, -1, 1])},
        "larger": {"arr_0": _images(3, 12)},
        "no_sigma": {"mu": np.zeros(3)},
        "five": {"mu": np.zeros(5), "sigma": np.eye(5)},
        "oblong": {"mu": np.zeros(3), "sigma": np.ones((3, 2))},
        "skew": {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))},
        "negative": {"mu": np.zeros(3), "sigma": -np.eye(3)},
        "nan": {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
        "statistics": {"mu": np.zeros(3), "sigma": np.eye(3)},
    }
    for name, held in arrays.items():
        np.savez(root / f"{name}.npz", **held)
    (root / "cut.npz").write_bytes((root / "larger.npz").read_bytes()[:300])
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    with zipfile.ZipFile(root / "pickled.npz", "w") as archive:
        archive.writestr("arr_0.npy", pickled.getvalue())
    torch.save({"weight": torch.zeros(3)}, root / "weights.pth")
    (root / "job").mkdir()
    (root / "job" / "job.json").write_text(
        json.dumps({"seed": 0, "class_labels": [0], "num_images_per_label": 4, "output_format": "png"})
    )
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return root


WRONG = [
    # samples
    ("--samples {root}/missing", "samples is '{root}/missing': {root}/missing does not exist; expected"),
    ("--samples {root}/empty", "samples is '{root}/empty'"),
    ("--samples {root}/text.txt", "expected an .npz file or a folder of pictures"),
    ("--samples {root}/floats.npz", "of float64; expected (N, H, W, 3) of uint8"),
    ("--samples {root}/labels.npz", "labels.npz: arr_1"),
    ("--samples {root}/cut.npz", "cut.npz"),
    ("--samples {root}/below.npz", "arr_1 holds -1 at 1; expected 0 or more for each image"),
    # reference
    ("--reference {root}/missing", "reference is '{root}/missing': {root}/missing does not exist; expected"),
    ("--reference {root}/larger.npz", "has images of 12x12; expected 8x8, the samples' size"),
    ("--reference {root}/no_sigma.npz", "expected images as arr_0, or statistics as mu and sigma"),
    ("--reference {root}/five.npz", "is of 5 features; expected 3, the samples' number"),
    ("--reference {root}/nan.npz", "expected (F,) and (F, F), finite"),
    ("--reference {root}/real --data.source digits", "data.source 'digits'; expected one of them"),
    ("--reference {root}/real --reference_split test", "is no dataset; expected null"),
    ("--reference nothere", "cannot be loaded as a dataset: no such folder, and the hub does not answer"),
    ("--reference {root}/damaged", "reference: {root}/damaged holds what is no picture in order: cannot read"),
    ("--reference {root}/negative.npz", "sigma has negative variances; expected a covariance"),
    ("--reference {root}/real --reference_file {root}/larger.npz", "reference_file is '{root}/larger.npz'"),
    ("--reference {root}/real --reference_file {root}/text.txt", "reference_file is '{root}/text.txt'"),
    ("--reference {root}/real --reference_file {root}/empty", "reference_file is '{root}/empty'; expected a file that"),
    ("--training_images {root}/statistics.npz", "training_images is '{root}/statistics.npz'"),
    # features
    ("--features {root}/missing.pt", "features is '{root}/missing.pt'"),
    ("--features {root}/bert", "features is '{root}/bert'"),
    ("--features {root}/empty", "features is '{root}/empty'; expected a file of Inception's weights, or the folder or"),
    ("--features nothere", "no such file or folder, and the hub does not answer"),
    ("--features {root}/nan.pt", "are not finite; expected weights in order"),
    ("--features_variant dgm-eval", "variant is 'dgm-eval'; expected one of ['torch-fidelity'"),
    # the rest
    ("--output_dir {root}/samples", "output_dir is '{root}/samples', the same as samples"),
    ("--preset imagenet-256-adm", "samples break the preset 'imagenet-256-adm': there are 8; expected 50000"),
    ("--batch_size 0", "batch_size is 0; expected a positive integer"),
    ("--max_features 1", "max_features is 1; expected an integer of at least 2"),
    ("--aims '{{\"scales\": {{}}}}'", "aims is {{'scales': {{}}}}, but pipeline is null; expected both"),
]
MORE_WRONG = [
    ("--samples {root}/mixed", "expected pictures of one size"),
    ("--samples {root}/broken", "1.png"),
    ("--samples {root}/job", "expected a finished one"),
    ("--samples {root}/grey.npz", "expected (N, H, W, 3) of uint8"),
    ("--samples {root}/other.npz", "holds the arrays ['pictures']"),
    ("--samples {root}/none.npz", "expected at least one image"),
    ("--samples {root}/pickled.npz", "pickled.npz"),
    ("--reference {root}/empty", "reference is '{root}/empty'"),
    ("--reference {root}/broken", "1.png"),
    ("--reference {root}/oblong.npz", "mu is (3,) and sigma (3, 2); expected (F,) and (F, F), finite"),
    ("--reference {root}/skew.npz", "sigma is not symmetric; expected a covariance"),
    ("--reference {root}/cut.npz", "cut.npz"),
    ("--reference digits --reference_split held", "'held'"),
    ("--reference digits --reference_crop middle", "reference_crop"),
    ("--training_images {root}/missing", "training_images is '{root}/missing'"),
    ("--features {root}/text.txt", "features is '{root}/text.txt'"),
    ("--features {root}/weights.pth", "expected Inception's weights of 2015 by pytorch-fid's names"),
    ("--features_variant nearest", "features_variant"),
    ("--output_dir {root}/real", "output_dir is '{root}/real', the same as reference"),
    ("--output_dir {root}/text.txt", "expected a folder"),
    ("--preset imagenet-512", "preset"),
    ("--seed -1", "seed is -1; expected an integer of at least 0"),
    ("--num_threads 0", "num_threads is 0; expected a positive integer"),
    ("--run_dirs '[a, b]'", "run_dirs is ['a', 'b'], but pipeline is null; expected both"),
    ("--requires_own_tokenizer true", "requires_own_tokenizer is True, but pipeline is null; expected both"),
]
WITHOUT = [
    ("--samples {root}/samples --output_dir {new}", "features is null; expected a file of Inception's weights"),
    (
        "--samples {root}/samples --output_dir {new} --pipeline {root}/empty --reference {root}/real",
        "reference is '{root}/real', but features is null; expected both",
    ),
    ("--samples {root}/samples --output_dir {new} --features {root}/tiny.pt", "reference is null; expected a folder"),
    ("--features {root}/tiny.pt --output_dir {new} --reference {root}/real", "samples"),
    ("--samples {root}/samples --features {root}/tiny.pt --reference {root}/real", "output_dir"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _refused(arguments, given, tmp_path, capsys):
    words = shlex.split(arguments.format(root=given, new=tmp_path / "new"))
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", *words, "--cpu", "true"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said, said
    assert not (tmp_path / "new" / "result.json").exists()
    return said


@pytest.mark.parametrize(
    ("options", "message"), [*WRONG, *(pytest.param(*line, marks=pytest.mark.slow) for line in MORE_WRONG)]
)
def test_wrong_options_are_named(options, message, given, tmp_path, capsys):
    working = "--samples {root}/samples --reference {root}/real --features {root}/tiny.pt --output_dir {new} "
    if options.startswith("--data") or "--reference" in options:
        working = working.replace("--reference {root}/real ", "")
    said = _refused(working + options, given, tmp_path, capsys)
    assert message.format(root=given) in said, said


@pytest.mark.parametrize(("options", "message"), WITHOUT)
def test_missing_options_are_named(options, message, given, tmp_path, capsys):
    assert message.format(root=given) in _refused(options, given, tmp_path, capsys)


class _Samples:
    """Samples as a preset looks at them."""

    def __init__(self, labels, image_size=(256, 256), kind="npz"):
        self.class_labels, self.image_size, self.format = labels, image_size, kind
        self.length = 50_000 if labels is None else len(labels)

    def __len__(self):
        return self.length


def test_a_preset_takes_what_keeps_it_and_names_all_that_breaks_it():
    mixed = np.tile(np.random.default_rng(0).permutation(1000), 50)
    drawn = np.random.default_rng(1).permutation(np.repeat(np.arange(1000), 50))
    for labels in (mixed, drawn):
        for kind in ("npz", "png", "PNG"):
            check_samples("imagenet-256-adm", _Samples(labels, kind=kind))
    check_samples("rfid-imagenet-256", _Samples(None))

    def refused(samples, *messages, name="imagenet-256-adm"):
        with pytest.raises(ValueError, match=f"samples break the preset '{name}'") as error:
            check_samples(name, samples)
        assert all(message in str(error.value) for message in messages), error.value

    refused(_Samples(np.sort(mixed)), "5000 in a row are of only 10% of the classes; expected an order of mixed")
    uneven = mixed.copy()
    uneven[uneven == 7] = 8
    uneven[np.flatnonzero(mixed == 7)[:1]] = 7
    refused(_Samples(uneven), "class 7 has 1 and class 8 99; expected 50 each")
    refused(_Samples(mixed % 999), "999 classes, 0 to 998; expected all from 0 to 999")
    refused(_Samples(None), "they have no classes; expected 1000")
    refused(
        _Samples(mixed[:10_000], (512, 256), "jpeg"),
        "there are 10000; expected 50000",
        "they are 512x256; expected 256x256",
        "they are stored as jpeg; expected npz or png, without loss",
    )
    refused(_Samples(None, kind="png+webp"), "png+webp", name="rfid-imagenet-256")


def test_a_preset_refuses_other_weights_variants_and_references():
    known = PRESETS["imagenet-256-adm"].features_sha256
    record = {"features": "weights.pth", "features_sha256": known, "features_variant": "torch-fidelity"}
    check_features("imagenet-256-adm", record)
    with pytest.raises(ValueError, match="of sha256 abc; expected, for the preset 'imagenet-256-adm', pt_inception"):
        check_features("imagenet-256-adm", record | {"features_sha256": "abc"})
    with pytest.raises(ValueError, match="features_variant is 'clean-fid'; expected 'torch-fidelity'"):
        check_features("imagenet-256-adm", record | {"features_variant": "clean-fid"})
    images = _Samples(np.arange(10_000))
    sha256 = PRESETS["imagenet-256-adm"].reference_sha256
    check_reference("imagenet-256-adm", OpenedReference("virtual.npz", images, None, sha256, None))
    with pytest.raises(ValueError, match=r"its sha256 is abc; expected b327.*it holds 0 images; expected 10000"):
        check_reference("imagenet-256-adm", OpenedReference("virtual.npz", None, None, "abc", None))
    check_reference("rfid-imagenet-256", OpenedReference("val", _Samples(None), None, "abc", "adm"))
    with pytest.raises(ValueError, match=r"cut out by the crop 'center'; expected 'adm'"):
        check_reference("rfid-imagenet-256", OpenedReference("val", _Samples(None), None, "abc", "center"))
