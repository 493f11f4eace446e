"""Folders that a command is to write, looked at before any work: they can be made, and are none of those it reads."""

import os
from pathlib import Path
from typing import Any

_OUTPUTS = ("output_dir", "pipeline_dir")
_OUTPUT_FILES = ("reference_file",)
_INPUTS = ("tokenizer", "tokens", "pipeline", "samples", "reference", "training_images", "features")


def check_output_folders(config: Any) -> None:
    """Refuse folders that cannot be written, or that the same command reads.

    Args:
        config: of a command; its fields `output_dir` and `pipeline_dir`, if it has them, are what it writes.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    for option in _OUTPUT_FILES:
        if getattr(config, option, None) is not None:
            file = getattr(config, option)
            check_writable(option, Path(file).parent, file)
    for option in _OUTPUTS:
        value = getattr(config, option, None)
        if value is None:
            continue
        if not value or "\0" in value:
            raise ValueError(f"{option} is {value!r}; expected the name of a folder")
        check_writable(option, Path(value))
        folder = Path(value).resolve()
        for name in _INPUTS:
            source = getattr(config, name, None)
            if source and folder == Path(source).resolve():
                raise ValueError(f"{option} is {value!r}, the same as {name}; expected a folder of its own")
        _check_outside_images(option, value, getattr(config, "data", None))


def _check_outside_images(option: str, value: str, data: Any) -> None:
    """Refuse a folder that a later run would read images in."""
    if getattr(data, "source", None) != "folder" or not data.path or not os.path.isdir(data.path):
        return
    images, folder = Path(data.path).resolve(), Path(value).resolve()
    splits = [images / split for split in (data.split, data.eval_split) if split is not None]
    read = [split for split in splits if split.is_dir()] or [images]
    if folder == images or any(folder.is_relative_to(place) for place in read):
        raise ValueError(f"{option} is {value!r}, within data.path {data.path!r}; expected a folder outside the data")


def check_writable(option: str, folder: Path, value: str | None = None) -> None:
    """Refuse a folder that cannot be made or written to.

    Args:
        option: that names it.
        folder: that may not be there yet.
        value: of the option, a file there; None for the folder itself.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    value = str(folder) if value is None else value
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:  # Names that are too long, links that lead in circles.
        raise ValueError(f"{option} is {value!r}; expected a folder that can be made: {error}") from error
    if not there.is_dir():
        raise ValueError(f"{option} is {value!r}; expected a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} is {value!r}; expected a folder that can be written, but {there} cannot")
