"""The one training loop: `fit` owns when things happen, a task owns what happens.

Cadence, weight average, tracking, pictures, guards, saving, stopping and resuming live here; forward, backward and
optimizer steps in the tasks of `tokenizer/train.py` and `prior/train.py`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .alarms import UsageAlarm
from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from .ema import build_weight_average, update_weight_average
from .guards import StepGuard
from .initial_weights import load_initial_weights
from .order import StepSampler
from .processes import connect_processes
from .recorder import Recorder
from .run_record import RunRecord
from .sharding import is_sharded, whole_model
from .stopping import StopRequest, ignore_stop_signals

logger = get_logger(__name__)


@dataclass(kw_only=True)
class LoopConfig:
    """How long a training runs, on what, and what it leaves on the way."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Samples a step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that each process cuts its share of a step into."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast type; "auto" is bf16 where the hardware has it, float32 elsewhere. fp16 needs a GPU."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""
    seed: int = 0
    """Key of initial weights, sample order, augmentation and dropout."""
    num_workers: int = 0
    """Processes that load samples; 0 loads in the training process."""
    ema_decay: float | None = 0.999
    """Decay of the weight average that is evaluated and exported; null exports the raw weights."""
    log_every: int = 50
    """Steps between log lines; every checkpoint has one too."""
    eval_every: int | None = None
    """Steps between evaluations with pictures; null evaluates at the end alone."""
    save_every: int | None = None
    """Steps between checkpoints; null saves at the end alone."""
    num_checkpoints: int = 2
    """Newest checkpoints that stay."""
    resume_from_checkpoint: str | None = None
    """"latest", or the path of a checkpoint."""
    init_from: str | None = None
    """Folder of a saved model whose weights step 0 starts from; null starts from random ones."""
    init_except: list[str] = None
    """Tensors or modules that start random in spite of `init_from`; null means none."""
    tracker: Literal["tensorboard", "wandb"] | None = "tensorboard"
    """Where metrics and pictures go besides metrics.jsonl and pictures/; null for nowhere else."""
    max_nonfinite_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, each of them skipped, that end the training."""
    usage_alarm: float | None = 0.2
    """Codebook use, over that of evenly used codes, under which the log warns; null never."""
    alarm_cooldown: int = 1000
    """Steps between two warnings about the same figure."""

    def __post_init__(self):
        counts = ("num_steps", "batch_size", "gradient_accumulation_steps", "log_every", "num_checkpoints")
        for field in (*counts, "max_nonfinite_steps", "alarm_cooldown"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        for field in ("eval_every", "save_every"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1, or null")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected a number in (0, 1), or null")
        self.init_except = list(self.init_except or [])
        if self.init_except and self.init_from is None:
            raise ValueError(f"init_except is {self.init_except}; expected none of them without init_from")
        if self.usage_alarm is not None and not 0 < self.usage_alarm <= 1:
            raise ValueError(f"usage_alarm is {self.usage_alarm}; expected a number in (0, 1], or null")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; expected at least 0")


class Task(Protocol):
    """What a training does; `fit` says when."""

    model: nn.Module
    """The prepared model."""

    def start(self) -> None:
        """Do what comes before step 0 of a fresh training; a resumed one skips it."""

    def train_step(self, micro_batches: Sequence[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        """Take one optimizer step and return this process's metrics, scalars on the device."""

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Return metrics over the held-out data, equal on every process, and pictures by name."""

    def export(self, model: nn.Module, metrics: dict[str, float]) -> None:
        """Write the trained model where a user can load it; called on the main process."""


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 matrix products are faster than float32 ones on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def build_accelerator(config: LoopConfig, output_dir: Path) -> Accelerator:
    """Connect the processes, choose device and precision, and seed the initial weights.

    Args:
        config: the loop's settings.
        output_dir: where trackers write.

    Returns:
        The accelerator.

    Raises:
        ValueError: if several processes were launched but do not see each other, or fp16 has no GPU.
    """
    device = connect_processes(config.cpu).device
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "no"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16'; expected 'bf16' or 'no' on a CPU")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    set_seed(config.seed)
    _show_log()
    return accelerator


def _show_log() -> None:
    """Let this package's messages be seen where the program has set up no logging of its own."""
    logging.getLogger("nextblock").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def fit(
    accelerator: Accelerator,
    task: Task,
    dataset: Dataset,
    collate: Callable[[list], dict[str, Tensor]],
    config: LoopConfig,
    output_dir: Path,
) -> bool:
    """Train a task, from the start or from a checkpoint, and export what it learned.

    SIGTERM or SIGINT at any process makes all of them save after the same step and return without an export.

    Args:
        accelerator: from `build_accelerator`; the task's models and optimizers are prepared by it.
        task: what to train.
        dataset: takes (epoch, index) keys.
        collate: makes a batch of samples.
        config: the loop's settings.
        output_dir: gets `checkpoints/`, `pictures/`, `logs/`, `metrics.jsonl` and `run.json`.

    Returns:
        Whether the training reached its last step.

    Raises:
        NonFiniteError: after `config.max_nonfinite_steps` steps in a row with a non-finite loss or gradient.
    """
    raw_model = accelerator.unwrap_model(task.model)
    average = None
    if config.ema_decay is not None:
        if is_sharded(raw_model):
            raise ValueError(f"ema_decay is {config.ema_decay}; expected null with a sharded model (FSDP)")
        average = build_weight_average(raw_model, config.ema_decay)
        accelerator.register_for_checkpointing(average)
    checkpoints = output_dir / "checkpoints"
    with StopRequest(accelerator) as stop:
        first_step = _resume(accelerator, checkpoints, config)
        with RunRecord(accelerator, output_dir, first_step) as record:
            if first_step == 0:
                # Dropout differs between processes; everything that must not is keyed on the sample.
                set_seed(config.seed, device_specific=True)
                task.start()
                if config.init_from is not None:
                    load_initial_weights(raw_model, config.init_from, config.init_except)
            recorder = Recorder(accelerator, output_dir, first_step)
            batches = iter(_loader(accelerator, dataset, collate, config, first_step))
            with StepGuard(accelerator, config.max_nonfinite_steps, first_step, checkpoints) as guard:
                training = _Training(accelerator, task, config, average, recorder, guard, checkpoints)
                training.run(batches, first_step, stop, record)
            if record.last_step == config.num_steps:
                _finish(accelerator, task, average, recorder, first_step == config.num_steps)
            else:
                accelerator.end_training()
    return record.last_step == config.num_steps


