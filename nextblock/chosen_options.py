"""Groups of options that may be any of several classes, such as the families of priors: which one is chosen."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import yaml


def with_chosen_options(config_class: type, argv: Sequence[str], read: Callable[[str], str]) -> type:
    """Put the options that a command line chooses in the place of those that it may choose among.

    Args:
        config_class: of a run. Where a field may be of several `options_dataclass`es, their `kind` names the option
            that tells them apart, and its default in each is the value that chooses it.
        argv: arguments after the command; the last value counts.
        read: gives the text of what `--config` names.

    Returns:
        The class itself where it leaves no choice; else one of the same fields, with one class for each.
    """
    hints, chosen = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        kinds = [hint for hint in get_args(hints[field.name]) if getattr(hint, "kind", None) is not None]
        if len(kinds) > 1:
            own = {getattr(kind(), kind.kind): kind for kind in kinds}
            # What is no choice at all is refused by the option itself.
            wanted = [value for value in _given(argv, read, field.name, kinds[0].kind) if value in own]
            chosen[field.name] = own[wanted[-1]] if wanted else kinds[0]
    if not chosen:
        return config_class
    fields = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in chosen.items()]
    return dataclasses.make_dataclass(
        config_class.__name__,
        fields,
        bases=(config_class,),
        kw_only=True,
        namespace={"__doc__": config_class.__doc__, "__module__": config_class.__module__},
    )


def _given(argv: Sequence[str], read: Callable[[str], str], group: str, option: str) -> Iterator[str]:
    """Yield the texts that an option of a group is given, in order."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    for name, value in pairwise(words):
        if name == f"--{group}.{option}":
            yield value
        elif name in ("--config", f"--{group}"):
            content: Any = None
            # Whatever is wrong with it, the parser says.
            with suppress(ValueError, OSError, yaml.YAMLError, RecursionError):
                content = yaml.safe_load(read(value))
            if name == "--config":
                content = content.get(group) if isinstance(content, dict) else None
            if isinstance(content, dict) and isinstance(content.get(option), str):
                yield content[option]
