"""Reading back what accelerate saved of a training, so that no file of it can run code.

accelerate's own `load_state` unpickles freely what is registered with it and the states of sharded trainings, and
passes over random states that it cannot load.
"""

import io
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dist_cp
from accelerate import Accelerator
from accelerate.utils import DistributedType, load, load_fsdp_model, load_fsdp_optimizer
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME, RNG_STATE_NAME, SAFE_MODEL_NAME, SCALER_NAME
from safetensors.torch import load_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import StateDictType

# All that the description of a sharded state is made of.
_DESCRIBED_BY = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


def load_saved_state(accelerator: Accelerator, folder: Path) -> None:
    """Give models, optimizers, scaler and random numbers their saved states; every process must call it.

    Args:
        accelerator: holds the same prepared objects as when `Accelerator.save_state` wrote them.
        folder: where.

    Raises:
        ValueError: naming the file that is missing, is not of these objects, or might run code.
    """
    scaler = accelerator.scaler
    if scaler is not None:
        with naming(folder / SCALER_NAME) as path:
            scaler.load_state_dict(_read(path))
    if accelerator.distributed_type == DistributedType.FSDP:
        if scaler is not None:  # A sharded optimizer is loaded by a step, which needs it.
            scaler._lazy_init_scale_growth_tracker(scaler._device)
        _load_sharded(accelerator, folder)
    else:
        for number, model in enumerate(accelerator._models):
            with naming(folder / f"{_numbered(SAFE_MODEL_NAME, number)}.safetensors") as path:
                load_model(model, path)
        for number, optimizer in enumerate(accelerator._optimizers):
            with naming(folder / f"{_numbered(OPTIMIZER_NAME, number)}.bin") as path:
                optimizer.load_state_dict(_read(path))
    with naming(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl") as path:
        _set_random_states(_read(path), accelerator.device)


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators that a training draws from."""
    name = f"torch_{device.type}_manual_seed"
    if device.type != "cpu" and name not in states:
        raise ValueError(f"it has no random numbers of a {device.type} device; expected a training on one")
    random.setstate(states["random_state"])
    np.random.set_state(states["numpy_random_seed"])
    torch.set_rng_state(states["torch_manual_seed"])
    if device.type != "cpu":
        of_device = torch.get_device_module(device)
        of_device.set_rng_state(states[name][device.index or 0], device)


def _load_sharded(accelerator: Accelerator, folder: Path) -> None:
    """Load the models and optimizers of an FSDP training."""
    plugin = accelerator.state.fsdp_plugin
    is_whole = plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}; expected 2")
    for number, (model, optimizer) in enumerate(zip(accelerator._models, accelerator._optimizers, strict=True)):
        if is_whole:  # These are read as tensors alone.
            with naming(folder / f"{_numbered(FSDP_MODEL_NAME, number)}.bin"):
                load_fsdp_model(plugin, accelerator, model, str(folder), number)
            with naming(folder / f"{_numbered(OPTIMIZER_NAME, number)}.bin"):
                load_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder), number)
            continue
        with naming(folder / f"{FSDP_MODEL_NAME}_{number}") as path:
            state = {"model": get_model_state_dict(model)}
            dist_cp.load(state, storage_reader=_Reader(path), planner=_Planner())
            set_model_state_dict(model, state["model"])
        with naming(folder / f"{OPTIMIZER_NAME}_{number}") as path:
            state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            dist_cp.load(state, storage_reader=_Reader(path), planner=_Planner())
            set_optimizer_state_dict(model, optimizer, state["optimizer"])


class _Reader(dist_cp.FileSystemReader):
    """Reads the description of a sharded state, which is a pickle, as nothing but a description."""

    def read_metadata(self, *args, **kwargs) -> dist_cp.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _DescriptionUnpickler(file).load()
        if not isinstance(metadata, dist_cp.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or dist_cp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _DescriptionUnpickler(pickle.Unpickler):
    """Knows the classes of a description alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _DESCRIBED_BY:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class _Planner(dist_cp.DefaultLoadPlanner):
    """Reads what is no tensor in a sharded state as numbers and texts alone."""

    def load_bytes(self, read_item: dist_cp.planner.ReadItem, value: io.BytesIO) -> None:
        # What the planner unpickles freely is written here.
        content = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), content)
        content.seek(0)
        super().load_bytes(read_item, content)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Let whatever a checkpoint's file brings about when it is loaded name the file.

    Args:
        path: of the file, which is handed on.

    Raises:
        ValueError: in place of any error inside.
    """
    try:
        yield path
    except (Exception, CheckpointException) as error:  # The latter is no Exception.
        if not path.exists():
            said = "is missing"
        elif _is_about_code(error):
            said = "is not a pickle of tensors and numbers alone; others may run code and are refused"
        else:
            said = f"cannot be loaded: {error}"
        raise ValueError(f"checkpoint {path.parent}: {path.name} {said}") from error


def _is_about_code(error: BaseException) -> bool:
    """Tell whether a pickle was refused; errors of several processes hold those of each."""
    inner = getattr(error, "failures", {}).values()
    return isinstance(error, pickle.UnpicklingError) or any(_is_about_code(wrapped[0]) for wrapped in inner)


def _read(path: Path) -> Any:
    """Read a pickle of tensors, numbers, texts and containers of these."""
    return load(path, map_location="cpu", weights_only=True)


def _numbered(name: str, number: int) -> str:
    """Name the file of the first, second, … object as accelerate does."""
    return f"{name}_{number}" if number else name
