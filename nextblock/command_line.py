"""The command line of every command: YAML files and options, read into a run config.

`--config` takes a file or the name of a config shipped in nextblock.configs; later options override it.
"""

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from yaml import YAMLError

from nextblock.files.regular import MAX_YAML_BYTES, check_size, is_regular, read_text

from .chosen_options import with_chosen_options
from .commands import example_text
from .config_files import check_options_text
from .mistakes import let_first_process_speak
from .output_folders import check_output_folders

ConfigT = TypeVar("ConfigT")

set_parsing_settings(
    # The descriptions of fields are the strings under them.
    docstring_parse_attribute_docstrings=True,
    validate_defaults=True,
    # A class that options name would be imported, and its module run.
    import_path_denylist=["*"],
    import_path_allowlist=["nextblock"],
)


def parse_run_config(config_class: type[ConfigT], *, command: str, argv: Sequence[str]) -> ConfigT:
    """Reads a run config from `--config` files and command line options.

    Bad input ends the process with status 2 and one message, as argparse does; so does a ValueError that
    `__post_init__` of the config or of a dataclass in it raises.

    Args:
        config_class: Keyword-only dataclass; its fields may be dataclasses, reached as `--field.name`.
        command: What follows `nextblock` in `--help` and messages; one among COMMANDS has an example.
        argv: Arguments after the command.

    Returns:
        An instance of config_class.
    """
    piped: dict[str, str] = {}
    chosen_class = with_chosen_options(config_class, argv, partial(_given_text, piped))
    parser = _run_config_parser(chosen_class, command, piped)
    _check_group_files(parser, argv)
    try:
        namespace = parser.parse_args(list(argv))
        given = parser.parse_args(list(argv), defaults=False)
    # What jsonargparse stumbles over in options that name files of their own.
    except (ValueError, TypeError, OSError, RecursionError, YAMLError) as error:
        parser.error(f"the options cannot be read: {type(error).__name__}: {error}", error)
    namespace.pop("config")
    for name, value in _misplaced_values(chosen_class, namespace):
        parser.error(f'Parser key "{name}":\n  Expected {"a value, got null" if value is None else "options"}')
    try:
        config = config_class(**vars(parser.instantiate(namespace)))
        for name, value, most in _outsized(namespace):
            raise ValueError(f"{name} is {value}; expected at most {most}")
        check_output_folders(config)
    except ValueError as error:
        parser.error(str(error), error)
    for name, options in vars(config).items():
        if hasattr(options, "given"):
            options.given = frozenset(vars(given.get(name) or Namespace()))
    return config


def read_options(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Reads options that a run has kept, as strictly as a file of `--config`.

    Args:
        config_class: Keyword-only dataclass.
        values: Its fields by name.

    Returns:
        An instance of config_class.

    Raises:
        ValueError: If a value is of another type, or is refused.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(values))))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


class _ExampleParser(ArgumentParser):
    """Ends the help with an example, and names the options that a wrong one is most like.

    An epilog's line would be broken, and could not be pasted into a shell.
    """

    example = ""
    piped: dict[str, str]
    group_names: set[str]
    source: str | None = None
    """The file that is being read, whose name belongs into messages."""

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.example}" if self.example else "")

    def error(self, message: str, ex: Exception | None = None):
        found = _UNKNOWN_OPTION.search(message)
        if found is not None:
            typed, group, inner, outer = found.groups()
            name = typed or (f"{group}.{inner}" if group else outer)
            nearest = _nearest(name, [option[2:] for option in self._option_string_actions if option[:2] == "--"])
            message += f"; did you mean {' or '.join(f'--{option}' for option in nearest)}?"
        let_first_process_speak()
        super().error(message if self.source is None else f"--config {self.source!r}: {message}", ex)


