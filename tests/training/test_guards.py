"""Non-finite steps leave no trace and end a training when there are many."""

import json
import math
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from nextblock.training.accelerator import build_accelerator
from nextblock.training.alarms import CodeUsage
from nextblock.training.guards import NonFiniteError, StepGuard
from nextblock.training.loop import fit
from nextblock.training.loop_config import LoopConfig


class Codes(nn.Module):
    """A parameter beside a buffer, as a revived codebook is, and code that moves both by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("counts", torch.ones(3))

    def follow(self, value: float) -> None:
        with torch.no_grad():
            self.weight.add_(value)
            self.counts.add_(value)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def collate(numbers: list) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(numbers).float()}


class PoisonedTask:
    """A linear layer and codes whose loss or gradient is spoilt at some steps."""

    def __init__(self, accelerator, poison: dict[int, str], is_fused: bool = True):
        self.poison = poison
        model = nn.ModuleDict({"linear": nn.Linear(1, 3), "codes": Codes()})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=is_fused)
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.modules, self.optimizers, self.records = [self.model], [self.optimizer], {}
        self.code_usage = CodeUsage(num_codes=1, num_tokens=[4])
        self.states, self.losses, self.exported = [], [], None

    def start(self) -> None:
        pass

    def train_step(self, micro_batches, step: int) -> dict:
        kind = self.poison.get(step)
        output = self.model["linear"](micro_batches[0]["x"][:, None]) * self.model["codes"].weight
        loss = output.square().mean() * (math.nan if kind == "loss" else 1.0)
        self.accelerator.backward(loss)
        if kind == "gradient":
            self.model["linear"].bias.grad[1] = math.inf
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model["codes"].follow(math.nan if kind in ("loss", "gradient") else 0.01)
        self.states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.losses.append(loss.item())
        return {"loss": loss.detach()}

    def evaluate(self, model):
        return {}, {}

    def export(self, model, metrics) -> None:
        self.exported = {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass(kw_only=True)
class ToyRun:
    """Options of a toy's run."""

    loop: LoopConfig


