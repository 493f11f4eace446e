"""Files that are whole or not there: written under a temporary name, flushed, renamed; and their checksums."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's or folder's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name, flush it, and rename it into place.

    Args:
        path: of the file; its folder exists.
        save: receives the open file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        save(file)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `write_whole` does.

    A lone surrogate, which stands for a byte of a file's name that is no UTF-8, is written `\\udcNN` as in JSON.
    """
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
