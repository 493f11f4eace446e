"""The one training loop: `fit` owns when things happen, a task owns what happens.

Cadence, weight average, tracking, pictures, guards, saving, stopping and resuming live here; forward, backward and
optimizer steps in the tasks of the two stages. From top to bottom: what a task is, a run, its steps, what these call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from nextblock.data.workers import batches_of, start_worker
from nextblock.files.atomic import write_text_whole

from .alarms import CodeUsage, UsageAlarm
from .average import AVERAGE_NAME, WeightAverage
from .buckets import settle_gradient_buckets
from .checkpoint import BEST_NAME, MODEL_CONFIG_NAME, RUN_CONFIG_NAME, Record, save_checkpoint, saved_steps
from .guards import StepGuard
from .initial_weights import load_initial_weights
from .loop_config import LoopConfig
from .order import StepSampler
from .recorder import Recorder
from .resume import resume
from .run_config import run_config_text
from .run_record import RunRecord
from .sharding import is_sharded, whole_model
from .stopping import StopRequest

logger = get_logger(__name__)


class RunConfig(Protocol):
    """Options of a run: a dataclass, of which the loop reads its own part."""

    loop: LoopConfig


class Task(Protocol):
    """What a training does; `fit` says when."""

    model: nn.Module
    """The prepared model, which is averaged, evaluated and exported."""
    modules: Sequence[nn.Module]
    """All prepared models, `model` and a discriminator say."""
    optimizers: Sequence[AcceleratedOptimizer]
    """All prepared optimizers."""
    records: Mapping[str, Record]
    """What checkpoints hold besides, by name."""
    code_usage: CodeUsage | None
    """How many codes and tokens an alarm about unused codes has to do with; None where there is nothing to watch."""

    def start(self) -> None:
        """Do what comes before step 0 of a fresh training; a resumed one skips it."""

    def train_step(self, micro_batches: Sequence[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one optimizer step and return this process's metrics, scalars on the device."""

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Return metrics over the held-out data, equal on every process, and pictures by name."""

    def export(self, model: nn.Module, metrics: dict[str, float]) -> Path:
        """Write the trained model where a user can load it, and return the folder; called on the main process."""


def fit(
    accelerator: Accelerator,
    task: Task,
    dataset: Dataset,
    collate: Callable[[list], dict[str, Tensor]],
    run_config: RunConfig,
    output_dir: Path,
) -> bool:
    """Train a task, from the start or from a checkpoint, and export what it learned.

    SIGTERM or SIGINT at any process makes all of them save after the same step and return without an export. Several
    processes are to be watched over by `opened_run` or a `PeerWatch` around the call.

    Args:
        accelerator: from `build_accelerator`; the task's models and optimizers are prepared by it.
        task: what to train.
        dataset: takes (epoch, index) keys.
        collate: makes a batch of samples.
        run_config: the run's options, kept as `config.yaml`; its `loop` says when things happen.
        output_dir: gets `checkpoints/`, `pictures/`, `logs/`, `config.yaml`, `metrics.jsonl` and `run.json`.

    Returns:
        Whether the training reached its last step.

    Raises:
        NonFiniteError: after `loop.max_nonfinite_steps` steps in a row with a non-finite loss or gradient.
        ValueError: if `loop.resume_from_checkpoint` does not fit `output_dir`, or a sharded model has `loop.ema_decay`.
    """
    config = run_config.loop
    config.count_steps(len(dataset))
    options = run_config_text(run_config)
    average = _build_average(accelerator, task.model, config.ema_decay)
    checkpoints = output_dir / "checkpoints"
    with StopRequest(accelerator) as stop:
        records = dict(task.records) | ({} if average is None else {AVERAGE_NAME: average})
        first_step = resume(accelerator, checkpoints, config, options, records)
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_text_whole(output_dir / RUN_CONFIG_NAME, options)
        with RunRecord(accelerator, output_dir, first_step) as record:
            if first_step == 0:
                _start(accelerator, task, config)
            settle_gradient_buckets(task.modules)
            recorder = Recorder(accelerator, output_dir, first_step, asdict(run_config))
            guard = StepGuard(
                accelerator,
                task.modules,
                task.optimizers,
                max_steps=config.max_nonfinite_steps,
                first_step=first_step,
                checkpoints=checkpoints,
            )
            with guard, batches_of(_loader(accelerator, dataset, collate, config, first_step)) as batches:
                training = _Training(accelerator, task, config, options, average, records, recorder, guard, checkpoints)
                training.run(batches, first_step, stop, record)
            if record.last_step == config.num_steps:
                _export(accelerator, task, average, recorder, checkpoints)
            accelerator.end_training()
    return record.last_step == config.num_steps


def _build_average(accelerator: Accelerator, model: nn.Module, decay: float | None) -> WeightAverage | None:
    """Make the weight average; None without a decay."""
    if decay is None:
        return None
    raw_model = accelerator.unwrap_model(model)
    if is_sharded(raw_model):
        raise ValueError(f"ema_decay is {decay}; expected null with a sharded model (FSDP)")
    return WeightAverage(raw_model, decay)


def _start(accelerator: Accelerator, task: Task, config: LoopConfig) -> None:
    """Do what comes before step 0: seed, let the task start, and take over another model's weights if asked to."""
    # Dropout differs between processes; everything that must not is keyed on the sample.
    set_seed(config.seed, device_specific=True)
    task.start()
    if config.init_from is not None:
        new = load_initial_weights(accelerator.unwrap_model(task.model), config.init_from, config.init_except)
        logger.info(f"starting from the weights of {config.init_from}; new: {', '.join(new) or 'none'}")


