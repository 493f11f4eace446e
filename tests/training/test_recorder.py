"""What a run leaves for people: metrics.jsonl, event files, pictures."""

import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextblock.training.recorder import Recorder, _seconds_since_process_start


@pytest.fixture
def accelerator(fresh_accelerate, tmp_path) -> Accelerator:
    logging_dir = str(tmp_path / "logs")
    project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=logging_dir)
    return Accelerator(cpu=True, log_with="tensorboard", project_config=project)


def read_lines(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("time/total") > 0 for line in lines)
    return lines


def test_a_process_is_as_old_as_its_start():
    reader, writer = os.pipe()
    start = time.monotonic()
    if os.fork() == 0:  # A process of its own, without the seconds of an import.
        time.sleep(0.2)
        first = _seconds_since_process_start()
        time.sleep(0.5)
        os.write(writer, f"{first} {_seconds_since_process_start()}".encode())
        os._exit(0)
    os.wait()
    passed = time.monotonic() - start
    first, second = map(float, os.read(reader, 100).split())
    # The clock of /proc ticks every hundredth of a second.
    assert 0.18 < first < second <= passed + 0.02 and second - first >= 0.48


def test_training_metrics_are_means_since_the_last_line(accelerator, tmp_path):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    recorder.add({"loss": torch.tensor(1.0, requires_grad=True), "codebook/usage": torch.tensor(0.5)})
    recorder.add({"loss": torch.tensor(4.0), "codebook/usage": 1.0})
    assert recorder.log_training(2) == {"train/codebook/usage": 0.75, "train/loss": 2.5}
    recorder.add({"loss": torch.tensor(7.0, dtype=torch.bfloat16), "codebook/usage": torch.tensor(0.25)})
    assert recorder.log_training(3)["train/loss"] == 7.0
    assert read_lines(tmp_path) == [
        {"step": 2, "train/codebook/usage": 0.75, "train/loss": 2.5},
        {"step": 3, "train/codebook/usage": 0.25, "train/loss": 7.0},
    ]


def test_values_that_are_not_finite_count_for_no_mean(accelerator, tmp_path):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    for loss in (1.0, float("nan"), 3.0, float("inf")):
        recorder.add({"loss": torch.tensor(loss), "grad_norm": float("inf")})
    assert recorder.log_training(4) == {"train/loss": 2.0}
    recorder.add({"loss": 5.0, "grad_norm": 1.0})
    assert recorder.log_training(5) == {"train/loss": 5.0, "train/grad_norm": 1.0}
    assert read_lines(tmp_path)[0] == {"step": 4, "train/loss": 2.0}


def test_alarms_reach_the_log_and_their_file(accelerator, tmp_path, caplog):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    assert not (tmp_path / "alarms.jsonl").exists()
    for step in (1, 2):
        recorder.log_alarm(step, f"step {step}: look here")
    assert ["look here" in record.getMessage() for record in caplog.records] == [True, True]
    Recorder(accelerator, tmp_path, first_step=1)
    lines = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "alarm": "step 1: look here"}]
    Recorder(accelerator, tmp_path, first_step=0)
    assert (tmp_path / "alarms.jsonl").read_text() == ""


def test_evaluations_and_pictures_reach_files_and_tensorboard(accelerator, tmp_path):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    recorder.add({"loss": 3.0})
    recorder.log_training(5)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    recorder.log_evaluation(5, {"psnr": 20.5}, {"samples": Image.fromarray(pixels)})
    assert recorder.last_evaluation == {"eval/psnr": 20.5}
    accelerator.end_training()

    training, evaluation = read_lines(tmp_path)
    assert training == {"step": 5, "train/loss": 3.0}
    assert evaluation == {"step": 5, "eval/psnr": 20.5}
    with Image.open(tmp_path / "pictures" / "samples_00000005.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    assert len(list((tmp_path / "pictures").iterdir())) == 1

    (events,) = (tmp_path / "logs" / "nextblock").glob("events.out.tfevents.*")
    logged = EventAccumulator(str(events), {"tensors": 0, "images": 0, "scalars": 0}).Reload()
    assert set(logged.Tags()["scalars"]) == {"train/loss", "eval/psnr", "time/total"}
    (scalar,) = logged.Scalars("eval/psnr")
    assert (scalar.step, scalar.value) == (5, 20.5)
    assert logged.Tags()["images"] == ["samples"]
    (image,) = logged.Images("samples")
    assert (image.step, image.height, image.width) == (5, 6, 4)


def test_without_a_tracker_the_files_are_still_written(fresh_accelerate, tmp_path):
    recorder = Recorder(Accelerator(cpu=True), tmp_path, first_step=0)
    recorder.log_evaluation(1, {"psnr": 1.0}, {"samples": Image.new("RGB", (2, 2))})
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "pictures"}


