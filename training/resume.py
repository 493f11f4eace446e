"""Going on from a checkpoint: which one, and whether the run still is the one that wrote it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger

from .checkpoint import RUN_CONFIG_NAME, Record, check_folders, find_checkpoint, load_checkpoint, saved_steps
from .loop_config import LoopConfig

logger = get_logger(__name__)

# Options that decide where a run writes, how often and what people see, but no weight.
BOOKKEEPING = {
    "output_dir",
    "pipeline_dir",
    "license",
    "eval_batch_size",
    "gradient_checkpointing",
    "num_pictures",
    "num_pictures_per_class",
    "data.eval_split",
    *(
        f"sampling.{name}"
        for name in (
            "guidance_scale",
            "guidance_schedule",
            "guidance_power",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "is_smooth",
            "order",
        )
    ),
    *(
        f"loop.{name}"
        for name in (
            "num_epochs",  # It decides num_steps.
            "num_workers",
            "keep_best",
            "log_every",
            "eval_every",
            "save_every",
            "num_checkpoints",
            "resume_from_checkpoint",
            "accepts_changed_options",
            "tracker",
            "max_nonfinite_steps",
            "usage_alarm",
            "alarm_cooldown",
        )
    ),
}


def resume(
    accelerator: Accelerator, checkpoints: Path, config: LoopConfig, run_config: str, records: Mapping[str, Record]
) -> int:
    """Load the wanted checkpoint.

    Args:
        accelerator: holds the prepared objects.
        checkpoints: the run's folder of checkpoints.
        config: says which checkpoint, and whether other options than it was written with are accepted.
        run_config: the run's options as YAML.
        records: what else the checkpoint holds, by name.

    Returns:
        The number of steps taken, 0 without a checkpoint.

    Raises:
        ValueError: if there is no folder where checkpoints belong; if there are checkpoints that the run does not go
            on from; if the wanted one is damaged, has taken more steps than the run has, or was written under options
            that lead to other weights.
    """
    check_folders(checkpoints)
    if config.resume_from_checkpoint is None:
        if saved_steps(checkpoints):
            raise ValueError(
                f"resume_from_checkpoint is null, but {checkpoints} holds checkpoints of an earlier run; expected "
                "'latest' to go on with it, or another output_dir"
            )
        return 0
    checkpoint = find_checkpoint(checkpoints, config.resume_from_checkpoint)
    if checkpoint is None:
        logger.info(f"no checkpoint in {checkpoints} yet: starting at step 0")
        return 0
    _check_options(checkpoint, config, run_config)
    step = load_checkpoint(accelerator, checkpoint, records)
    if step > config.num_steps:
        raise ValueError(f"num_steps is {config.num_steps}; expected at least {step}, which {checkpoint} has taken")
    logger.info(f"resuming from {checkpoint} at step {step}")
    return step


def _check_options(checkpoint: Path, config: LoopConfig, run_config: str) -> None:
    """Refuse options under which the run would not become what it was started as, or warn of them."""
    saved = yaml.safe_load((checkpoint / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
    if not isinstance(saved, dict):
        raise ValueError(f"{checkpoint / RUN_CONFIG_NAME} holds a {type(saved).__name__}; expected a run's options")
    changes = changed_options(saved, yaml.safe_load(run_config))
    if not changes:
        return
    listed = "; ".join(changes)
    if not config.accepts_changed_options:
        raise ValueError(
            f"{checkpoint} was written under other options: {listed}. Expected the same ones, or "
            "loop.accepts_changed_options true to go on with the new ones"
        )
    logger.warning(f"going on from {checkpoint} under other options than it was written with: {listed}")


def changed_options(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List the options that differ and decide weights.

    Args:
        before: options by name, nested.
        after: the same of the other run.

    Returns:
        "loop.seed was 0 and is 1" and the like, in order of name.
    """
    old, new = dict(_flatten(before)), dict(_flatten(after))
    names = sorted((old.keys() | new.keys()) - BOOKKEEPING)
    absent = "absent"
    return [
        f"{name} was {old.get(name, absent)!r} and is {new.get(name, absent)!r}"
        for name in names
        if old.get(name, absent) != new.get(name, absent)
    ]


def _flatten(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted name."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