@dataclass
class _Training:
    """The steps between a start or resume and the end or a stop."""

    accelerator: Accelerator
    task: Task
    config: LoopConfig
    options: str
    average: WeightAverage | None
    records: Mapping[str, Record]
    recorder: Recorder
    guard: StepGuard
    checkpoints: Path

    def __post_init__(self):
        self.raw_model = self.accelerator.unwrap_model(self.task.model)
        self.usage_alarm = UsageAlarm(self.task.code_usage, self.config.usage_alarm, self.config.alarm_cooldown)

    def run(self, batches, first_step: int, stop: StopRequest, record: RunRecord) -> None:
        """Take steps until the last one or an agreed stop, and tell the record how far it came."""
        accelerator, config = self.accelerator, self.config
        if first_step and self.recorder.last_evaluation is None:
            self._evaluate_if_due(first_step)  # What saved this step ended before it could evaluate.
        progress = tqdm(
            range(first_step, config.num_steps),
            initial=first_step,
            total=config.num_steps,
            disable=not accelerator.is_local_main_process,
            mininterval=1.0,
        )
        for step in progress:
            micro_batches = [
                _on_device(next(batches), accelerator.device) for _ in range(config.gradient_accumulation_steps)
            ]
            self._step(micro_batches, step)
            record.last_step = num_done = step + 1
            is_last = num_done == config.num_steps
            signal = stop.agreed()
            is_stopped = signal is not None and not is_last
            is_saved = is_last or is_stopped or _is_due(num_done, config.save_every)
            # A line at every checkpoint: a resumed run then averages over the same steps as an uninterrupted one.
            if is_saved or num_done % config.log_every == 0:
                progress.set_postfix(loss=self._log(num_done))
            if is_saved:
                self._save(self.checkpoints, num_done, config.num_checkpoints)
            if is_stopped:
                progress.close()
                record.outcome = f"stopped by {signal.name}"
                logger.warning(
                    f"stopped by {signal.name} after step {num_done} of {config.num_steps}, which is saved; the same "
                    "command with --loop.resume_from_checkpoint latest goes on"
                )
                return
            self._evaluate_if_due(num_done)

    def _step(self, micro_batches: list[dict[str, Tensor]], step: int) -> None:
        """Take one step, which leaves no trace if its loss or gradient is not finite."""
        self.guard.before_step()
        metrics = self.task.train_step(micro_batches, step)
        is_good = self.guard.after_step(metrics)
        self.recorder.add(metrics)
        if self.average is not None:
            self.average.update(self.raw_model, is_good)

    def _save(self, folder: Path, num_done: int, num_kept: int) -> None:
        """Save the training, and what the model is beside it, from which it can be built again."""
        files = {RUN_CONFIG_NAME: self.options}
        if isinstance(self.raw_model, PreTrainedModel):
            files[MODEL_CONFIG_NAME] = self.raw_model.config.to_json_string()
        save_checkpoint(self.accelerator, folder, num_done, num_kept, files, self.records)

    def _evaluate_if_due(self, num_done: int) -> None:
        """Evaluate where the cadence says so, which an interrupted run makes good when it goes on."""
        if num_done == self.config.num_steps or _is_due(num_done, self.config.eval_every):
            metrics, pictures = _evaluate(self.accelerator, self.task, self.average)
            # Saved before it is logged: what ends in between is made good, as the evaluation is.
            self._keep_if_best(num_done, metrics)
            self.recorder.log_evaluation(num_done, metrics, pictures)

    def _keep_if_best(self, num_done: int, metrics: dict[str, float]) -> None:
        """Keep the training as it is now, where the run asks for the best and no evaluation was as good."""
        name = self.config.keep_best
        if name is None:
            return
        if name not in metrics:
            known = ", ".join(metrics) or "none: is there held-out data?"
            message = f"step {num_done}: loop.keep_best is {name!r}, which evaluations do not measure"
            self.recorder.log_alarm(num_done, f"{message}; nothing is kept; expected: {known}")
        elif self.recorder.is_best(name, metrics[name]):
            self._save(self.checkpoints.with_name(BEST_NAME), num_done, 1)

    def _log(self, num_done: int) -> float:
        """Write a log line with its alarms, and return the loss."""
        values = self.recorder.log_training(num_done)
        warning = self.guard.check()
        for message in [warning] * (warning is not None) + self.usage_alarm.messages(num_done, values):
            self.recorder.log_alarm(num_done, message)
        return values.get("train/loss", float("nan"))