# How jsonargparse speaks of options on the command line, in a group of a file, and in a file.
_UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments:.*?--([^\s=]+)|Group '([^']+)' does not accept option '([^']+)'"
    r"|Option '([^']+)' is not accepted"
)


def _nearest(name: str, options: Sequence[str]) -> list[str]:
    """Options of the same last word in other groups, else the one that is spelled most alike."""
    last = name.rpartition(".")[2]
    namesakes = [option for option in options if option.rpartition(".")[2] == last]
    return namesakes[:3] or difflib.get_close_matches(name, options, n=1, cutoff=0.0)


# How a shell names the end of `<(COMMAND)`.
_SUBSTITUTION = re.compile(r"/(dev|proc/self)/fd/\d+")


def _read_pipe(piped: dict[str, str], path: str) -> str:
    """Read what a command wrote, once however often arguments are parsed; it ends with the command."""
    if path not in piped:
        with open(path, "rb") as pipe:
            content = pipe.read(MAX_YAML_BYTES + 1)
        check_size(len(content), MAX_YAML_BYTES, path)
        piped[path] = content.decode("utf-8")
    return piped[path]


def _given_text(piped: dict[str, str], value: str) -> str:
    """Return the text of a file, pipe or shipped config that an option names, or of options given in their place."""
    if is_regular(value):
        return read_text(value, MAX_YAML_BYTES)
    if _SUBSTITUTION.fullmatch(value):
        return _read_pipe(piped, value)
    shipped = shipped_configs()
    return shipped[value].read_text(encoding="utf-8") if value in shipped else value


class _NamedConfigFile(ActionConfigFile):
    """Config file option that also takes the name of a shipped config, or `<(COMMAND)` of a shell."""

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None):
        is_file = is_regular(values)
        if is_file or _SUBSTITUTION.fullmatch(values):
            try:
                text = read_text(values, MAX_YAML_BYTES) if is_file else _read_pipe(parser.piped, values)
                check_options_text(text, values, parser.group_names)
            except (ValueError, OSError) as error:
                parser.error(f"--config: {error}", error)
            self._read(parser, cfg, values if is_file else text, values)
            return
        shipped = shipped_configs()
        if values not in shipped:
            names = ", ".join(sorted(shipped)) or "none"
            parser.error(f"--config: {values!r} is neither a file nor a shipped config ({names})")
        with resources.as_file(shipped[values]) as path:
            self._read(parser, cfg, str(path), values)

    def _read(self, parser: ArgumentParser, cfg: Namespace, content: str, source: str) -> None:
        """Read a file, or the text that it had; what is wrong in it is said with its name."""
        parser.source = source
        super().__call__(parser, cfg, content)
        parser.source = None


def shipped_configs() -> dict[str, Any]:
    """Return the shipped config files by name."""
    found, folders = {}, [("", resources.files("nextblock.configs"))]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry
    return found


def _run_config_parser(config_class: type, command: str, piped: dict[str, str]) -> ArgumentParser:
    prog = f"nextblock {command}"
    parser = _ExampleParser(
        prog=prog,
        # argparse's own usage repeats every option and would bury the message of an error.
        usage=f"{prog} [--config FILE_OR_NAME] [--OPTION VALUE ...]",
        description=inspect.getdoc(config_class),
        allow_abbrev=False,
    )
    help_text = "YAML file, or the name of a shipped config. May be repeated; the last value counts."
    parser.example, parser.piped, parser.group_names = example_text(command), piped, set(_groups(config_class))
    parser.add_argument("--config", action=_NamedConfigFile, help=help_text)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _check_group_files(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse what is given for a whole group of options, as in `--loop FILE`, and neither is nor names options."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    for option, value in pairwise(words):
        if option.startswith("--") and option[2:] in parser.group_names:
            is_file = os.path.exists(value)
            try:
                text = read_text(value, MAX_YAML_BYTES) if is_file else value
                check_options_text(text, value, parser.group_names, f"{option[2:]}.")
            except (ValueError, OSError) as error:
                parser.error(f"{option}: {error}", error)


def _groups(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield the names that stand for a group."""
    for name, hint in get_type_hints(config_class).items():
        for each in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(each):
                yield f"{prefix}{name}"
                yield from _groups(each, f"{prefix}{name}.")


def _misplaced_values(config_class: type, namespace: Namespace, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options that are null against their type, which jsonargparse takes for unset, and groups that are no group."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, value = hints[field.name], namespace.get(field.name)
        if value is None and hint is not Any and type(None) not in get_args(hint):
            yield prefix + field.name, None
        elif isinstance(value, Namespace) and dataclasses.is_dataclass(hint):
            yield from _misplaced_values(hint, value, f"{prefix}{field.name}.")
        elif isinstance(value, str | int | float | list) and dataclasses.is_dataclass(hint):
            yield prefix + field.name, value


# Images or rows at a time, and pictures to look at: of more, a mistyped number, no machine holds what is made of them.
_MOST = {"batch_size": 1 << 16, "eval_batch_size": 1 << 16, "num_pictures": 1 << 12, "num_pictures_per_class": 1 << 12}
# What numpy, torch and the files hold of any other number.
_MAX_INTEGER = (1 << 63) - 1


def _outsized(namespace: Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield integers that are larger than anything can be made of, and the largest that is taken."""
    for name, value in vars(namespace.as_flat()).items():
        most = _MOST.get(name.rpartition(".")[2], _MAX_INTEGER)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number > most:
                yield name, number, most
