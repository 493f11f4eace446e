"""Connecting the processes that a launcher started, and choosing their device."""

import os

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .launch_environment import check_device_variable


def connect_processes(cpu: bool) -> PartialState:
    """Connect the processes of this run.

    Args:
        cpu: compute on the CPU even where there is a GPU; `ACCELERATE_USE_CPU=true` asks for the same.

    Returns:
        The state that knows device, rank and number of processes.

    Raises:
        ValueError: if several processes were launched but do not see each other, or `ACCELERATE_TORCH_DEVICE` names
            another device.
    """
    check_device_variable(cpu)
    state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but {state.num_processes} connected; for several CPU processes use "
            "`accelerate launch --multi_gpu --num_processes N -m …` with the option cpu set to true"
        )
    return state
