"""The command line that the converters of both stages share: one way in, and with `--export` one out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import ClassVar, Literal, TypeVar

from .command_line import parse_run_config

ConfigT = TypeVar("ConfigT", bound="ConversionConfig")


@dataclass(kw_only=True)
class ConversionConfig:
    """Converts a model of another project, or with `--export` a model of this one."""

    # Options that have a meaning with `--export`; the others only describe what a checkpoint leaves open.
    export_options: ClassVar[frozenset[str]] = frozenset({"format", "checkpoint", "output_dir", "export"})

    format: Literal["var"]
    """Whose names and arithmetic the checkpoint follows."""
    checkpoint: str
    """A .pth, .pt or .safetensors file; with `--export` a model folder of this project."""
    output_dir: str
    """Folder to write: a model folder; with `--export` one that gets a .pth file."""
    export: bool = False
    """Write a checkpoint in the other project's format instead of reading one."""
    scales: str | list[int | list[int]] | None = None
    """Sizes of the token maps, such as 1,2,3,4,5,6,8,10,13,16; the last is the latent grid."""

    def __post_init__(self):
        if self.export:
            idle = [f.name for f in fields(self) if f.name not in self.export_options]
            given = [name for name in idle if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise ValueError(f"{given} do not go with export; expected none: the folder's own config tells them")
        elif self.scales is None:
            raise ValueError("scales is missing; expected sizes such as 1,2,3,4,5,6,8,10,13,16")
        if isinstance(self.scales, str):
            self.scales = _read_scales(self.scales)


def parse_conversion(
    config_class: type[ConfigT], *, command: str, argv: Sequence[str], flags: Sequence[str]
) -> ConfigT:
    """Reads a converter's options, in which a flag may stand without a value.

    Args:
        config_class: what to read.
        command: a name among COMMANDS, for `--help` and messages.
        argv: arguments after the command.
        flags: names of the boolean options.

    Returns:
        An instance of config_class.
    """
    options = {f"--{name}" for name in flags}
    spelled = [
        f"{argument}=true" if argument in options and (after is None or after.startswith("--")) else argument
        for argument, after in zip_longest(argv, argv[1:])
    ]
    return parse_run_config(config_class, command=command, argv=spelled)


def _read_scales(text: str) -> list[int | list[int]]:
    """Read scales as they are typed: 1,2,4 or, where they are not square, 1,[1,2],[2,4]."""
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError as error:
        raise ValueError(f"scales is {text!r}; expected sizes such as 1,2,4 or [1,2],[2,4]") from error
