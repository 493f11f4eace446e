"""What the converters of both stages share: options, a table of formats, and the way in and out.

A format is one line of a command's table; what it does is an adapter's, `tokenizer/X_checkpoint.py` or
`prior/X_checkpoint.py`.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from nextblock.files.foreign_checkpoints import read_foreign
from nextblock.files.state_dicts import write_state_dict

from .command_line import parse_run_config
from .inputs import load_given
from .mistakes import reading

ConfigT = TypeVar("ConfigT", bound="ConversionConfig")
# So many names show what a checkpoint is.
_NUM_NAMES_SHOWN = 8
_ALWAYS = {"format", "checkpoint", "output_dir", "export"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How another project writes a model: a line of a converter's table.

    Args:
        title: what a checkpoint is, with its article.
        fits: tells by the names of the tensors whether a checkpoint can be of this format.
        is_meant: where names fit several formats, tells whether "auto" takes this one; None asks `fits` alone.
        take_over: makes a model of tensors by name and of the options as keyword arguments.
        options: the command's options that say what no shape tells, each with the name of its argument.
        required: those that must be given, each with what is expected.
        write: gives a model's tensors by the other project's names, of the model and the export's options.
        export_options: the command's options that go with `--export`, each with the name of its argument.
        container: the key under which the other project looks for the tensors in a file; None looks for them bare.
        file_name: that a model's tensors are written to.
        arguments: what the other project's own class has to be given, of a model and its tensors written.
    """

    title: str
    fits: Callable[[Collection[str]], bool]
    is_meant: Callable[[Collection[str]], bool] | None = None
    take_over: Callable[..., Any]
    options: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, str] = field(default_factory=dict)
    write: Callable[..., dict[str, Tensor]]
    export_options: Mapping[str, str] = field(default_factory=dict)
    container: str | None = None
    file_name: Callable[[Any], str]
    arguments: Callable[[Any, dict[str, Tensor]], dict]


@dataclass(kw_only=True)
class ConversionConfig:
    """Converts a model of another project, or with `--export` a model of this one."""

    # A command's table, by the names that `format` takes, and the options that every format of it takes on the way in.
    formats: ClassVar[Mapping[str, Format]] = {}
    shared_options: ClassVar[frozenset[str]] = frozenset()

    format: str = "auto"
    """Whose names and arithmetic the checkpoint follows; "auto" goes by the names of its tensors."""
    checkpoint: str
    """A .pth, .pt, .ckpt, .bin or .safetensors file; with `--export` a model folder of this project."""
    output_dir: str
    """Folder to write: a model folder; with `--export` one that gets a file of tensors."""
    export: bool = False
    """Write a checkpoint in the other project's format instead of reading one."""
    scales: str | list[int | list[int]] | None = None
    """var: sizes of the token maps, such as 1,2,3,4,5,6,8,10,13,16; the last is the latent grid."""

    def __post_init__(self):
        if self.format != "auto":
            self.check_options(self.format)
        elif self.export:
            raise ValueError(f"format is 'auto' with export; expected one of {list(self.formats)}")
        if isinstance(self.scales, str):
            self.scales = _read_scales(self.scales)

    def check_options(self, name: str) -> None:
        """Refuse options that a format does not take, and the lack of one that it needs.

        Args:
            name: of the format.

        Raises:
            ValueError: naming the options.
        """
        chosen = self.formats[name]
        taken = _ALWAYS.union(chosen.export_options if self.export else self.shared_options.union(chosen.options))
        given = [f.name for f in fields(self) if f.name not in taken and getattr(self, f.name) != f.default]
        if given and self.export:
            raise ValueError(f"{given} do not go with export; expected none: the folder's own config tells them")
        if given:
            raise ValueError(f"{given} do not go with format {name!r}; expected none but {sorted(taken)}")
        for option, expected in chosen.required.items():
            if not self.export and getattr(self, option) is None:
                raise ValueError(f"{option} is missing; expected {expected}")

    def chosen_format(self, names: Collection[str]) -> str:
        """Return the format's name, for "auto" as the names of a checkpoint's tensors tell.

        Args:
            names: of the tensors.

        Raises:
            ValueError: if the names are another format's than the one given, or no format's or several's, listing
                what was seen and the formats known; or if options do not go with the format that was found.
        """
        fitting = [name for name, each in self.formats.items() if each.fits(names)]
        if self.format != "auto":
            if fitting and self.format not in fitting:
                raise ValueError(f"format is {self.format!r}; expected {_either(fitting)}: {_shown(names)}")
            return self.format
        meant = [name for name in fitting if (self.formats[name].is_meant or self.formats[name].fits)(names)]
        if len(meant) != 1:
            found = f"fits {_either(fitting)}" if fitting else "is of no format known"
            raise ValueError(
                f"format is 'auto', and the checkpoint {found}; expected one of {list(self.formats)}: {_shown(names)}"
            )
        self.check_options(meant[0])
        return meant[0]


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


