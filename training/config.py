"""Run configs: keyword-only dataclasses read from YAML and the command line, and written back.

`--config` takes a file or the name of a config shipped in nextblock.configs; later options override it.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from .commands import program_and_example

ConfigT = TypeVar("ConfigT")


def parse_run_config(config_class: type[ConfigT], *, prog: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Reads a run config from `--config` files and command line options.

    Bad input ends the process with status 2 and one message, as argparse does; so does a ValueError that
    `__post_init__` of the config or of a dataclass in it raises.

    Args:
        config_class: Keyword-only dataclass; its fields may be dataclasses, reached as `--field.name`.
        prog: How the entry point is run as a module, for `--help` and messages: `python -m nextblock.tokenizer.train`;
            a command of the console script that the user typed instead takes its place.
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        An instance of config_class.
    """
    parser = _run_config_parser(config_class, prog)
    namespace = parser.parse_args(None if argv is None else list(argv))
    namespace.pop("config")
    for name in _misplaced_nulls(config_class, namespace):
        parser.error(f'Parser key "{name}":\n  Expected a value, got null')
    try:
        values = parser.instantiate(namespace)
        return config_class(**vars(values))
    except ValueError as error:
        parser.error(str(error), error)


def save_run_config(config: Any, path: str | Path) -> None:
    """Writes every value of a run config, defaults too, as YAML that `--config` reads back.

    Args:
        config: Instance of a run config dataclass.
        path: File to write; its folder exists.
    """
    Path(path).write_text(run_config_text(config), encoding="utf-8")


def run_config_text(config: Any) -> str:
    """Returns every value of a run config, defaults too, as YAML that `--config` reads back.

    Args:
        config: Instance of a run config dataclass.
    """
    return yaml.dump(dataclasses.asdict(config), Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True)


def options_dataclass(config_class: type, *, exclude: Sequence[str] = ()) -> type:
    """Makes a dataclass of the options that a model config declares, for use as a field of a run config.

    `dataclasses.asdict` of an instance gives the keyword arguments for config_class. Options of the base
    class, which reach `__init__` through `**kwargs`, are left out.

    Args:
        config_class: Class with an explicit, typed `__init__` whose parameters all have defaults;
            descriptions come from the Args section of the docstring of the class or of `__init__`.
        exclude: Parameters that the run determines by itself (from the data, say) and no user may set.

    Returns:
        Keyword-only dataclass named after config_class: VQVAEConfig gives VQVAEOptions.

    Raises:
        ValueError: If an excluded name is no parameter, or if a parameter has no type or no default.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(config_class.__init__, eval_str=True)
    parameters = {p.name: p for p in list(signature.parameters.values())[1:] if p.kind in named}
    unknown = sorted(set(exclude) - set(parameters))
    if unknown:
        raise ValueError(f"exclude: {unknown} not among {list(parameters)} of {config_class.__name__}")
    kept = [p for p in parameters.values() if p.name not in exclude]
    for parameter in kept:
        if parameter.annotation is parameter.empty or parameter.default is parameter.empty:
            raise ValueError(f"{config_class.__name__}: option {parameter.name!r} needs a type and a default")
    options = dataclasses.make_dataclass(
        config_class.__name__.removesuffix("Config") + "Options",
        [(p.name, p.annotation, _default_field(p.default)) for p in kept],
        kw_only=True,
    )
    options.__module__ = config_class.__module__
    options.__doc__ = _options_docstring(config_class, [p.name for p in kept])
    return options


class _ExampleParser(ArgumentParser):
    """Ends the help with an example; an epilog's line would be broken, and could not be pasted into a shell."""

    example = ""

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.example}" if self.example else "")


class _NamedConfigFile(ActionConfigFile):
    """Config file option that also takes the name of a shipped config."""

    def __call__(self, parser: ArgumentParser, cfg: Namespace, values: str, option_string: str | None = None):
        if Path(values).is_file():
            super().__call__(parser, cfg, values, option_string)
            return
        shipped = _shipped_configs()
        if values not in shipped:
            names = ", ".join(sorted(shipped)) or "none"
            parser.error(f"--config: {values!r} is neither a file nor a shipped config ({names})")
        with resources.as_file(shipped[values]) as path:
            super().__call__(parser, cfg, str(path), option_string)


class _ConfigDumper(yaml.SafeDumper):
    """Quotes strings such as 1e3, which PyYAML takes for text and jsonargparse reads as a number."""


_ConfigDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _shipped_configs() -> dict[str, Any]:
    """Shipped config files by name."""
    found, folders = {}, [("", resources.files("nextblock.configs"))]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry
    return found


def _run_config_parser(config_class: type, prog: str) -> ArgumentParser:
    # The descriptions of fields are the strings under them.
    set_parsing_settings(docstring_parse_attribute_docstrings=True, validate_defaults=True)
    prog, example = program_and_example(prog)
    parser = _ExampleParser(
        prog=prog,
        # argparse's own usage repeats every option and would bury the message of an error.
        usage=f"{prog} [--config FILE_OR_NAME] [--OPTION VALUE ...]",
        description=inspect.getdoc(config_class),
        allow_abbrev=False,
    )
    help_text = "YAML file, or the name of a shipped config. May be repeated; the last value counts."
    parser.example = example
    parser.add_argument("--config", action=_NamedConfigFile, help=help_text)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def _misplaced_nulls(config_class: type, namespace: Namespace, prefix: str = "") -> Iterator[str]:
    """Dotted names of options that are null against their type, which jsonargparse takes for unset."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, value = hints[field.name], namespace.get(field.name)
        if value is None and hint is not Any and type(None) not in get_args(hint):
            yield prefix + field.name
        elif isinstance(value, Namespace) and dataclasses.is_dataclass(hint):
            yield from _misplaced_nulls(hint, value, f"{prefix}{field.name}.")


def _default_field(default: Any) -> Any:
    """Dataclass field with a default, copied for every instance where it is mutable."""
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=default.copy)
    return dataclasses.field(default=default)


def _options_docstring(config_class: type, names: list[str]) -> str:
    described = {}
    for source in (config_class.__doc__, config_class.__init__.__doc__):
        described |= {p.arg_name: p.description for p in docstring_parser.parse(source or "").params}
    lines = [f"    {name}: {' '.join(described[name].split())}" for name in names if described.get(name)]
    return "\n".join([f"Options of {config_class.__name__}.", "", "Args:", *lines])