@dataclass
class _Training:
    """The steps between a start or resume and the end or a stop."""

    accelerator: Accelerator
    task: Task
    config: LoopConfig
    average: nn.Module | None
    recorder: Recorder
    guard: StepGuard
    checkpoints: Path

    def __post_init__(self):
        self.raw_model = self.accelerator.unwrap_model(self.task.model)
        config = self.config
        # Code use is measured on one micro-batch of all processes.
        num_samples = config.batch_size // config.gradient_accumulation_steps
        self.usage_alarm = UsageAlarm(self.raw_model, num_samples, config.usage_alarm, config.alarm_cooldown)

    def run(self, batches, first_step: int, stop: StopRequest, record: RunRecord) -> None:
        """Take steps until the last one or an agreed stop, and tell the record how far it came."""
        accelerator, config = self.accelerator, self.config
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
            if is_last or (_is_due(num_done, config.eval_every) and not is_stopped):
                self.recorder.log_evaluation(num_done, *_evaluate(accelerator, self.task, self.average))
            if is_saved:
                save_checkpoint(accelerator, self.checkpoints, num_done, config.num_checkpoints)
            if is_stopped:
                progress.close()
                record.outcome = f"stopped by {signal.name}"
                logger.warning(
                    f"stopped by {signal.name} after step {num_done} of {config.num_steps}, which is saved; the same "
                    "command with --loop.resume_from_checkpoint latest goes on"
                )
                return

    def _step(self, micro_batches: list[dict[str, Tensor]], step: int) -> None:
        """Take one step, which leaves no trace if its loss or gradient is not finite."""
        self.guard.before_step()
        metrics = self.task.train_step(micro_batches, step)
        is_good = self.guard.after_step(metrics)
        self.recorder.add(metrics)
        if self.average is not None:
            update_weight_average(self.average, self.raw_model, is_good)

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


def _resume(accelerator: Accelerator, checkpoints: Path, config: LoopConfig) -> int:
    """Load the wanted checkpoint and return the number of steps it has taken, 0 without one."""
    if config.resume_from_checkpoint is None:
        if any(checkpoints.glob("step_*")):
            raise ValueError(
                f"resume_from_checkpoint is null, but {checkpoints} holds checkpoints of an earlier run; expected "
                "'latest' to go on with it, or another output_dir"
            )
        return 0
    checkpoint = find_checkpoint(checkpoints, config.resume_from_checkpoint)
    if checkpoint is None:
        logger.info(f"no checkpoint in {checkpoints} yet: starting at step 0")
        return 0
    step = load_checkpoint(accelerator, checkpoint)
    if step > config.num_steps:
        raise ValueError(f"num_steps is {config.num_steps}; expected at least {step}, which {checkpoint} has taken")
    logger.info(f"resuming from {checkpoint} at step {step}")
    return step


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
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own the loader draws from the global one, which a resume must find untouched.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _learned_model(accelerator: Accelerator, task: Task, average: nn.Module | None) -> nn.Module:
    """Return what is evaluated and exported, whole on every process: the weight average, or the raw weights."""
    if average is not None:
        return average.module
    model = accelerator.unwrap_model(task.model)
    return whole_model(model) if is_sharded(model) else model


def _evaluate(accelerator: Accelerator, task: Task, average: nn.Module | None) -> tuple[dict, dict]:
    """Evaluate the weight average, or the raw weights where there is none."""
    model = _learned_model(accelerator, task, average)
    was_training = model.training
    model.eval()
    # Loaders draw from the global generator: an evaluation must not change the dropout of the steps after it.
    with torch.random.fork_rng(devices=()), torch.no_grad(), accelerator.autocast():
        metrics, pictures = task.evaluate(model)
    model.train(was_training)
    return metrics, pictures


def _finish(
    accelerator: Accelerator, task: Task, average: nn.Module | None, recorder: Recorder, is_rerun: bool
) -> None:
    """Export the trained model and close the trackers."""
    if is_rerun:
        metrics, pictures = _evaluate(accelerator, task, average)
        recorder.log_evaluation(recorder.first_step, metrics, pictures)
    model = _learned_model(accelerator, task, average)
    if accelerator.is_main_process:
        task.export(model.eval(), recorder.last_evaluation)
    accelerator.wait_for_everyone()
    accelerator.end_training()
