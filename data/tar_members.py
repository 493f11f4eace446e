"""What a tar file holds, read from its headers; a file that holds less than it should is refused.

Python's reader stops without a word at a damaged header, at an end that is missing and at the first of several
archives joined. Here archives joined are read one after the other, and everything else is an error.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nextblock.files.regular import check_size, open_regular

from .reading import MAX_PICTURE_BYTES

_BLOCK = tarfile.BLOCKSIZE
_BLOCKS_AT_A_TIME = 2048
# Of the records that stand before a member for its long name and the like.
MAX_HEADER_BYTES = 1 << 20


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    offset: int
    """Where its content begins in the tar file; −1 for a link whose target is not there."""
    size: int


def scan_members(file: Path) -> list[Member]:
    """Find the files in a tar file, links to files among them, in their order.

    Args:
        file: one archive, not compressed, or several joined.

    Returns:
        The members.

    Raises:
        ValueError: naming the file and the place where it is damaged, cut off or no tar file.
    """
    return [member for entries in _archives(file) for member in _resolved(entries, file)]


def check_plain(file: Path) -> None:
    """Refuse a tar file of which a reader that knows neither links nor joined archives would pass over a part.

    Raises:
        ValueError: naming the file and what is in it.
    """
    archives = list(_archives(file))
    if len(archives) > 1:
        raise ValueError(
            f"{file} holds {len(archives)} archives joined, of which `datasets` reads the first alone; expected one a "
            "file, or data.source 'webdataset', which reads them all"
        )
    for entry in archives[0]:
        # It reads whole members, labels among them, and fills the holes of sparse ones.
        _check_whole(entry, file)
        check_size(entry.size, MAX_PICTURE_BYTES, f"{entry.name} of {file}")
    links = [entry.name for entry in archives[0] if not (entry.isreg() or entry.isdir())]
    if links:
        raise ValueError(
            f"{file} holds {len(links)} links such as {links[0]}, which `datasets` passes over; expected files, or "
            "data.source 'webdataset', which follows them"
        )


def _archives(file: Path) -> Iterator[list[tarfile.TarInfo]]:
    """Yield the entries of each of the archives in a tar file."""
    start = 0
    try:
        with open_regular(file) as stream:
            length = stream.seek(0, os.SEEK_END)
            if not length:
                raise ValueError(f"{file} is empty; expected a tar file")
            while start is not None:
                stream.seek(start)
                # The end is where the reader stopped, for whatever reason.
                entries, end = _entries(stream)
                yield entries
                _check_end(stream, start, end, length, entries, file)
                start = _next_header(stream, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{file} is no tar file that can be read: {error}") from error


def _entries(stream: BinaryIO) -> tuple[list[tarfile.TarInfo], int]:
    """Read the headers from where a stream is; return them and where they end."""
    try:
        with tarfile.TarFile(fileobj=_Headers(stream)) as archive:
            return archive.getmembers(), archive.offset
    except (ValueError, OverflowError, RecursionError) as error:  # what records that make no sense let it stumble over
        raise tarfile.ReadError(f"its headers make no sense ({error})") from error


class _Headers:
    """A tar file as Python's reader of headers asks for it, which would believe any size that one of them claims."""

    def __init__(self, stream: BinaryIO):
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        """Read a block, or the record that a header announces."""
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header announces {size} bytes of names; expected {MAX_HEADER_BYTES} at most")
        return self._read(size)


def _check_end(
    stream: BinaryIO, start: int, end: int, length: int, entries: list[tarfile.TarInfo], file: Path
) -> None:
    """Refuse an archive that ends with anything but its mark, a block of zeros."""
    stream.seek(end)
    block = stream.read(_BLOCK)
    if block and not any(block) and len(block) == _BLOCK:
        return
    found = f"{len(entries)} members were found in the {end - start} bytes before"
    if end >= length:
        raise ValueError(f"{file} is cut off: it ends at byte {length} without the mark of an archive's end; {found}")
    raise ValueError(f"{file} is damaged: there is no header at byte {end}, nor the mark of the archive's end; {found}")


def _next_header(stream: BinaryIO, position: int) -> int | None:
    """Return where the zeros end from a position on; None where nothing else follows."""
    stream.seek(position)
    while blocks := stream.read(_BLOCK * _BLOCKS_AT_A_TIME):
        rest = blocks.lstrip(b"\0")
        if rest:
            return position + (len(blocks) - len(rest)) // _BLOCK * _BLOCK
        position += len(blocks)
    return None


def _resolved(entries: list[tarfile.TarInfo], file: Path) -> list[Member]:
    """Return an archive's files, each link with the content of what it names."""
    by_name = {posixpath.normpath(entry.name): entry for entry in entries}
    members = []
    for entry in entries:
        if entry.isdir():
            continue
        target = _followed(entry, by_name)
        if target is not None:
            _check_whole(target, file)
        if target is None:
            members.append(Member(entry.name, -1, 0))
        elif not target.isdir():
            members.append(Member(entry.name, target.offset_data, target.size))
    return members


def _check_whole(entry: tarfile.TarInfo, file: Path) -> None:
    """Refuse a file of which an archive holds parts, and for the rest of it a claim that it is zeros."""
    if entry.sparse is not None:
        raise ValueError(f"{file}: {entry.name} is stored with holes (a sparse file); expected plain files")


def _followed(entry: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the file or folder that an entry is or leads to; None where there is none."""
    for _ in range(len(by_name) + 1):
        if entry.isreg() or entry.isdir():
            return entry
        if not (entry.islnk() or entry.issym()):
            return None
        folder = posixpath.dirname(entry.name) if entry.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, entry.linkname))
        found = by_name.get(name)
        if found is None or found is entry:
            return None
        entry = found
    return None
