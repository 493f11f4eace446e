"""Variables by which accelerate and its launcher would change what an option says: every setting has one owner."""

import os

from accelerate.utils import parse_flag_from_env

# What stands in a variable that asks for nothing; the launcher writes some of these at every launch.
NOTHING = ("", "no", "none", "false", "0")
# Ways of training that this library does not have, and what accelerate would take from their own settings.
OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_device_variable(cpu: bool) -> None:
    """Refuse a device in the environment against the option `cpu`.

    Args:
        cpu: whether the CPU is asked for.

    Raises:
        ValueError: naming the variable, its value and the option.
    """
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if cpu and device and device.split(":")[0] != "cpu":
        raise ValueError(
            f"ACCELERATE_TORCH_DEVICE is {device!r}, but the option cpu is true; expected the variable unset"
        )


def check_training_variables(*, num_micro_batches: int, precision: str, asked_precision: str) -> None:
    """Refuse variables that ask for something else than a training's options, before anything is computed.

    Args:
        num_micro_batches: `loop.gradient_accumulation_steps`.
        precision: in which the run computes, "no", "bf16" or "fp16".
        asked_precision: `loop.mixed_precision`, from which that follows.

    Raises:
        ValueError: naming the variable, its value and the option that says the same.
    """
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    value = _value(name)
    # 1 is what accelerate does without the variable.
    if value not in ("1", str(num_micro_batches), *NOTHING):
        _refuse(name, value, "loop.gradient_accumulation_steps", num_micro_batches)
    name = "ACCELERATE_MIXED_PRECISION"
    value = _value(name)
    if value not in (precision, *NOTHING):
        here = f"{asked_precision} ({precision} here)" if asked_precision != precision else precision
        _refuse(name, value, "loop.mixed_precision", here)
    for name, option in {
        "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
        "FSDP_ACTIVATION_CHECKPOINTING": "gradient_checkpointing",
    }.items():
        if _value(name) not in NOTHING:
            raise ValueError(f"{name} is {os.environ[name]!r}; expected it unset: the option {option} asks for this")
    for name, way in OTHER_WAYS.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{name} is {os.environ[name]!r}; expected DDP, FSDP or one process, not {way}")


def _value(name: str) -> str:
    """Return a variable in lower case, empty where it is not set."""
    return os.environ.get(name, "").strip().lower()


def _refuse(name: str, value: str, option: str, asked: object) -> None:
    raise ValueError(
        f"{name} is {value!r}, but {option} is {asked}; expected the variable unset, or the same in both: set "
        f"--{option}, which is the one that counts"
    )
