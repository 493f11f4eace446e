"""The loop with a toy task: cadence, weight average, resuming, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from nextblock.training.accelerator import build_accelerator
from nextblock.training.average import saved_average
from nextblock.training.loop import fit
from nextblock.training.loop_config import LoopConfig
from nextblock.training.order import StepSampler

NUM_SAMPLES = 20
OPTIONS = {"batch_size": 4, "cpu": True, "mixed_precision": "no", "tracker": None, "log_every": 1}


class Keys(Dataset):
    """Samples that say which they are."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def collate(keys: list) -> dict[str, torch.Tensor]:
    return {"key": torch.tensor(keys)}


class CrashError(Exception):
    """What ends a training early."""


class ToyTask:
    """Steps that depend on weights, samples and dropout, and notes of all that `fit` asks for."""

    def __init__(self, accelerator, crash_at: int | None = None):
        model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        self.modules, self.optimizers, self.records = [self.model], [self.optimizer], {}
        self.code_usage = None
        self.crash_at = crash_at
        self.batches, self.losses, self.evaluated, self.exported, self.num_starts = [], [], [], [], 0

    def start(self) -> None:
        self.num_starts += 1

    def train_step(self, micro_batches, step: int) -> dict:
        if step == self.crash_at:
            raise CrashError
        assert self.model.training
        self.batches += [[tuple(key) for key in batch["key"].tolist()] for batch in micro_batches]
        losses = torch.stack([self.model(batch["key"].float() / 20).square().mean() for batch in micro_batches])
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(losses.mean().item())
        return {"loss": losses.mean()}

    def evaluate(self, model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)  # As a loader does.
        self.evaluated.append(model)
        return {"bias": model[2].bias.item()}, {"picture": Image.new("RGB", (2, 2))}

    def export(self, model, metrics) -> None:
        self.exported.append(({name: t.clone() for name, t in model.state_dict().items()}, metrics))


@dataclass(kw_only=True)
class ToyRun:
    """Options of a toy's run."""

    loop: LoopConfig
    learning_rate: float = 0.05


