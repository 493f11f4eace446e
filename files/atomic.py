"""Files that are whole or not there: written under a temporary name, flushed, checked, renamed; and their checksums."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Whose errors, and what in a RuntimeError of torch's, tell that a file could not be written.
_WRITERS = {"safetensors", "safetensors_rust"}
_TORCH_FAILURES = ("inline_container", "PytorchStreamWriter", "iostream error")


class UnwrittenError(OSError):
    """A file could not be written, as on a full disk; the message says which and why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever a writer raises because the disk is full or fails into an error that names the file.

    Args:
        path: what is written inside, a file or a folder.

    Raises:
        UnwrittenError: in place of it.
    """
    try:
        yield
    except UnwrittenError:
        raise
    except Exception as error:
        if not _is_failed_write(error):
            raise
        place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free = f"{shutil.disk_usage(place).free / 1e6:,.0f} MB"
        reason = getattr(error, "strerror", None) or error
        raise UnwrittenError(f"{path} could not be written: {reason}; {free} are free there") from error


def _is_failed_write(error: Exception) -> bool:
    """Tell whether an error is the disk's, by its class or package; torch tells by words alone."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _WRITERS:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_FAILURES)


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


def write_whole(path: Path, save: Callable[[BinaryIO], None], check: Callable[[Path], None] | None = None) -> None:
    """Write a file under a temporary name, flush it, check it, and rename it into place.

    Args:
        path: of the file; its folder exists.
        save: receives the open file.
        check: receives the temporary file's path, and raises an error where it is not what was to be written.

    Raises:
        UnwrittenError: if the disk is full or fails; nothing of the new file is left then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                save(file)
            flush_to_disk(temporary)
            if check is not None:
                check(temporary)
            temporary.replace(path)
            flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as `write_whole` does.

    A lone surrogate, which stands for a byte of a file's name that is no UTF-8, is written `\\udcNN` as in JSON.
    """
    content = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda file: file.write(content))


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder out of the way, to its name and `.damaged`, with a number where that is taken.

    Args:
        path: what is there.

    Returns:
        Where it now is.
    """
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return aside
