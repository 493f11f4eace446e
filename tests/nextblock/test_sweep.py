"""A sweep over one sampling option: what is drawn, what is put together, what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock import sweep
from nextblock.evaluate import main
from nextblock.evaluation.sample_sets import open_samples
from nextblock.prior.sampling import GivenSamplingOptions
from nextblock.sweep_config import DrawConfig, Sweep, sample_configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_scale", "expected numbers such as guidance_scale=1,2"),
        ("guidance_scale=", "expected numbers"),
        ("guidance_scale=1,,2", "expected numbers"),
        ("guidance_scale=1,high", "could not convert string to float: 'high'"),
        ("top_k=1.5", "invalid literal"),
        ("seed=1,2", r"expected NAME=VALUE,VALUE,… with one of \['guidance_scale'"),
        ("guidance_schedule=linear", "expected NAME=VALUE"),
        ("", "expected NAME=VALUE"),
        ("guidance_scale=1,2,1.0", "expected each value once"),
        ("guidance_scale=1,-1", "guidance_scale is -1.0; expected a number from 0 to 1000"),
        ("top_p=0", "top_p is 0.0"),
        ("guidance_scale=nan", "guidance_scale is nan"),
    ],
)
def test_wrong_sweeps_are_named(text, message):
    with pytest.raises(ValueError, match=f"sweep is {text!r}.*{message}"):
        Sweep.parse(text)


def test_values_are_numbers_of_the_options_own_kind():
    assert Sweep.parse("guidance_scale = 1.0,1.25, 2") == Sweep("guidance_scale", (1.0, 1.25, 2.0))
    assert Sweep.parse("top_k=5,0").values == (5, 0) and isinstance(Sweep.parse("top_k=5").values[0], int)


def test_what_is_swept_is_not_set_besides(tmp_path):
    draw = DrawConfig(sampling=GivenSamplingOptions(top_k=3, temperature=0.5))
    with pytest.raises(ValueError, match=r"draw.sampling.top_k is 3; expected null, as sweep says"):
        sample_configs(Sweep.parse("top_k=1"), draw, tmp_path, pipeline="p")
    (job,) = sample_configs(Sweep.parse("top_p=0.5"), draw, tmp_path, pipeline="p", cpu=True)
    assert (job.sampling.top_k, job.sampling.temperature, job.sampling.top_p, job.cpu) == (3, 0.5, 0.5, True)


def test_options_of_the_draw_are_named(tmp_path):
    with pytest.raises(ValueError, match="draw.num_images_per_label is 0; expected a positive integer"):
        sample_configs(Sweep.parse("top_k=1"), DrawConfig(num_images_per_label=0), tmp_path, pipeline="p")


class TinyNetwork(torch.nn.Module):
    """Features of pixels: means of four parts of each channel."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, (2, 2)).flatten(1)