def test_a_resumed_run_drops_what_it_will_write_again(accelerator, tmp_path):
    lines = [{"step": step, "train/loss": float(step)} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(line | {"time/total": 1000.0 * line["step"]}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    Recorder(accelerator, tmp_path, first_step=2)
    assert read_lines(tmp_path) == lines[:2]
    # A crash in the middle of a line.
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "tra')
    recorder = Recorder(accelerator, tmp_path, first_step=4)
    recorder.add({"loss": 9.0})
    recorder.log_training(5)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["time/total"] > 4000, "the time of what went before counts too"
    assert read_lines(tmp_path) == [*lines, {"step": 5, "train/loss": 9.0}]


def test_a_resumed_run_knows_whether_its_first_step_was_evaluated(accelerator, tmp_path):
    lines = [{"step": 2, "eval/psnr": 20.0}, {"step": 4, "train/loss": 1.0}, {"step": 4, "eval/psnr": 21.0}]
    text = "".join(json.dumps(line | {"time/total": 1.0}) + "\n" for line in lines)
    expected = {0: None, 2: {"eval/psnr": 20.0}, 3: None, 4: {"eval/psnr": 21.0}}
    for step, evaluation in expected.items():
        (tmp_path / "metrics.jsonl").write_text(text)
        assert Recorder(accelerator, tmp_path, first_step=step).last_evaluation == evaluation


def test_metrics_that_some_steps_lack_are_means_of_the_others(accelerator, tmp_path):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    for metrics in ({"loss": 1.0}, {"loss": 2.0, "gan": 5.0}, {"gan": 7.0, "loss": 6.0}):
        recorder.add(metrics)
    assert recorder.log_training(3) == {"train/gan": 6.0, "train/loss": 3.0}


def test_a_fresh_run_starts_a_new_file(accelerator, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    Recorder(accelerator, tmp_path, first_step=0)
    assert read_lines(tmp_path) == []


def test_processes_are_averaged_and_only_the_first_writes(tmp_path):
    reduced = []

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        reduced.append(sums)
        return sums + torch.tensor([[3.0, 1.0], [0.0, 0.0]])  # The other process has seen no finite loss.

    accelerator = SimpleNamespace(
        is_main_process=False,
        init_trackers=lambda name, init_kwargs: None,
        reduce=reduce,
        device="cpu",
        log=lambda *a, **k: None,
    )
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    recorder.add({"loss": 4.0, "accuracy": 1.0})
    assert recorder.log_training(1) == {"train/accuracy": 2.0, "train/loss": 4.0}
    assert [sums.tolist() for sums in reduced] == [[[1.0, 1.0], [4.0, 1.0]]]
    recorder.log_evaluation(1, {"psnr": 1.0}, {"samples": Image.new("RGB", (2, 2))})
    assert list(tmp_path.iterdir()) == []
    assert recorder.last_evaluation == {"eval/psnr": 1.0}


def test_another_tracker_gets_the_same(fresh_accelerate, tmp_path, monkeypatch):
    """In place of Weights & Biases, which needs an account: a tracker with the same interface."""
    calls = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, True

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            calls.append((step, values))

        def log_images(self, values, step=None, **options):
            calls.append((step, {name: images.shape for name, images in values.items()}))
            assert options == {}

        def finish(self):
            calls.append("finished")

    accelerator = Accelerator(cpu=True, log_with=Tracker())
    options = {"loop": {"seed": 7}}
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "init_trackers", lambda name, init_kwargs: calls.append(init_kwargs["wandb"]))
        Recorder(accelerator, tmp_path, first_step=0, options=options)
    assert calls.pop() == {"dir": str(tmp_path), "config": options}
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    recorder.add({"loss": 1.5})
    recorder.log_training(1)
    recorder.log_evaluation(1, {"psnr": 20.0}, {"samples": Image.new("RGB", (4, 3))})
    accelerator.end_training()
    assert calls[0][0] == 1 and calls[0][1].pop("time/total") > 0 and calls[0][1] == {"train/loss": 1.5}
    assert calls[1][1].keys() == {"eval/psnr", "time/total"}
    assert calls[2:] == [(1, {"samples": (1, 3, 4, 3)}), "finished"]


def test_losses_are_best_when_low_and_other_figures_when_high(accelerator, tmp_path):
    recorder = Recorder(accelerator, tmp_path, first_step=0)
    assert recorder.is_best("loss", 2.0) and not recorder.is_best("loss", float("nan"))
    recorder.log_evaluation(1, {"loss": 2.0, "psnr": 20.0}, {})
    recorder.log_evaluation(2, {"loss": float("nan"), "psnr": float("nan")}, {})
    resumed = Recorder(accelerator, tmp_path, first_step=2)
    for each in (recorder, resumed):
        assert each.is_best("loss", 1.0) and not each.is_best("loss", 2.0) and not each.is_best("loss", 3.0)
        assert each.is_best("psnr", 21.0) and not each.is_best("psnr", 20.0)
