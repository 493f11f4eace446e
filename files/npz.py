"""Arrays in .npz files, read some rows at a time: in place where they are stored, as a stream where they are deflated.

What a header claims is compared with what the archive holds before memory is taken. Legend: N rows of an array.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .regular import check_size, open_regular

# What reading an archive or array that is cut short or damaged may raise; a RuntimeError is a password.
DAMAGE = (
    OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_CHUNK_BYTES = 1 << 20
# A zip member begins with 30 bytes, of which the last four count those of its name and of extra fields.
_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclass(frozen=True)
class NpzArray:
    """One array of an .npz file, without its content.

    Args:
        path: of the file.
        key: the array's name there.
        shape: of the array, rows first.
        dtype: of the array.
        offset: of its first byte in the file; None where it is deflated.
        num_header_bytes: before its first byte in the archive's member.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    num_header_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, max_bytes: int) -> np.ndarray:
        """Read all of it, `max_bytes` at most; raises a ValueError that names the file."""
        check_size(self.shape[0] * self.row_bytes, max_bytes, f"{self.key} in {self.path}")
        return next(self.rows([range(self.shape[0])]))

    def rows(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        """Yield the rows of each range, which ascend, with no more in memory than one range.

        Raises:
            ValueError: if the file is damaged.
        """
        with _reading(self.path), open_regular(self.path) as file:
            if self.offset is not None:
                yield from self._read_ranges(file, self.offset, ranges)
                return
            with zipfile.ZipFile(file) as archive, archive.open(f"{self.key}.npy") as member:
                yield from self._read_ranges(member, self.num_header_bytes, ranges)

    def _read_ranges(self, stream: BinaryIO, start: int, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        """Read ranges of rows from a stream in which the first row begins at `start`."""
        for each in ranges:
            rows = np.empty((len(each), *self.shape[1:]), self.dtype)
            stream.seek(start + each.start * self.row_bytes)
            _fill(stream, memoryview(rows.reshape(-1).view(np.uint8)))
            yield rows

    def check_content(self) -> None:
        """Read all of it once and compare with the archive's checksum.

        Raises:
            ValueError: if they differ.
        """
        with _reading(self.path), open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
            with archive.open(f"{self.key}.npy") as member:
                while member.read(_CHUNK_BYTES):
                    pass


def npz_arrays(path: Path, wanted: Sequence[str]) -> dict[str, NpzArray]:
    """Look up arrays of an .npz file.

    Args:
        path: of it.
        wanted: names of arrays; others are not looked at.

    Returns:
        Those of them that are there, by name.

    Raises:
        ValueError: if the file is damaged or none, or an array is not as `numpy.savez` writes it, or claims another
            size than it has.
    """
    with _reading(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        held = {entry.filename: entry for entry in archive.infolist()}
        return {key: _look_up(archive, held[f"{key}.npy"], file, path, key) for key in wanted if f"{key}.npy" in held}


def npz_keys(path: Path) -> list[str]:
    """Name the arrays of an .npz file, which `npz_arrays` has opened."""
    with _reading(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _look_up(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: BinaryIO, path: Path, key: str) -> NpzArray:
    """Read an array's header and compare it with its member."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _READ_HEADER:
            raise ValueError(f"{path}: {key} is of version {version}; expected one of {list(_READ_HEADER)}")
        shape, is_fortran, dtype = _READ_HEADER[version](member)
        num_header_bytes = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: {key} is an array of Python objects; expected numbers")
    claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - num_header_bytes
    if claimed != held:
        raise ValueError(f"{path}: the header of {key} claims {claimed} bytes, its member {held}; expected as many")
    if not shape or is_fortran and len(shape) > 1:
        kind = "column by column" if shape else "a single number"
        raise ValueError(f"{path}: {key} is {kind}; expected an array, row by row")
    if info.compress_type != zipfile.ZIP_STORED:
        return NpzArray(path, key, shape, dtype, None, num_header_bytes)
    file.seek(info.header_offset)
    start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{path} ends within {key}; expected a whole file")
    return NpzArray(path, key, shape, dtype, start + num_header_bytes, num_header_bytes)


def _fill(stream: BinaryIO, view: memoryview) -> None:
    """Read as many bytes as a buffer holds."""
    while len(view):
        num_read = stream.readinto(view)
        if not num_read:
            raise EOFError("it ends too soon")
        view = view[num_read:]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in whatever damage makes of reading it."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read: {error}; expected an .npz file that is whole") from error
