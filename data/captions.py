"""Captions of images: the metadata files of image folders, what is taken for captions, and one drawn of several.

Metadata files are those of `datasets`: `metadata.jsonl` or `metadata.csv`, which name each image by `file_name`.
Legend: N images.
"""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nextblock.files.names import escaped_name
from nextblock.files.regular import is_regular, read_text

from .keyed_random import keyed_uniform

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
# Longer than any caption; a text of megabytes is none.
MAX_CAPTION_LENGTH = 20_000
# Keeps the draw of a caption apart from other draws with the same keys.
_CAPTION_KEY = 0x63617074
# Of a line in a metadata file that is shown in a message.
_NUM_SHOWN = 60


def check_captions(values: Sequence[Any], names: Sequence[str], where: str) -> list[tuple[str, ...]]:
    """Take a text, or a list of texts, an image for its captions.

    Args:
        values: N.
        names: of the N images, for a message.
        where: they come from, for a message.

    Returns:
        N tuples of at least one caption, without blanks around them.

    Raises:
        ValueError: naming images without captions, or what is none.
    """
    captions, missing = [], []
    for value, name in zip(values, names, strict=True):
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else value
        if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{where} holds {value!r:.80} for {name}; expected a text, or a list of texts")
        stripped = tuple(text.strip() for text in texts or ())
        if not all(map(is_encodable, stripped)):
            raise ValueError(f"{where} holds {value!a:.80} for {name}; expected whole characters, no half of a pair")
        if not stripped or not all(stripped):
            missing.append(name)
        longest = max(map(len, stripped), default=0)
        if longest > MAX_CAPTION_LENGTH:
            most = f"{MAX_CAPTION_LENGTH} characters at most"
            raise ValueError(f"{where} holds a caption of {longest} characters for {name}; expected {most}")
        captions.append(stripped)
    if missing:
        raise ValueError(
            f"{where} holds no caption, or a blank one, for {len(missing)} of {len(names)} images, such as "
            f"{', '.join(missing[:3])}; expected at least one for every image"
        )
    return captions


def is_encodable(text: str) -> bool:
    """Tell whether a text can be written down: halves of a pair of code units, as "\\ud83d" of JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def folder_captions(root: Path, files: Sequence[str], column: str) -> list[tuple[str, ...]]:
    """Read the captions of an image folder's pictures.

    Args:
        root: the folder.
        files: N paths of pictures relative to it, with forward slashes.
        column: the captions' name in the metadata files, which lie beside the pictures or in folders above, up to root.

    Returns:
        N tuples of captions.

    Raises:
        ValueError: naming the metadata file and line that is damaged, lacks a field or names a file that is not there;
            or pictures without captions.
    """
    by_file: dict[str, Any] = {}
    pictures, paths = set(files), metadata_files(root, files)
    for path in paths:
        _check_metadata(root / path)
        for line, row in (_json_rows if path.endswith(".jsonl") else _csv_rows)(root / path):
            where = f"{root / path}, line {line}"
            file = posixpath.normpath(posixpath.join(posixpath.dirname(path), _field(row, "file_name", where)))
            caption = _field(row, column, where)
            if file not in pictures:
                if not os.path.exists(root / file):
                    raise ValueError(f"{where}: there is no file {file!r:.200} in {root}; expected one")
                continue
            if file in by_file:
                raise ValueError(f"{where}: {file!r:.200} is named twice; expected one line for a file")
            by_file[file] = caption
    if not paths:
        raise ValueError(
            f"caption_column={column!r}: {root} has no {' or '.join(METADATA_NAMES)} beside its images or above them; "
            "expected one with the fields file_name and " + column
        )
    return check_captions([by_file.get(file) for file in files], [escaped_name(file) for file in files], str(root))


def draw_captions(
    num_captions: Sequence[int], seed: int, epochs: Sequence[int], index: Sequence[int]
) -> list[int]:
    """Draw one of each image's captions, as a pure function of (seed, epoch, image).

    Args:
        num_captions: of each of N images, at least 1.
        seed: key.
        epochs: N, 0 or more.
        index: N numbers of images.

    Returns:
        N numbers of captions, from 0.
    """
    epochs, index = (torch.as_tensor(values, dtype=torch.int64) for values in (epochs, index))
    draws = torch.empty(len(index), dtype=torch.float64)
    for epoch in epochs.unique().tolist():
        is_here = epochs == epoch
        draws[is_here] = keyed_uniform(seed, epoch, _CAPTION_KEY, samples=index[is_here])
    return [int(draw * count) for draw, count in zip(draws.tolist(), num_captions, strict=True)]


def metadata_files(root: Path, files: Sequence[str]) -> list[str]:
    """List the metadata files beside an image folder's pictures and above them.

    Args:
        root: the folder.
        files: paths of pictures relative to it, with forward slashes.

    Returns:
        Paths relative to it, sorted.
    """
    folders = {parent for file in files for parent in _parents(file)}
    paths = (posixpath.join(folder, name) for folder in folders for name in METADATA_NAMES)
    return sorted(path for path in paths if os.path.lexists(root / path))


def _parents(file: str) -> Iterator[str]:
    """Yield the folders that a file lies in, from its own up to the root, which is empty."""
    while file:
        file = posixpath.dirname(file)
        yield file


def _check_metadata(path: Path) -> None:
    """Refuse a metadata file that is none, or that lies beside another."""
    if not is_regular(path):
        raise ValueError(f"{path} is no file that can be read; expected a file of captions")
    others = [path.with_name(name) for name in METADATA_NAMES if name != path.name]
    for other in filter(os.path.lexists, others):
        raise ValueError(f"{path} lies beside {other.name}; expected one of them")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping]]:
    """Yield a file's rows, one a line, with their numbers."""
    # Texts may hold characters at which splitlines would end a line too.
    for line, text in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: {text[:_NUM_SHOWN]!r} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: {text[:_NUM_SHOWN]!r}; expected an object with file_name")
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping]]:
    """Yield a file's rows with the numbers of their lines."""
    # Lines end here as csv's do, and at no other character.
    lines = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"it has other columns than {reader.fieldnames}")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} cannot be read: {error}") from error


def _field(row: Mapping, name: str, where: str) -> Any:
    """Return a field of a row."""
    if name not in row:
        raise ValueError(f"{where}: it has the fields {list(row)}; expected {name} among them")
    value = row[name]
    if name == "file_name" and not isinstance(value, str):
        raise ValueError(f"{where}: file_name is {value!r:.80}; expected the name of a file")
    return value
