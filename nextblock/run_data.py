"""Which images a command reads where its options do not say: those that the tokenizer was trained on."""

from dataclasses import fields
from pathlib import Path

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig
from nextblock.files.regular import read_yaml

from .command_line import read_options
from .mistakes import reading

_CONFIG_NAME = "config.yaml"


def data_of_run(folder: str | None) -> tuple[ImageDataConfig, TransformConfig]:
    """Read the images that a training was given, and how it varied them.

    Args:
        folder: the training's output folder, such as a tokenizer's; None where there is none to ask.

    Returns:
        Its data and its transform.

    Raises:
        ValueError: if no training left its options there, or they name no images or are not understood.
    """
    path = None if folder is None else Path(folder, _CONFIG_NAME)
    options = {}
    if path is not None and path.is_file():
        options = read_yaml(path) or {}
    data = options.get("data") if isinstance(options, dict) else None
    if not data or (isinstance(data, dict) and data.get("source") is None):
        where = "" if path is None else f", and {path} is not there or names no images"
        # The same words as for a command that has no training to ask.
        ImageDataConfig().check_given(where)
    read = []
    for name, config_class in (("data", ImageDataConfig), ("transform", TransformConfig)):
        values = options.get(name) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {name} is {values!r}, no options; expected --data.source")
        unknown = sorted(set(values) - {option.name for option in fields(config_class)})
        if unknown:
            raise ValueError(f"{path}: {name} holds {unknown}, which are no options; expected --data.source")
        with reading("data", str(path), f"options of {name}, or --data.source beside it"):
            read.append(read_options(config_class, values))
    return tuple(read)
