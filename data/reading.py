"""Which files are pictures, and one reader of them for every source.

A file is a picture by the end of its name; where the name says nothing, by its first bytes.
"""

import functools
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from nextblock.files.regular import check_size, open_regular

from .pixels import to_rgb

# All that hold pictures, whether or not they can be read here: what cannot is named by whoever reads it.
IMAGE_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        "3fr apng arw avif avifs blp bmp bpg bw cr2 cr3 crw cur dcx dds dib djvu dng emf eps exr fit fits flc fli gif "
        "hdr heic heics heif heifs hif icns ico iff im j2c j2k jfi jfif jif jp2 jpc jpe jpeg jpf jpg jpm jpx jxl jxr "
        "kdc mng mrw msp nef nrw orf pam pbm pcd pcx pef pfm pgm png pnm ppm psb psd qoi raf ras raw rgb rgba rw2 sgi "
        "sr2 srf srw svg svgz tga tif tiff vda vst wbmp wdp webp wmf x3f xbm xcf xpm"
    ).split()
)
# What lies beside pictures, often one file for each of them: nobody looks into these.
_OTHER_SUFFIXES = tuple(
    ".caption .cls .csv .html .json .jsonl .lock .log .md .npy .npz .parquet .pt .py .tar .tsv .txt .xml .yaml .yml "
    ".zip".split()
)
_FIRST_BYTES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+|RIFF.{4}WEBP|8BPS|qoif"
    rb"|P[1-7]\s|.{4}ftyp(avi[fs]|hei[cfmsx]|hev[cmsx]|mif1|msf1)|\0\0\0\x0cjP  |\0\0\0\x0cJXL |\xff\x4f\xff\x51|DDS |"
    rb"\xff\x0a|v/1\x01",
    re.DOTALL,
)
NUM_FIRST_BYTES = 16
# Of as many pixels as PIL opens, in 16 bits and not compressed.
MAX_PICTURE_BYTES = 1 << 30
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# All application segments but the kind of JPEG, the tags and the colour transform, and comments.
_JPEG_METADATA = re.compile(rb"\xff[\xe2-\xed\xef\xfe]")
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
_PNG_TAGS = re.compile(rb"eXIf|(iTXt|zTXt|tEXt)(XML:com\.adobe\.xmp|Raw profile type exif)\0")
_MAX_TAG_SIZE = 1 << 16


def is_picture_name(name: str) -> bool | None:
    """Tell a picture by its name.

    Args:
        name: of a file, with or without folders.

    Returns:
        Whether it is one; None where the name does not say.
    """
    name = name.lower()
    if name.endswith(IMAGE_SUFFIXES):
        return True
    return False if name.endswith(_OTHER_SUFFIXES) else None


def starts_as_picture(first_bytes: bytes) -> bool:
    """Tell a picture by its first `NUM_FIRST_BYTES` bytes."""
    return _FIRST_BYTES.match(first_bytes) is not None


def is_picture_file(file: str | Path) -> bool:
    """Tell whether a file is a picture, by its name or else by its first bytes."""
    says = is_picture_name(str(file))
    if says is None:
        with open_regular(file) as stream:
            return starts_as_picture(stream.read(NUM_FIRST_BYTES))
    return says


def read_picture(file: str | Path | BinaryIO, max_pixels: int | None = None) -> Image.Image:
    """Read a picture, whatever its kind, as upright RGB; see `nextblock.data.pixels.to_rgb`.

    Args:
        file: its path, or an open file.
        max_pixels: a larger picture is not unpacked; None leaves it to PIL, which stops at 179 million.

    Returns:
        RGB picture.

    Raises:
        Exception: what PIL's readers raise at a file that is broken, and `UnreadableModeError`.
        NotRegularError, TooLargeError: see `nextblock.files.regular`.
    """
    if isinstance(file, str | Path):
        with open_regular(file) as stream:
            return read_picture(stream, max_pixels)
    return _read(file, functools.partial(_opened, max_pixels=max_pixels))


def picture_header(path: str | Path) -> tuple[str, tuple[int, int]]:
    """Return a picture's kind, "png" say, and its (H, W) before it is turned upright, without unpacking it.

    Args:
        path: of the picture.

    Raises:
        Exception: see `read_picture`.
    """
    with open_regular(path) as stream:
        return _read(stream, _header)


def _read(file: BinaryIO, read: Callable[[BinaryIO], Any]) -> Any:
    """Read a picture as `read` does, once more without what lies beside its pixels where that fails."""
    check_size(file.seek(0, os.SEEK_END), MAX_PICTURE_BYTES, "the file")
    file.seek(0)
    try:
        return read(file)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception:
        # PIL refuses good pictures for what lies beside the pixels: megabytes of text, a damaged colour profile.
        file.seek(0)
        pixels_alone = _without_metadata(file.read())
        if pixels_alone is None:
            raise
        return read(io.BytesIO(pixels_alone))


def _header(file: BinaryIO) -> tuple[str, tuple[int, int]]:
    """Read what `picture_header` returns."""
    with Image.open(file, formats=_formats()) as image:
        return image.format.lower(), (image.height, image.width)


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """Return the (width, height) that a picture claims, without unpacking it; raises what PIL's readers raise."""
    with Image.open(file, formats=_formats()) as image:
        return image.size


def _opened(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    """Open a picture with PIL."""
    with Image.open(file, formats=_formats()) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels; expected {max_pixels} at most")
        return to_rgb(image)


@functools.cache
def _formats() -> list[str]:
    """PIL's formats but PostScript, a programme that another programme would run."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _without_metadata(content: bytes) -> bytes | None:
    """Copy of a PNG or JPEG what its pixels and its orientation need; None where it has nothing else, or is neither."""
    if content.startswith(_PNG_SIGNATURE):
        parts, is_needed = _png_parts(content), _is_needed_in_png
    elif content.startswith(_JPEG_SIGNATURE):
        parts, is_needed = _jpeg_parts(content), _is_needed_in_jpeg
    else:
        return None
    kept = b"".join(part for part in parts if is_needed(part))
    return kept if len(kept) < len(content) else None


def _png_parts(content: bytes) -> Iterator[bytes]:
    """Yield the signature and the chunks."""
    position = len(_PNG_SIGNATURE)
    yield content[:position]
    while position + 8 <= len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        yield content[position:end]
        position = end


def _is_needed_in_png(part: bytes) -> bool:
    """Whether a chunk is of the pixels, or a whole one that may hold the orientation."""
    if part == _PNG_SIGNATURE or part[4:8] in _PNG_PIXELS:
        return True
    is_tag = _PNG_TAGS.match(part, 4) and len(part) < _MAX_TAG_SIZE
    return bool(is_tag) and zlib.crc32(part[4:-4]).to_bytes(4, "big") == part[-4:]


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """Yield the first marker, the segments before the pixels, and all the rest."""
    position = 2
    yield content[:position]
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] not in (b"\xda", b""):
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        yield content[position:end]
        position = end
    yield content[position:]


def _is_needed_in_jpeg(part: bytes) -> bool:
    """Whether a segment is anything but a colour profile, a preview, a comment or the like."""
    return _JPEG_METADATA.match(part) is None
