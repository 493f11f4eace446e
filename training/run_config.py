"""Run configs: keyword-only dataclasses, made of a model's options among others, and written as YAML."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

from nextblock.files.atomic import write_text_whole


def save_run_config(config: Any, path: str | Path) -> None:
    """Writes every value of a run config, defaults too, as YAML that `--config` reads back.

    Args:
        config: Instance of a run config dataclass.
        path: File to write; its folder exists.
    """
    write_text_whole(Path(path), run_config_text(config))


def run_config_text(config: Any) -> str:
    """Returns every value of a run config, defaults too, as YAML that `--config` reads back.

    Args:
        config: Instance of a run config dataclass.
    """
    return yaml.dump(dataclasses.asdict(config), Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True)


def options_dataclass(
    config_class: type, *, exclude: Sequence[str] = (), kind: tuple[str, Any, Any, str] | None = None
) -> type:
    """Makes a dataclass of the options that a model config declares, for use as a field of a run config.

    `dataclasses.asdict` of an instance gives the keyword arguments for config_class. Options of the base
    class, which reach `__init__` through `**kwargs`, are left out.

    Args:
        config_class: Class with an explicit, typed `__init__` whose parameters all have defaults;
            descriptions come from the Args section of the docstring of the class or of `__init__`.
        exclude: Parameters that the run determines by itself (from the data, say) and no user may set.
        kind: Name, type, default and description of a first option that tells these options from those of
            other classes: where a run config's field may be any of several, a command line chooses by it.

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
    first = [] if kind is None else [(kind[0], kind[1], _default_field(kind[2]))]
    options = dataclasses.make_dataclass(
        config_class.__name__.removesuffix("Config") + "Options",
        [*first, *((p.name, p.annotation, _default_field(p.default)) for p in kept)],
        kw_only=True,
        # Names of the options that were given, where a command line knows.
        namespace={"given": None, "kind": None if kind is None else kind[0]},
    )
    options.__module__ = config_class.__module__
    described = {} if kind is None else {kind[0]: kind[3]}
    options.__doc__ = _options_docstring(config_class, [*described, *(p.name for p in kept)], described)
    return options


def given_options(options: Any) -> dict[str, Any]:
    """Returns the options that were given: by a command line, or without one those that are not the defaults.

    Args:
        options: Instance of what `options_dataclass` made. None counts as not given.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    default = type(options)()
    return {
        name: value
        for name, value in values.items()
        if value is not None and (value != getattr(default, name) if options.given is None else name in options.given)
    }


class _ConfigDumper(yaml.SafeDumper):
    """Quotes strings such as 1e3, which PyYAML takes for text and jsonargparse reads as a number."""


_ConfigDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _default_field(default: Any) -> Any:
    """Dataclass field with a default, copied for every instance where it is mutable."""
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=default.copy)
    return dataclasses.field(default=default)


def _options_docstring(config_class: type, names: list[str], described: dict[str, str]) -> str:
    for source in (config_class.__doc__, config_class.__init__.__doc__):
        described |= {p.arg_name: p.description for p in docstring_parser.parse(source or "").params}
    lines = [f"    {name}: {' '.join(described[name].split())}" for name in names if described.get(name)]
    return "\n".join([f"Options of {config_class.__name__}.", "", "Args:", *lines])
