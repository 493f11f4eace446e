"""A sampling job that stopped goes on where it was; a finished one stays; another one is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from nextblock.data.digits import CLASS_NAMES
from nextblock.evaluation.sample_sets import open_samples
from nextblock.files import atomic
from nextblock.pipelines import ClassToImagePipeline, sample_files
from nextblock.sample import main

FORMATS = {"npz": sample_files.NpzFile, "png": sample_files.PictureFolder}
OPTIONS = ["--num_images_per_label", "2", "--batch_size", "3", "--seed", "5"]


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times_of(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def sample_in(ten_class_pipeline_dir):
    """Draw 20 images into the folder `out` of another folder, so that configs name the same one."""

    def run(root, *options: str) -> None:
        root.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            main(["--pipeline", str(ten_class_pipeline_dir), "--output_dir", "out", *OPTIONS, *options])

    return run


@pytest.fixture(scope="module", params=FORMATS)
def finished(request, sample_in, tmp_path_factory):
    """An output format and the folder of an undisturbed job."""
    root = tmp_path_factory.mktemp("finished")
    sample_in(root, "--output_format", request.param)
    return request.param, root / "out"


def stop_in_part(patch, files_class, number: int) -> None:
    """Let writing fail in the middle of one part of seven."""
    write = files_class.write

    def fail(self, batch, images):
        if batch.start == 3 * number:
            patch.setattr(atomic, "flush_to_disk", interrupt)
        write(self, batch, images)

    def interrupt(path):
        raise OSError("no space left")

    patch.setattr(files_class, "write", fail)


@pytest.mark.parametrize("number", [0, 4])
def test_a_job_that_stopped_goes_on_and_ends_as_if_it_had_not(sample_in, finished, tmp_path, capsys, number):
    output_format, expected = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextblock.sample._NUM_WRITERS", 1)
        stop_in_part(patch, FORMATS[output_format], number)
        with pytest.raises(OSError, match="no space left"):
            sample_in(tmp_path, "--output_format", output_format)
    assert not (tmp_path / "out" / "images.npz").exists() and not (tmp_path / "out" / "samples.png").exists()
    assert not any(path.suffix == ".tmp" for path in (tmp_path / "out").rglob("*"))
    kept = {path: time for path, time in times_of(tmp_path / "out").items() if path.suffix in (".npy", ".png")}
    sample_in(tmp_path, "--output_format", output_format)
    # The parts before stay as they are.
    assert f"20 images, {20 - 3 * number} of them drawn now by 1 process\n" in capsys.readouterr().out
    if output_format == "png":
        after = times_of(tmp_path / "out")
        assert len(kept) == 3 * number and kept.items() <= after.items()
    assert files_of(tmp_path / "out") == files_of(expected)


def test_a_job_that_stopped_after_its_last_part_ends_as_if_it_had_not(sample_in, finished, tmp_path, capsys):
    output_format, expected = finished

    def interrupt(*arguments, **options):
        raise OSError("no space left")

    for moment in (
        "pipelines.sample_files.NpzFile._write_archive",
        "pipelines.sample_files.shutil.rmtree",
        "sample.class_grid",
    ):
        if output_format == "png" and "sample_files" in moment:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"nextblock.{moment}", interrupt)
            with pytest.raises(OSError, match="no space left"):
                sample_in(tmp_path, "--output_format", output_format)
    sample_in(tmp_path, "--output_format", output_format)
    assert "20 images, 0 of them drawn now by 1 process\n" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == files_of(expected)


def test_a_finished_job_stays_as_it_is(sample_in, finished, capsys):
    output_format, folder = finished
    before = times_of(folder)
    sample_in(folder.parent, "--output_format", output_format)
    assert "20 images, all there already\n" in capsys.readouterr().out
    assert times_of(folder) == before


def test_another_job_is_refused_the_folder(sample_in, ten_class_pipeline_dir, tmp_path):
    sample_in(tmp_path)
    before = times_of(tmp_path / "out")
    pipe = ClassToImagePipeline.from_pretrained(ten_class_pipeline_dir)
    with torch.no_grad():
        pipe.prior.head.weight[0, 0] += 1
    pipe.save_pretrained(tmp_path / "other")
    for options, difference in (
        ("--seed 6", "seed is 5; this one has 6"),
        ("--batch_size 4", "batch_size is 3; this one has 4"),
        ("--num_images_per_label 3", "num_images_per_label is 2; this one has 3"),
        ("--class_labels [1,0]", r"class_labels is \[0, 1, .*, 9\]; this one has \[1, 0\]"),
        ("--sampling.guidance_scale 2", "guidance_scale is 1.0; this one has 2.0"),
        ("--sampling.guidance_schedule linear", "guidance_schedule is constant; this one has linear"),
        ("--sampling.guidance_power 2", "guidance_power is 1.0; this one has 2.0"),
        ("--sampling.temperature 0.5", "temperature is 1.0; this one has 0.5"),
        ("--sampling.top_k 3", "top_k is 0; this one has 3"),
        ("--sampling.top_p 0.5", "top_p is 1.0; this one has 0.5"),
        ("--sampling.min_p 0.5", "min_p is 0.0; this one has 0.5"),
        ("--dtype bfloat16", "dtype is float32; this one has bfloat16"),
        ("--num_threads 2", "num_threads is 1; this one has 2"),
        ("--output_format webp", "output_format is npz; this one has webp"),
        (f"--pipeline {tmp_path / 'other'}", "prior_sha256 is "),
    ):
        with pytest.raises(ValueError, match=f"output_dir out holds another job, whose {difference}"):
            sample_in(tmp_path, *options.split())
    assert times_of(tmp_path / "out") == before


def test_the_quality_is_part_of_lossy_jobs_alone(sample_in, tmp_path):
    few = ["--class_labels", "[4]", "--num_images_per_label", "1"]
    sample_in(tmp_path / "png", *few, "--output_format", "png")
    sample_in(tmp_path / "png", *few, "--output_format", "png", "--image_quality", "50")
    sample_in(tmp_path / "jpeg", *few, "--output_format", "jpeg")
    with pytest.raises(ValueError, match="whose image_quality is 95; this one has 50"):
        sample_in(tmp_path / "jpeg", *few, "--output_format", "jpeg", "--image_quality", "50")


def test_a_folder_that_holds_other_things_is_left_alone(sample_in, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images.npz").write_bytes(b"precious")
    with pytest.raises(ValueError, match="output_dir out holds files but no job.json; expected a new folder"):
        sample_in(tmp_path)
    assert files_of(tmp_path / "out") == {"images.npz": b"precious"}


@pytest.mark.parametrize(("text", "problem"), [("{", "job.json is damaged: "), ("[]", "job.json holds no job")])
def test_a_damaged_job_is_refused_the_folder(sample_in, tmp_path, text, problem):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text(text)
    with pytest.raises(ValueError, match=f"output_dir out: .*{problem}.*; expected a new folder"):
        sample_in(tmp_path)
    assert files_of(tmp_path / "out") == {"job.json": text.encode()}


def test_a_finished_folder_that_was_tampered_with_is_mended_or_refused(sample_in, finished, tmp_path, capsys):
    output_format, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    removed = "images.npz" if output_format == "npz" else "images/4-four/09.png"
    (tmp_path / "out" / removed).unlink()
    sample_in(tmp_path, "--output_format", output_format)
    assert f"20 images, {20 if output_format == 'npz' else 3} of them drawn now" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == files_of(folder)
    if output_format == "png":
        (tmp_path / "out" / "images" / "4-four" / "copy.png").touch()
        with pytest.raises(ValueError, match="4-four/copy.png is there; expected exactly the job's 20 images"):
            sample_in(tmp_path, "--output_format", output_format)


def test_damaged_files_are_named_and_drawn_again(sample_in, finished, tmp_path, capsys):
    output_format, folder = finished
    shutil.copytree(folder, tmp_path / "out")
    if output_format == "png":
        files = [tmp_path / "out" / "images" / name for name in ("4-four/09.png", "0-zero/00.png")]
        files[0].write_bytes(files[0].read_bytes()[:-20])
        files[1].write_bytes(b"")
    else:
        # An archive cut short; parts that are empty, cut short, or of another batch.
        files = [tmp_path / "out" / "images.npz", *(tmp_path / "out" / "parts" / f"{n:09d}.npy" for n in (0, 3, 6))]
        files[0].write_bytes(files[0].read_bytes()[:-20])
        files[1].parent.mkdir()
        files[1].write_bytes(b"")
        np.save(files[2], np.zeros((3, 32, 32, 3), np.uint8))
        files[2].write_bytes(files[2].read_bytes()[:-20])
        np.save(files[3], np.zeros((2, 32, 32, 3), np.uint8))
    sample_in(tmp_path, "--output_format", output_format)
    output = capsys.readouterr().out
    for file in files:
        assert f"{file.relative_to(tmp_path)} " in output
    assert output.count(": drawn again\n") == len(files) and files_of(tmp_path / "out") == files_of(folder)


@pytest.mark.parametrize("state", ["begun", "half", "finished"])
def test_a_folder_of_an_earlier_version_is_finished_as_it_was_begun(sample_in, finished, tmp_path, capsys, state):
    """It is sorted by class, and nothing in it says so."""
    output_format, folder = finished
    samples = open_samples(folder)
    places = np.argsort(samples.index)
    images, class_labels = samples.images(places), samples.class_labels[places]
    out = tmp_path / "out"
    if state == "finished":
        shutil.copytree(folder, out)
    out.mkdir(exist_ok=True)
    job = json.loads((folder / "job.json").read_text())
    assert job.pop("class_order") == "in turn"
    (out / "job.json").write_text(json.dumps(job, indent=2) + "\n")
    if output_format == "npz":
        np.savez(tmp_path / "expected.npz", images, class_labels)
        if state == "finished":
            shutil.copy(tmp_path / "expected.npz", out / "images.npz")
    if state == "half":
        files = FORMATS[output_format]
        arguments = ([32, 32],) if output_format == "npz" else (10, CLASS_NAMES, "png", 95)
        files(out, class_labels, *arguments).write(range(3, 6), images[3:6])
    sample_in(tmp_path, "--output_format", output_format)
    num_drawn = {"begun": "20 of them drawn now by 1 process", "half": "17 of them drawn now by 1 process"}
    assert f"20 images, {num_drawn.get(state, 'all there already')}\n" in capsys.readouterr().out
    assert json.loads((out / "job.json").read_text()) == job
    for name in ("samples.png", "config.yaml"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    if output_format == "npz":
        assert (out / "images.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
    else:
        assert files_of(out / "images") == files_of(folder / "images")
    sample_in(tmp_path, "--output_format", output_format)
    assert "20 images, all there already\n" in capsys.readouterr().out


def test_job_json_says_what_the_images_depend_on(finished):
    job = json.loads((finished[1] / "job.json").read_text())
    assert job["class_labels"] == list(range(10)) and job["device"] == "cpu" and job["image_quality"] is None
    assert len(job["tokenizer_sha256"]) == len(job["prior_sha256"]) == 64
