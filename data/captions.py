"""Captions of images: the metadata files of image folders, what is taken for captions, and one drawn of several.

Metadata files are those of `datasets`: `metadata.jsonl` or `metadata.csv`, which name each image by `file_name`.
Legend: N images.
"""

import csv
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
    folders = {parent for file in files for parent in _parents(file)}
    by_file: dict[str, Any] = {}
    num_files = 0
    pictures = set(files)
    for folder in sorted(folders):
        for path, rows in _metadata_in(root, folder):
            num_files += 1
            for line, row in rows:
                file = posixpath.normpath(posixpath.join(folder, _field(row, "file_name", path, line)))
                caption = _field(row, column, path, line)
                if file not in pictures:
                    if not os.path.exists(root / file):
                        raise ValueError(f"{path}, line {line}: there is no file {file!r:.200} in {root}; expected one")
                    continue
                if file in by_file:
                    raise ValueError(f"{path}, line {line}: {file!r:.200} is named twice; expected one line for a file")
                by_file[file] = caption
    if not num_files:
        raise ValueError(
            f"caption_column={column!r}: {root} has no {' or '.join(METADATA_NAMES)} beside its images or above them; "
            "expected one with the fields file_name and " + column
        )
    return check_captions([by_file.get(file) for file in files], [escaped_name(file) for file in files], str(root))


def draw_captions(captions: Sequence[Sequence[str]], seed: int, epochs: torch.Tensor, index: torch.Tensor) -> list[str]:
    """Draw one of each image's captions, as a pure function of (seed, epoch, image).

    Args:
        captions: N, at least one each.
        seed: key.
        epochs: (N,) int64.
        index: (N,) int64, the images' numbers.

    Returns:
        N captions.
    """
    draws = torch.empty(len(index), dtype=torch.float64)
    for epoch in epochs.unique().tolist():
        is_here = epochs == epoch
        draws[is_here] = keyed_uniform(seed, epoch, samples=index[is_here])
    return [texts[int(draw * len(texts))] for texts, draw in zip(captions, draws.tolist(), strict=True)]


def _parents(file: str) -> Iterator[str]:
    """Yield the folders that a file lies in, from its own up to the root, which is empty."""
    while file:
        file = posixpath.dirname(file)
        yield file


def _metadata_in(root: Path, folder: str) -> Iterator[tuple[Path, Iterator[tuple[int, Mapping]]]]:
    """Yield the metadata file of a folder, if there is one, with its numbered rows."""
    paths = [root / folder / name for name in METADATA_NAMES]
    found = [path for path in paths if os.path.lexists(path)]
    if len(found) > 1:
        raise ValueError(f"{found[0]} lies beside {found[1].name}; expected one of them")
    for path in found:
        if not is_regular(path):
            raise ValueError(f"{path} is no file that can be read; expected a file of captions")
        yield path, (_json_rows if path.suffix == ".jsonl" else _csv_rows)(path)


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping]]:
    """Yield a file's rows, one a line, with their numbers."""
    # Texts may hold characters at which splitlines would end a line too.
    for line, text in enumerate(read_text(path).split("\n"), 1):
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
    reader = csv.DictReader(read_text(path).removeprefix("\ufeff").splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"it has other columns than {reader.fieldnames}")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} cannot be read: {error}") from error


def _field(row: Mapping, name: str, path: Path, line: int) -> Any:
    """Return a field of a row."""
    if name not in row:
        raise ValueError(f"{path}, line {line}: it has the fields {list(row)}; expected {name} among them")
    value = row[name]
    if name == "file_name" and not isinstance(value, str):
        raise ValueError(f"{path}, line {line}: file_name is {value!r:.80}; expected the name of a file")
    return value