def train(folder: Path, crash_at: int | None = None, learning_rate: float = 0.05, **options) -> ToyTask:
    """Train a toy in this process; an interrupted training returns what it did so far."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = ToyRun(loop=LoopConfig(**OPTIONS | options), learning_rate=learning_rate)
    accelerator = build_accelerator(run.loop, folder)
    task = ToyTask(accelerator, crash_at)
    if crash_at is None:
        fit(accelerator, task, Keys(), collate, run, folder)
    else:
        with pytest.raises(CrashError):
            fit(accelerator, task, Keys(), collate, run, folder)
    return task


def read_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time/total"} for line in lines]


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate):
    """Every training chooses its precision anew."""


def test_logging_evaluation_and_saving_keep_their_cadence(tmp_path):
    task = train(tmp_path, num_steps=11, log_every=4, eval_every=5, save_every=3, num_checkpoints=9)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 4, 6, 8, 9, 11]
    assert [line["step"] for line in lines if "eval/bias" in line] == [5, 10, 11]
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == [f"picture_{step:08d}.png" for step in (5, 10, 11)]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"step_{step:08d}" for step in (3, 6, 9, 11)]
    assert lines[1]["train/loss"] == pytest.approx(task.losses[3])
    assert lines[3]["train/loss"] == pytest.approx(sum(task.losses[4:6]) / 2)
    assert task.num_starts == 1


def test_by_default_the_end_alone_is_evaluated_and_saved(tmp_path):
    train(tmp_path, num_steps=3, log_every=50)
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_steps_take_the_samplers_batches(tmp_path, num_micro_batches):
    task = train(tmp_path, num_steps=7, gradient_accumulation_steps=num_micro_batches, seed=3)
    sampler = StepSampler(
        NUM_SAMPLES, 4, num_micro_batches=num_micro_batches, seed=3, steps=range(7), rank=0, world_size=1
    )
    assert task.batches == list(sampler)


def test_workers_change_nothing(tmp_path):
    alone, helped = train(tmp_path / "0", num_steps=3), train(tmp_path / "2", num_steps=3, num_workers=2)
    assert alone.losses == helped.losses and alone.batches == helped.batches


def test_the_average_is_evaluated_and_exported(tmp_path):
    task = train(tmp_path, num_steps=4, eval_every=2, ema_decay=0.5)
    assert len(task.evaluated) == 2 and task.evaluated[0] is task.evaluated[1]
    assert task.evaluated[0] is not task.model
    ((exported, metrics),) = task.exported
    raw = task.model.state_dict()
    assert not any(torch.equal(tensor, raw[name]) for name, tensor in exported.items())
    saved = saved_average(tmp_path / "checkpoints" / "step_00000004")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())
    assert metrics == {"eval/bias": exported["2.bias"].item()}


def test_without_an_average_the_weights_themselves_are(tmp_path):
    task = train(tmp_path, num_steps=4, eval_every=2, ema_decay=None)
    assert all(model is task.model for model in task.evaluated)
    ((exported, _),) = task.exported
    assert all(torch.equal(tensor, exported[name]) for name, tensor in task.model.state_dict().items())


def test_evaluations_do_not_change_the_training(tmp_path):
    often, once = train(tmp_path / "a", num_steps=5, eval_every=1), train(tmp_path / "b", num_steps=5)
    assert often.losses == once.losses


def test_the_seed_decides(tmp_path):
    losses = {seed: train(tmp_path / str(seed), num_steps=2, seed=seed % 10).losses for seed in (0, 1, 10)}
    assert losses[0] == losses[10] != losses[1]


@pytest.mark.parametrize("crash_at", [2, 3, 5, 7])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path, crash_at):
    options = {"num_steps": 8, "save_every": 3, "eval_every": 2, "log_every": 2}
    whole = train(tmp_path / "whole", **options)
    broken = train(tmp_path / "broken", crash_at=crash_at, **options)
    assert broken.losses == whole.losses[:crash_at]
    resumed = train(tmp_path / "broken", resume_from_checkpoint="latest", **options)
    start = crash_at // 3 * 3
    assert resumed.num_starts == (start == 0)
    assert resumed.losses == whole.losses[start:] and resumed.batches == whole.batches[start:]
    assert read_lines(tmp_path / "broken") == read_lines(tmp_path / "whole")
    for got, expected in zip(resumed.exported[0][0].values(), whole.exported[0][0].values(), strict=True):
        assert torch.equal(got, expected)


def test_a_finished_training_is_exported_again(tmp_path):
    options = {"num_steps": 3, "resume_from_checkpoint": "latest"}
    first = train(tmp_path, **options)
    again = train(tmp_path, **options)
    assert first.num_starts == 1 and again.num_starts == 0 and again.losses == []
    assert again.exported[0][1] == first.exported[0][1]
    assert all(torch.equal(t, first.exported[0][0][name]) for name, t in again.exported[0][0].items())


def test_a_named_checkpoint_is_gone_on_from(tmp_path):
    options = {"num_steps": 6, "save_every": 2, "num_checkpoints": 5}
    whole = train(tmp_path, **options)
    named = str(tmp_path / "checkpoints" / "step_00000002")
    assert train(tmp_path, resume_from_checkpoint=named, **options).losses == whole.losses[2:]
    with pytest.raises(ValueError, match="num_steps is 5; expected at least 6"):
        train(tmp_path, resume_from_checkpoint="latest", num_steps=5, accepts_changed_options=True)
    with pytest.raises(ValueError, match="cannot be used: checkpoint.json is missing"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path), num_steps=9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "loop.seed was 0 and is 1"),
        ({"batch_size": 2}, "loop.batch_size was 4 and is 2"),
        ({"num_steps": 9}, "loop.num_steps was 4 and is 9"),
        ({"learning_rate": 0.1, "ema_decay": None}, "learning_rate was 0.05 and is 0.1; loop.ema_decay was 0.999 and"),
    ],
)
def test_other_options_are_refused_unless_they_are_accepted(tmp_path, caplog, changed, message):
    options = {"num_steps": 4, "save_every": 2, "num_checkpoints": 2}
    train(tmp_path, **options)
    files = ["config.yaml", "metrics.jsonl", "run.json"]
    before = [(tmp_path / name).read_bytes() for name in files]
    wanted = {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "step_00000002")}
    with pytest.raises(ValueError, match=f"was written under other options: .*{message}"):
        train(tmp_path, **options | changed | wanted)
    assert [(tmp_path / name).read_bytes() for name in files] == before
    train(tmp_path, accepts_changed_options=True, **options | changed | wanted)
    assert message in caplog.text


def test_an_average_that_the_checkpoint_has_not_is_missed_by_name(tmp_path):
    options = {"num_steps": 4, "save_every": 2, "num_checkpoints": 2}
    train(tmp_path, ema_decay=None, **options)
    wanted = {"resume_from_checkpoint": str(tmp_path / "checkpoints" / "step_00000002")}
    with pytest.raises(ValueError, match="step_00000002 has no average.safetensors: it was saved by a training"):
        train(tmp_path, accepts_changed_options=True, **options | wanted)


def test_options_that_decide_no_weight_may_change(tmp_path):
    train(tmp_path, num_steps=4, save_every=2)
    wanted = str(tmp_path / "checkpoints" / "step_00000002")
    task = train(tmp_path, num_steps=4, save_every=1, log_every=7, eval_every=3, resume_from_checkpoint=wanted)
    assert len(task.losses) == 2
    assert "log_every: 7" in (tmp_path / "config.yaml").read_text()
    saved = tmp_path / "checkpoints" / "step_00000004" / "config.yaml"
    assert saved.read_text() == (tmp_path / "config.yaml").read_text()


def test_a_step_is_saved_before_its_evaluation_which_a_resumed_run_makes_good(tmp_path, monkeypatch):
    def fail(self, model):
        raise CrashError

    options = {"num_steps": 4, "save_every": 2, "eval_every": 2}
    whole = train(tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(ToyTask, "evaluate", fail)
        train(tmp_path / "broken", crash_at=99, **options)
    assert (tmp_path / "broken" / "checkpoints" / "step_00000002").is_dir()
    resumed = train(tmp_path / "broken", resume_from_checkpoint="latest", **options)
    assert len(resumed.evaluated) == 2 and resumed.losses == whole.losses[2:]
    assert read_lines(tmp_path / "broken") == read_lines(tmp_path / "whole")


def test_a_fresh_training_does_not_write_over_an_earlier_one(tmp_path):
    train(tmp_path, num_steps=2)
    before = read_lines(tmp_path)
    with pytest.raises(ValueError, match="resume_from_checkpoint is null, but .*checkpoints holds checkpoints"):
        train(tmp_path, num_steps=4)
    assert read_lines(tmp_path) == before


def test_batches_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 21; expected 1 to 20, the size of the data set"):
        train(tmp_path, batch_size=21)
    with pytest.raises(ValueError, match="batch_size is 6; expected a multiple of 1 processes × 4"):
        train(tmp_path, batch_size=6, gradient_accumulation_steps=4)


def test_half_precision_without_a_gpu_and_lost_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; expected 'bf16' or 'no' on a CPU"):
        build_accelerator(LoopConfig(cpu=True, mixed_precision="fp16"), tmp_path)
    assert PartialState().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but 1 connected"):
        build_accelerator(LoopConfig(cpu=True), tmp_path)


def test_options_outside_their_range_are_refused():
    for field, value in (
        ("num_steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("log_every", 0),
        ("num_checkpoints", 0),
        ("eval_every", 0),
        ("save_every", -1),
        ("num_workers", -1),
        ("ema_decay", 1.0),
        ("ema_decay", 0.0),
    ):
        with pytest.raises(ValueError, match=f"{field} is {value}; expected"):
            LoopConfig(**{field: value})


def test_epochs_are_counted_in_steps_of_whole_batches(tmp_path):
    task = train(tmp_path, num_epochs=3, batch_size=6)
    assert len(task.losses) == 3 * (NUM_SAMPLES // 6)
    # The options as written have both, which agree.
    assert "num_steps: 9" in (tmp_path / "config.yaml").read_text()
    train(tmp_path / "again", num_epochs=3, num_steps=9, batch_size=6)
    with pytest.raises(ValueError, match="num_steps is 5 and num_epochs is 3, which are 9 steps; expected one of them"):
        train(tmp_path / "both", num_epochs=3, num_steps=5, batch_size=6)
    with pytest.raises(ValueError, match="batch_size is 21; expected 1 to 20"):
        train(tmp_path / "large", num_epochs=3, batch_size=21)
    assert LoopConfig().num_steps == 1000
    with pytest.raises(ValueError, match="num_epochs is 0; expected at least 1, or null"):
        LoopConfig(num_epochs=0)


def test_the_best_step_stays_whatever_interrupts(tmp_path):
    options = {"num_steps": 8, "save_every": 3, "eval_every": 1, "num_checkpoints": 1, "learning_rate": 0.5}
    train(tmp_path / "whole", keep_best="bias", **options)
    values = {line["step"]: line["eval/bias"] for line in read_lines(tmp_path / "whole") if "eval/bias" in line}
    best = max(values, key=values.get)
    assert [path.name for path in (tmp_path / "whole" / "best").iterdir()] == [f"step_{best:08d}"]
    average = saved_average(tmp_path / "whole" / "best" / f"step_{best:08d}")
    assert average["2.bias"].item() == values[best]
    train(tmp_path / "broken", keep_best="bias", crash_at=5, **options)
    train(tmp_path / "broken", keep_best="bias", resume_from_checkpoint="latest", **options)
    assert [path.name for path in (tmp_path / "broken" / "best").iterdir()] == [f"step_{best:08d}"]


def test_a_figure_that_no_evaluation_has_rings_an_alarm(tmp_path):
    train(tmp_path, num_steps=1, keep_best="psnr")
    (alarm,) = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert "loop.keep_best is 'psnr', which evaluations do not measure" in alarm and "expected: bias" in alarm
    assert not (tmp_path / "best").exists()
