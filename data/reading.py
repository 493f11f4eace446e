"""Which files are pictures, and one reader of them for every source.

A file is a picture by the end of its name; where the name says nothing, by its first bytes.
"""

import io
import re
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

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
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pixels, and how they are turned; everything else is text, times and colour profiles.
_PNG_PARTS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
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


def read_picture(file: str | Path | BinaryIO) -> Image.Image:
    """Read a picture, whatever its kind, as upright RGB; see `nextblock.data.pixels.to_rgb`.

    Args:
        file: its path, or an open file.

    Returns:
        RGB picture.

    Raises:
        Exception: what PIL's readers raise at a file that is broken, and `UnreadableModeError`.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception:
        # PIL refuses a good PNG for its texts: megabytes of them, or a damaged one.
        pixels_alone = None if isinstance(file, str | Path) and not Path(file).is_file() else _png_pixels(file)
        if pixels_alone is None:
            raise
        with Image.open(pixels_alone) as image:
            return to_rgb(image)


def _png_pixels(file: str | Path | BinaryIO) -> BinaryIO | None:
    """Copy of a PNG what its pixels need; None where it has nothing else, or is no PNG."""
    if isinstance(file, str | Path):
        content = Path(file).read_bytes()
    else:
        file.seek(0)
        content = file.read()
    if not content.startswith(_PNG_SIGNATURE):
        return None
    kept, position, has_others = [_PNG_SIGNATURE], len(_PNG_SIGNATURE), False
    while position + 8 <= len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        part = content[position:end]
        is_tag = _PNG_TAGS.match(part, 4) and len(part) < _MAX_TAG_SIZE
        if part[4:8] in _PNG_PARTS or (is_tag and zlib.crc32(part[4:-4]).to_bytes(4, "big") == part[-4:]):
            kept.append(part)
        else:
            has_others = True
        position = end
    return io.BytesIO(b"".join(kept)) if has_others else None