def train(folder, poison: dict[int, str] | None = None, is_fused: bool = True, **options):
    """Return the task and whether it reached its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    fixed = {"batch_size": 4, "cpu": True, "mixed_precision": "no", "tracker": None, "log_every": 2}
    config = LoopConfig(**fixed | options)
    accelerator = build_accelerator(config, folder)
    task = PoisonedTask(accelerator, poison or {}, is_fused)
    return task, fit(accelerator, task, Numbers(), collate, ToyRun(loop=config), folder)


def guard_of(task: PoisonedTask, folder, max_steps: int) -> StepGuard:
    """Guard a task's steps from the first one on."""
    where = {"max_steps": max_steps, "first_step": 0, "checkpoints": folder}
    return StepGuard(task.accelerator, task.modules, task.optimizers, **where)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate):
    """Every training chooses its precision anew."""


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_leaves_no_trace(tmp_path, kind, is_fused):
    task, is_done = train(tmp_path, {2: kind}, is_fused, num_steps=6, save_every=2)
    assert is_done
    clean, _ = train(tmp_path / "clean", {}, is_fused, num_steps=6, save_every=2)
    saved = tmp_path / "checkpoints"
    assert [path.name for path in sorted(saved.iterdir())] == ["step_00000004", "step_00000006"]
    # Steps 0, 1 are as in an undisturbed run; step 2 changed nothing, so step 3 started from where step 1 had ended.
    assert task.losses[:2] == clean.losses[:2]
    state = torch.load(saved / "step_00000006" / "optimizer.bin")["state"]
    assert {int(entry["step"]) for entry in state.values()} == {5}
    assert all(tensor.isfinite().all() for tensor in task.exported.values())
    assert all(tensor.isfinite().all() for tensor in task.states[3].values())
    torch.testing.assert_close(task.model["codes"].counts.detach(), torch.full((3,), 1.05))
    (alarm,) = lines(tmp_path / "alarms.jsonl")
    assert alarm["step"] == 4 and alarm["alarm"].startswith("1 step(s) up to step 4 had a loss or gradient")
    logged = [line for line in lines(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert logged[1]["train/loss"] == pytest.approx(
        task.losses[3] if kind == "loss" else (task.losses[2] + task.losses[3]) / 2
    )
    average = load_file(saved / "step_00000006" / "average.safetensors")
    assert average["num_updates"] == 5


def test_bad_steps_in_a_row_end_the_training_and_name_the_last_checkpoint(tmp_path):
    poison = {3: "loss", 4: "gradient", 6: "loss", 7: "gradient", 8: "loss"}
    match = r"step 9: loss or gradient was not finite in 3 steps in a row.*last good checkpoint: .*step_00000005\."
    with pytest.raises(NonFiniteError, match=match):
        train(tmp_path, poison, num_steps=20, save_every=5, max_nonfinite_steps=3)
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["outcome"].startswith("NonFiniteError: step 9") and start["last_step"] == 8
    with pytest.raises(NonFiniteError, match="last good checkpoint: none yet"):
        train(tmp_path / "other", {0: "loss"}, num_steps=2, max_nonfinite_steps=1)


def test_guarding_changes_no_bit_of_a_healthy_training(tmp_path, monkeypatch):
    guarded, _ = train(tmp_path / "a", num_steps=5)
    monkeypatch.setattr(StepGuard, "_look_at_gradients", lambda *args: None)
    free, _ = train(tmp_path / "b", num_steps=5)
    assert guarded.losses == free.losses
    assert all(torch.equal(tensor, free.exported[name]) for name, tensor in guarded.exported.items())


def test_without_looking_every_step_the_same_steps_are_undone(tmp_path):
    """The way of a GPU, on the CPU: `check` alone looks."""
    accelerator = Accelerator(cpu=True)
    task = PoisonedTask(accelerator, {1: "loss", 2: "gradient", 4: "gradient"})
    with guard_of(task, tmp_path, max_steps=3) as guard:
        guard._looks_every_step = False
        states = []
        for step in range(5):
            guard.before_step()
            is_good = guard.after_step(task.train_step([{"x": torch.ones(2)}], step))
            assert is_good == (step in (0, 3))
            states.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
        assert guard.check().startswith("3 step(s) up to step 5 had")
        assert guard.check() is None
        for step in (1, 2, 4):
            assert all(torch.equal(tensor, states[step - 1][name]) for name, tensor in states[step].items())
        assert not torch.equal(states[3]["linear.weight"], states[2]["linear.weight"])
        task.poison = {5: "loss", 6: "loss", 7: "loss"}
        for step in (5, 6, 7, 8):
            guard.before_step()
            guard.after_step(task.train_step([{"x": torch.ones(2)}], step))
        # Step 4 belongs to the row that ends with step 7.
        with pytest.raises(NonFiniteError, match="not finite in 4 steps in a row"):
            guard.check()
    assert not task.optimizer.optimizer._optimizer_step_pre_hooks


def test_under_a_gradient_scaler_gradients_are_left_to_it(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    task = PoisonedTask(accelerator, {})
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    with guard_of(task, tmp_path, max_steps=2) as guard:
        assert not task.optimizer.optimizer._optimizer_step_pre_hooks
        guard.before_step()
        assert guard.after_step({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(math.inf)})
        assert not guard.after_step({"loss": torch.tensor(math.nan)})


def test_a_signal_saves_the_step_at_hand_and_exports_nothing(tmp_path, caplog):
    whole, _ = train(tmp_path / "whole", num_steps=9, save_every=4)
    handler = signal.getsignal(signal.SIGTERM)
    task, is_done = train(tmp_path / "run", {4: "signal"}, num_steps=9, save_every=4, eval_every=5)
    assert not is_done and task.exported is None and len(task.losses) == 5
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped by SIGTERM after step 5 of 9, which is saved" in caplog.text
    assert "--loop.resume_from_checkpoint latest goes on" in caplog.text
    assert all("train/loss" in line for line in lines(tmp_path / "run" / "metrics.jsonl")), "no evaluation"
    again, is_done = train(tmp_path / "run", num_steps=9, save_every=4, resume_from_checkpoint="latest")
    assert is_done and again.losses == whole.losses[5:]
    assert all(torch.equal(tensor, whole.exported[name]) for name, tensor in again.exported.items())
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert (first["first_step"], first["last_step"], first["outcome"]) == (0, 5, "stopped by SIGTERM")
    assert (second["first_step"], second["last_step"], second["outcome"]) == (5, 9, "finished")


def test_a_signal_in_the_last_step_lets_the_training_finish(tmp_path):
    task, is_done = train(tmp_path, {3: "signal"}, num_steps=4)
    assert is_done and task.exported is not None


def test_an_alarm_of_a_training_reaches_its_file_once_a_cooldown(tmp_path, monkeypatch):
    train_step = PoisonedTask.train_step
    monkeypatch.setattr(
        PoisonedTask, "train_step", lambda self, *args: train_step(self, *args) | {"codebook/usage": 0.1}
    )
    train(tmp_path / "a", num_steps=8, alarm_cooldown=4)
    assert [line["step"] for line in lines(tmp_path / "a" / "alarms.jsonl")] == [2, 6]
    train(tmp_path / "b", num_steps=4, usage_alarm=0.05)
    assert not (tmp_path / "b" / "alarms.jsonl").exists()


def test_options_outside_their_range_are_refused():
    for field, value in (("max_nonfinite_steps", 0), ("alarm_cooldown", 0), ("usage_alarm", 0.0), ("usage_alarm", 1.1)):
        with pytest.raises(ValueError, match=f"{field} is {value}; expected"):
            LoopConfig(**{field: value})
