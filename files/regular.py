"""Files that somebody else's folders name: only regular ones are opened, and no more is read than a bound allows.

A pipe would be waited for without end, a device read without end, and a claimed size believed until memory is gone.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# Of the largest text that means something: manifests of a million shards, class names of ImageNet-21k.
MAX_TEXT_BYTES = 1 << 28
# Options a person wrote, class names among them.
MAX_YAML_BYTES = 1 << 20
# Values in it, each counted as often as its aliases repeat it.
MAX_YAML_VALUES = 1_000_000
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularError(ValueError):
    """A pipe, a socket, a device or a folder where a file was expected."""


class TooLargeError(ValueError):
    """More bytes than are read."""


def is_regular(path: str | os.PathLike) -> bool:
    """Tell whether a path is that of a regular file, or leads to one by links."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # not there, a circle of links, or no path at all
        return False


def check_regular(path: str | os.PathLike) -> None:
    """Refuse what is no regular file, nor leads to one by links.

    Args:
        path: of it.

    Raises:
        NotRegularError: naming it and what it is.
        OSError: if there is nothing, or nothing that one may look at.
    """
    _check_mode(os.stat(path).st_mode, path)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading; see `check_regular`."""
    # Looked at before, since opening some devices sets them going, and after, since it may be another by then.
    check_regular(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_mode(os.fstat(file.fileno()).st_mode, path)
    except NotRegularError:
        file.close()
        raise
    return file


def read_content(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a regular file.

    Args:
        path: of it.
        max_bytes: the largest size that is read.

    Raises:
        NotRegularError: naming it and what it is.
        TooLargeError: naming it, its size and the bound.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size, max_bytes, path)
        return file.read(size)


def check_size(num_bytes: int, max_bytes: int, what: object) -> None:
    """Refuse more bytes than a bound.

    Args:
        num_bytes: claimed.
        max_bytes: the bound.
        what: claims them, for the message.

    Raises:
        TooLargeError: naming all three.
    """
    if num_bytes > max_bytes:
        raise TooLargeError(f"{what} has {num_bytes} bytes; expected {max_bytes} at most")


def read_text(path: str | os.PathLike, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a regular file of UTF-8; see `read_content`."""
    content = read_content(path, max_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: str | os.PathLike, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Read a regular file of JSON.

    Args:
        path: of it.
        max_bytes: the largest size that is read.

    Returns:
        What it holds.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    text = read_text(path, max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a regular file of YAML; see `check_yaml`."""
    text = read_text(path, MAX_YAML_BYTES)
    return check_yaml(text, path)


def check_yaml(text: str, path: str | os.PathLike) -> Any:
    """Read YAML; refuse text that is none, or whose aliases make too much of it, or a circle.

    Args:
        text: of the file.
        path: of the file, for the message.

    Returns:
        What it holds.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        num_values = _count_values(yaml.compose(text, yaml.SafeLoader), {})
        if num_values <= MAX_YAML_VALUES:
            return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        # The last are what its reader stumbles over, such as dates that there are not.
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no YAML that can be read: {reason}") from error
    raise TooLargeError(f"{path} holds {num_values} values by its aliases; expected {MAX_YAML_VALUES} at most")


def _count_values(node: yaml.Node | None, counts: dict[int, int | None]) -> int:
    """Count the values that a node stands for when its aliases are written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    if counts[id(node)] is None:
        raise ValueError("an alias refers to what it lies in")
    return counts[id(node)]


def _check_mode(mode: int, path: str | os.PathLike) -> None:
    """Refuse the mode of anything but a regular file."""
    if not stat.S_ISREG(mode):
        raise NotRegularError(f"{Path(path)} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a file")