@pytest.fixture(scope="module")
def given(ten_class_pipeline_dir, tmp_path_factory):
    """The options of a sweep, all but its values and its folder."""
    root = tmp_path_factory.mktemp("given")
    torch.jit.script(TinyNetwork()).save(root / "tiny.pt")
    np.savez(root / "real.npz", np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    options = {"pipeline": ten_class_pipeline_dir, "features": root / "tiny.pt", "reference": root / "real.npz"}
    options |= {"draw.num_images_per_label": 2, "draw.seed": 3, "draw.batch_size": 10, "cpu": "true"}
    return options


def run(given: dict, output_dir, values: str = "", **more) -> dict:
    options = given | {"output_dir": output_dir, "sweep": values} | more
    main([f"--{name}={value}" for name, value in options.items()])
    return json.loads((output_dir / "sweep.json").read_text())


def test_each_value_is_drawn_and_measured_once(given, tmp_path, capsys, monkeypatch):
    first = run(given, tmp_path / "out", "guidance_scale=3.0,1.0")
    assert [row["guidance_scale"] for row in first["figures"]] == first["values"] == [3.0, 1.0]
    printed = capsys.readouterr().out
    assert re.search(r"^guidance_scale +fid +fd +kid ", printed, re.MULTILINE)
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.size == (600 * 3, 400)  # FID, precision, recall: fd is FID, and there are no class scores
    for row in first["results"]:
        folder = tmp_path / "out" / f"guidance_scale={row['guidance_scale']}"
        samples = open_samples(folder / "samples")
        assert (samples.job["guidance_scale"], samples.job["seed"], len(samples)) == (row["guidance_scale"], 3, 20)
        arguments = ["--samples", str(folder / "samples"), "--output_dir", str(tmp_path / folder.name), "--cpu=true"]
        main([*arguments, *(f"--{name}={given[name]}" for name in ("features", "reference"))])
        alone = json.loads((tmp_path / folder.name / "result.json").read_text())
        assert {name: row[name] for name in alone} == alone
        assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 2
        assert {path.name for path in folder.glob("*.png")} == {"samples.png", "neighbours.png"}
    assert first["results"][0]["fid"] != first["results"][1]["fid"]

    # What is finished stays; what is not, or new, is done.
    (tmp_path / "out" / "guidance_scale=1.0" / "result.json").unlink()
    measured = []
    whole = sweep.measure_samples
    monkeypatch.setattr(sweep, "measure_samples", lambda *given: measured.append(given[0].output_dir) or whole(*given))
    again = run(given, tmp_path / "out", "guidance_scale=1.0,2.0,3.0")
    assert [Path(folder).name for folder in measured] == ["guidance_scale=1.0", "guidance_scale=2.0"]
    assert [again["figures"][number] for number in (2, 0)] == first["figures"]


@pytest.mark.slow
def test_another_sweep_is_refused_the_folder_before_anything_is_drawn(given, tmp_path):
    run(given, tmp_path / "out", "top_k=1")
    for more in ({"draw.seed": 4}, {"max_features": 7}, {"features_variant": "clean-fid"}, {"sweep": "top_p=0.5"}):
        with pytest.raises(ValueError, match="out holds another job, whose"):
            run(given, tmp_path / "out", **({"sweep": "top_k=2"} | more))
    for more, message in (
        ({"sweep": "top_k=1,99"}, "top_k is 99"),
        ({"features": tmp_path / "no.pt"}, "features is"),
        ({"reference": tmp_path / "no.npz"}, "reference is"),
        ({"pipeline": tmp_path / "no"}, "pipeline is"),
        ({"draw.class_labels": "[12]"}, "class_labels holds 12"),
    ):
        with pytest.raises(ValueError, match=message):
            run(given, tmp_path / "new", **({"sweep": "top_k=1"} | more))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["top_k=1"]
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(given, tmp_path, launch_two):
    expected = run(given, tmp_path / "one", "top_k=1,4")
    options = given | {"output_dir": tmp_path / "two", "sweep": "top_k=1,4"}
    launch_two("evaluate", *(f"--{name}={value}" for name, value in options.items()), cwd=tmp_path)
    assert json.loads((tmp_path / "two" / "sweep.json").read_text())["figures"] == expected["figures"]
    assert (tmp_path / "two" / "sweep.png").read_bytes() == (tmp_path / "one" / "sweep.png").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sweep": "seed=1"}, "sweep is 'seed=1'; expected NAME=VALUE"),
        ({"features": None}, "features is null, but sweep is 'top_k=1'"),
        ({"pipeline": None}, "pipeline is null, but sweep is 'top_k=1'"),
        ({"samples": "somewhere"}, "samples is 'somewhere' and sweep 'top_k=1'; expected one of them"),
        ({"sweep": None}, "samples is null; expected images to measure, or a sweep that draws them"),
        ({"sweep": None, "samples": "somewhere"}, "draw says how a sweep draws, but sweep is null"),
        ({"draw.sampling.top_k": 3}, "draw.sampling.top_k is 3; expected null"),
        ({"draw.num_images_per_label": 0}, "draw.num_images_per_label is 0"),
    ],
)
def test_options_that_do_not_go_together_are_named(given, tmp_path, capsys, changed, message):
    options = given | {"output_dir": tmp_path / "out", "sweep": "top_k=1"} | changed
    with pytest.raises(SystemExit):
        main([f"--{name}={value}" for name, value in options.items() if value is not None])
    assert message in capsys.readouterr().err
