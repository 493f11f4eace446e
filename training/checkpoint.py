"""Checkpoints that are whole or not there: written aside, checksummed, flushed, renamed; older ones deleted after."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextblock.evaluation.report import environment
from nextblock.files.atomic import file_sha256, flush_to_disk, write_text_whole, writing
from nextblock.files.regular import read_json
from nextblock.files.state_dicts import read_like

from .saved_state import load_saved_state

logger = get_logger(__name__)

MANIFEST_NAME = "checkpoint.json"
# Another one whenever checkpoints written before cannot be loaded any more. Version 0.1.0 wrote none.
FORMAT_VERSION = 3
RUN_CONFIG_NAME, MODEL_CONFIG_NAME = "config.yaml", "config.json"
# The folder beside the checkpoints that has the best one.
BEST_NAME = "best"


class Record(Protocol):
    """What a training keeps beside its models and optimizers, such as a weight average; equal on every process."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds."""

    def load_state_dict(self, state: dict[str, Tensor]) -> object:
        """Go on from such tensors."""


def saved_steps(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, those of fewer steps first; what has other names is none, and stays.

    Args:
        folder: where checkpoints lie; it need not be there.

    Returns:
        Their paths, damaged ones among them.
    """
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))


def check_folders(checkpoints: Path) -> None:
    """Refuse to begin a run that could not save: a file, a pipe or a broken link where its checkpoints belong.

    Args:
        checkpoints: the run's folder of them, which need not be there.

    Raises:
        ValueError: naming what is there.
    """
    for place in (checkpoints, checkpoints.with_name(BEST_NAME)):
        if os.path.lexists(place) and not place.is_dir():
            raise ValueError(f"{place} is no folder; expected one for checkpoints, or nothing")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    num_kept: int,
    descriptions: Mapping[str, str],
    records: Mapping[str, Record],
) -> None:
    """Save the whole training state; every process must call it.

    Args:
        accelerator: holds the prepared models and optimizers.
        folder: where checkpoints lie, one sub-folder each.
        step: number of steps taken.
        num_kept: newest checkpoints that stay.
        descriptions: texts kept beside the state, by file name: the run's options and the model's configuration.
        records: what else is saved, each in a safetensors file of its name.

    Raises:
        UnwrittenError: if the disk is full or fails; the checkpoints from before are kept then.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.tmp"
    try:
        with writing(final):
            _save(accelerator, final, temporary, step, num_kept, descriptions, records)
    except Exception:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save(
    accelerator: Accelerator,
    final: Path,
    temporary: Path,
    step: int,
    num_kept: int,
    descriptions: Mapping[str, str],
    records: Mapping[str, Record],
) -> None:
    """Write a checkpoint aside, put it in place, and delete older ones."""
    folder = final.parent
    if accelerator.is_main_process:
        for leftover in folder.glob(".step_*.tmp"):
            _remove(leftover)
        temporary.mkdir(parents=True)
        for name, text in descriptions.items():
            (temporary / name).write_text(text, encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for name, record in records.items():
            # Copies share no memory, which the format could not hold.
            tensors = {key: tensor.to("cpu", copy=True) for key, tensor in record.state_dict().items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "format_version": FORMAT_VERSION,
            "nextblock": environment()["nextblock"],
            "step": step,
            "num_processes": accelerator.num_processes,
            "sha256": {str(path.relative_to(temporary)): file_sha256(path) for path in files},
        }
        manifest["own_sha256"] = _manifest_sha256(manifest)
        for path in files:
            flush_to_disk(path)
            _check_whole(path)
        write_text_whole(temporary / MANIFEST_NAME, json.dumps(manifest, indent=2))
        flush_to_disk(temporary)
        _remove(final)
        temporary.rename(final)
        flush_to_disk(folder)
        # What lies beyond this step was left by a run that went on from an earlier checkpoint than its last.
        known = saved_steps(folder)
        kept = known[: known.index(final) + 1][-num_kept:]
        for other in known:
            if other not in kept:
                _remove(other)
    accelerator.wait_for_everyone()


def _remove(path: Path) -> None:
    """Delete a folder, or whatever else has its name: of a link not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_whole(path: Path) -> None:
    """Refuse a file of tensors that cannot be opened again, by its header and its size."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    elif path.suffix in (".bin", ".pkl", ".pt") and not zipfile.is_zipfile(path):
        raise OSError(f"{path.name} is not whole")


def _manifest_sha256(manifest: dict) -> str:
    """Return the hexadecimal SHA-256 of all that a manifest says but this."""
    fields = {name: value for name, value in manifest.items() if name != "own_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None if it is whole."""
    try:
        manifest = read_json(checkpoint / MANIFEST_NAME)
        is_whole = manifest["own_sha256"] == _manifest_sha256(manifest)
        counts, checksums = (manifest["step"], manifest["num_processes"]), dict(manifest["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST_NAME} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_NAME} is unreadable ({error})"
    if not all(type(count) is int and count >= 0 for count in counts):
        return f"{MANIFEST_NAME} has step and num_processes {counts}, no counts"
    if not is_whole:
        return f"{MANIFEST_NAME} has changed since it was saved"
    for name, expected in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"{name} has changed since it was saved"
    return None


def _check_format(checkpoint: Path) -> None:
    """Refuse a whole checkpoint that a version with another format wrote."""
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
    found = manifest.get("format_version")
    if found == FORMAT_VERSION:
        return
    writer = "0.1.0 or earlier" if found is None else manifest.get("nextblock")
    raise ValueError(
        f"checkpoint {checkpoint} was written by nextblock {writer}, in format {found or 1}; expected format "
        f"{FORMAT_VERSION}. Finish that training with the version that wrote it, or start another one, in another "
        "output_dir, from the model that it exported: --loop.init_from FOLDER"
    )


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """Choose the checkpoint to resume from.

    Args:
        folder: where checkpoints lie.
        wanted: "latest", which takes the newest whole one and warns of damaged ones; or a checkpoint's path.

    Returns:
        The checkpoint, or None if "latest" finds the folder empty.

    Raises:
        ValueError: if the named checkpoint is damaged, or every checkpoint of the folder is; if the checkpoint has the
            format of another version.
    """
    if wanted != "latest":
        problem = damage(Path(wanted))
        if problem:
            raise ValueError(f"resume_from_checkpoint is {wanted}, which cannot be used: {problem}")
        _check_format(Path(wanted))
        return Path(wanted)
    candidates = saved_steps(folder)
    for candidate in reversed(candidates):
        problem = damage(candidate)
        if problem is None:
            _check_format(candidate)
            return candidate
        logger.warning(f"checkpoint {candidate} is damaged: {problem}; trying the one before")
    if candidates:
        raise ValueError(f"resume_from_checkpoint is 'latest'; every checkpoint in {folder} is damaged")
    return None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, records: Mapping[str, Record]) -> int:
    """Load a training state on every process.

    Args:
        accelerator: holds the same prepared objects as when the state was saved.
        checkpoint: from `find_checkpoint`.
        records: what else was saved, by name.

    Returns:
        The number of steps taken.

    Raises:
        ValueError: if another number of processes saved it, or a file is missing, of other objects or no data alone.
    """
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
    if manifest["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"checkpoint {checkpoint} was saved by {manifest['num_processes']} processes; "
            f"expected the same number to resume it, got {accelerator.num_processes}"
        )
    load_saved_state(accelerator, checkpoint)
    for name, record in records.items():
        path = checkpoint / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"checkpoint {checkpoint} has no {path.name}: it was saved by a training without one")
        record.load_state_dict(read_like(path, record.state_dict()))
    return manifest["step"]