def _is_due(num_done: int, every: int | None) -> bool:
    """Tell whether something with a cadence happens after this many steps."""
    return every is not None and num_done % every == 0


def _loader(
    accelerator: Accelerator, dataset: Dataset, collate: Callable, config: LoopConfig, first_step: int
) -> DataLoader:
    """Return this process's micro-batches from the first step on."""
    sampler = StepSampler(
        len(dataset),
        config.batch_size,
        num_micro_batches=config.gradient_accumulation_steps,
        seed=config.seed,
        steps=range(first_step, config.num_steps),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=start_worker,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own the loader draws from the global one, which a resume must find untouched.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _learned_model(accelerator: Accelerator, task: Task, average: WeightAverage | None) -> nn.Module:
    """Return what is evaluated and exported, whole on every process: the weight average, or the raw weights."""
    if average is not None:
        return average.module
    model = accelerator.unwrap_model(task.model)
    return whole_model(model) if is_sharded(model) else model


def _evaluate(accelerator: Accelerator, task: Task, average: WeightAverage | None) -> tuple[dict, dict]:
    """Evaluate the weight average, or the raw weights where there is none."""
    model = _learned_model(accelerator, task, average)
    was_training = model.training
    model.eval()
    # Loaders draw from the global generator: an evaluation must not change the dropout of the steps after it.
    with torch.random.fork_rng(devices=()), torch.no_grad(), accelerator.autocast():
        metrics, pictures = task.evaluate(model)
    model.train(was_training)
    return metrics, pictures


def _export(
    accelerator: Accelerator, task: Task, average: WeightAverage | None, recorder: Recorder, checkpoints: Path
) -> None:
    """Let the task write the trained model, and say in one line what was reached and where everything is."""
    model = _learned_model(accelerator, task, average)
    if accelerator.is_main_process:
        folder = task.export(model.eval(), recorder.last_evaluation)
        best = max(saved_steps(checkpoints.with_name(BEST_NAME)), default=None)
        last = max(saved_steps(checkpoints))
        print(recorder.closing_line(model=folder, checkpoint=last, best=best), flush=True)
    accelerator.wait_for_everyone()
