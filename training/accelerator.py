"""The accelerator of a training: processes, device, precision, trackers, and the seed of the initial weights."""

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    is_tensorboard_available,
    is_wandb_available,
    parse_flag_from_env,
    set_seed,
)

from .launch_environment import check_training_variables
from .loop_config import LoopConfig
from .precision import set_tf32
from .processes import connect_processes
from .sharding import sharded_precision

logger = get_logger(__name__)

_TRACKER_PACKAGES = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 matrix products are faster than float32 ones on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    return False


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not there, without which accelerate would train and say nothing.

    Args:
        name: of the tracker; None for none.

    Raises:
        ValueError: naming the package and how to install it.
    """
    if name is not None and not _TRACKER_PACKAGES[name]():
        raise ValueError(
            f"tracker is {name!r}, and the package {name} is not installed; expected null, or the package: "
            f"pip install {name}"
        )


def build_accelerator(config: LoopConfig, output_dir: Path) -> Accelerator:
    """Connect the processes, choose device and precision, and seed the initial weights.

    Args:
        config: the loop's settings.
        output_dir: where trackers write.

    Returns:
        The accelerator.

    Raises:
        ValueError: if several processes were launched but do not see each other, fp16 or TF32 has no GPU, the tracker's
            package is missing, or the environment asks for something else than the options do.
    """
    check_tracker(config.tracker)
    device = connect_processes(config.cpu).device
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "no"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16'; expected 'bf16' or 'no' on a CPU")
    if config.allows_tf32 and device.type != "cuda":
        raise ValueError(f"allows_tf32 is True; expected false on a {device.type.upper()}, which has no TF32")
    check_training_variables(
        num_micro_batches=config.gradient_accumulation_steps,
        precision=precision,
        asked_precision=config.mixed_precision,
    )
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        # The tasks divide by the number of micro-batches; without a plugin of one, a variable could do so again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if accelerator.is_fsdp2:
        # accelerate's own policy gives loss and logits in the half type, and sums gradients in it.
        accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_precision(precision)
    if device.type == "cuda":
        set_tf32(config.allows_tf32)
        # Shapes are the same at every step, so the fastest convolution is worth a search.
        torch.backends.cudnn.benchmark = True
    set_seed(config.seed)
    _show_log()
    if parse_flag_from_env("ACCELERATE_USE_CPU") and not config.cpu:
        logger.info("ACCELERATE_USE_CPU is set: training on the CPU, as with loop.cpu true")
    return accelerator


def _show_log() -> None:
    """Let this package's messages be seen where the program has set up no logging of its own."""
    logging.getLogger("nextblock").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