def read_checkpoint(config: ConversionConfig) -> tuple[str, dict[str, Tensor]]:
    """Read the checkpoint that the options name, and tell its format.

    Args:
        config: the options.

    Returns:
        The format's name and the tensors by the file's names.

    Raises:
        ValueError: if the file cannot be read, or its format cannot be told or is not the one given.
    """
    expected = "a file of tensors" if config.format == "auto" else config.formats[config.format].title
    with reading("checkpoint", config.checkpoint, expected):
        state = read_foreign(config.checkpoint)
    return config.chosen_format(state.keys()), state


def take_over(config: ConversionConfig, name: str, state: dict[str, Tensor], **more: Any) -> Any:
    """Make a model of the tensors that a checkpoint holds.

    Args:
        config: the options.
        name: of the format.
        state: the tensors by the file's names.
        more: arguments of the format's adapter beside those of its options.

    Raises:
        ValueError: naming the checkpoint and what is wrong with it.
    """
    chosen = config.formats[name]
    with reading("checkpoint", config.checkpoint, f"{chosen.title} that the other options fit"):
        return chosen.take_over(state, **_given(config, chosen.options), **more)


def export(config: ConversionConfig, model_class: type) -> None:
    """Write a model of this project in another's format, and say what the other project has to be told.

    Args:
        config: the options.
        model_class: of the model that `checkpoint` names.

    Raises:
        ValueError: if the folder is no such model, or the format has no form for it.
    """
    chosen = config.formats[config.format]
    model = load_given("checkpoint", config.checkpoint, model_class, dtype=torch.float32)
    state = chosen.write(model, **_given(config, chosen.export_options))
    path = Path(config.output_dir) / chosen.file_name(model)
    write_state_dict(state if chosen.container is None else {chosen.container: state}, path)
    print(f"{path}: {len(state)} tensors, {chosen.title} with {chosen.arguments(model, state)}")


def _given(config: ConversionConfig, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of options that have one, by the names of the arguments that they are."""
    values = {argument: getattr(config, option) for option, argument in options.items()}
    return {argument: value for argument, value in values.items() if value is not None}


def _either(names: Sequence[str]) -> str:
    """List formats of which one is."""
    return " or ".join(map(repr, names))


def _shown(names: Collection[str]) -> str:
    """Show what a checkpoint holds by its first names."""
    first = ", ".join(list(names)[:_NUM_NAMES_SHOWN])
    return f"it holds {len(names)} tensors, {first}{' …' if len(names) > _NUM_NAMES_SHOWN else ''}"


def _read_scales(text: str) -> list[int | list[int]]:
    """Read scales as they are typed: 1,2,4 or, where they are not square, 1,[1,2],[2,4]."""
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError as error:
        raise ValueError(f"scales is {text!r}; expected sizes such as 1,2,4 or [1,2],[2,4]") from error
