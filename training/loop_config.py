"""Options of the training loop."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from nextblock.data.workers import MAX_WORKERS


@dataclass(kw_only=True)
class LoopConfig:
    """How long a training runs, on what, and what it leaves on the way."""

    num_steps: int | None = None
    """Optimizer steps; with null those of num_epochs, or 1000."""
    num_epochs: int | None = None
    """Times that the training goes through its data; instead of num_steps."""
    batch_size: int = 64
    """Samples a step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that each process cuts its share of a step into."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast type; "auto" is bf16 where the hardware has it, float32 elsewhere. fp16 needs a GPU."""
    allows_tf32: bool = False
    """Let a GPU compute products and convolutions of float32 in TF32, ten bits of mantissa; those that choose codes are
    never. False computes what is float32 in float32."""
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
    keep_best: str | None = None
    """Figure of the evaluations, "psnr" or "loss" say, whose best step stays in best/ as a checkpoint: the lowest where
    its name ends in "loss", else the highest; null keeps none."""
    save_every: int | None = None
    """Steps between checkpoints; null saves at the end alone."""
    num_checkpoints: int = 2
    """Newest checkpoints that stay."""
    resume_from_checkpoint: str | None = None
    """"latest", or the path of a checkpoint."""
    accepts_changed_options: bool = False
    """Go on from a checkpoint that was written under other options: another seed, batch size, schedule or model."""
    init_from: str | None = None
    """Folder of a saved model, or of a pipeline that has one, whose architecture is taken and whose weights step 0
    starts from; null starts from random ones."""
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
        if self.num_steps is None and self.num_epochs is None:
            self.num_steps = 1000
        counts = ("batch_size", "gradient_accumulation_steps", "log_every", "num_checkpoints")
        for field in (*counts, "max_nonfinite_steps", "alarm_cooldown"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        for field in ("num_steps", "num_epochs", "eval_every", "save_every"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1, or null")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected a number in (0, 1), or null")
        self.init_except = list(self.init_except or [])
        if self.init_except and self.init_from is None:
            raise ValueError(f"init_except is {self.init_except}; expected none of them without init_from")
        if self.usage_alarm is not None and not 0 < self.usage_alarm <= 1:
            raise ValueError(f"usage_alarm is {self.usage_alarm}; expected a number in (0, 1], or null")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ValueError(f"num_workers is {self.num_workers}; expected 0 to {MAX_WORKERS}")
        # What the generators of torch, numpy and python all take, each process's own number added.
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed is {self.seed}; expected 0 to {(1 << 31) - 1}")

    def check_keep_best(self, measured: Collection[str]) -> None:
        """Refuse to keep the best step by a figure that evaluations will not have.

        Args:
            measured: names of the figures that they will have; none without held-out data.

        Raises:
            ValueError: naming the figure and those there are.
        """
        if self.keep_best is not None and self.keep_best not in measured:
            known = ", ".join(measured) or "null: there is no held-out data"
            raise ValueError(
                f"loop.keep_best is {self.keep_best!r}, which evaluations do not measure; expected {known}"
            )

    def count_steps(self, num_samples: int) -> None:
        """Turn epochs into steps, once the size of the data set is known.

        Args:
            num_samples: of the data set; an epoch's remainder smaller than a batch is left out.

        Raises:
            ValueError: if a batch exceeds the data set, or another number of steps is given too.
        """
        if self.num_epochs is None:
            return
        if self.batch_size > num_samples:
            raise ValueError(f"batch_size is {self.batch_size}; expected 1 to {num_samples}, the size of the data set")
        num_steps = self.num_epochs * (num_samples // self.batch_size)
        if self.num_steps not in (None, num_steps):
            raise ValueError(
                f"num_steps is {self.num_steps} and num_epochs is {self.num_epochs}, which are {num_steps} steps; "
                "expected one of them, the other null"
            )
        self.num_steps = num_steps
