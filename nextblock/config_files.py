"""Files of options, looked at before they are read: YAML of names and values, each name given once."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from nextblock.files.regular import check_yaml


def check_options_text(text: str, path: str | os.PathLike, groups: Collection[str], prefix: str = "") -> None:
    """Refuse a text that cannot hold options.

    Args:
        text: of the file.
        path: of the file, for the message.
        groups: names that stand for several options, dotted.
        prefix: of the names in the text: that of the group whose options they are, and a dot.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    content = check_yaml(text, path)
    if content is None:
        return
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected names with values")
    _check_groups(content, path, groups, prefix)
    nodes = [yaml.compose(text, yaml.SafeLoader)]
    known = set()
    while nodes:
        node = nodes.pop()
        if id(node) in known or not isinstance(node, yaml.CollectionNode):
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [name for name, count in names.items() if count > 1 and name != "<<"]
        if twice:
            raise ValueError(f"{path}, line {node.start_mark.line + 1} and on: {twice} given twice; expected once")
        nodes += [value for _, value in node.value]


def _check_groups(content: Mapping[Any, Any], path: str | os.PathLike, groups: Collection[str], prefix: str) -> None:
    """Refuse a text in place of a group's options: jsonargparse would open a file of that name, whatever it is."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in groups and isinstance(value, str):
            raise ValueError(f"{path}: {name} is {value!r}; expected options by name")
        if isinstance(value, Mapping):
            _check_groups(value, path, groups, f"{name}.")
