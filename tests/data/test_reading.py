"""One reader of pictures: every kind looks to a pipeline as it does to training, and metadata spoil none."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, load_source
from nextblock.data.reading import is_picture_name, read_picture, starts_as_picture
from nextblock.pipelines.given_images import images_to_pixel_values, split_images

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 16, 3), dtype=np.uint16)


def saved(picture: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def deep_png(levels: np.ndarray, kind: int, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits, which PIL writes of grey alone."""
    height, width = levels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in levels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    parts += [chunk(b"tRNS", clear)] * bool(clear) + [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_chunks(png: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    place = len(png) - 12 if at_end else 33
    return png[:place] + b"".join(chunks) + png[place:]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def palette(**options) -> bytes:
    picture = Image.fromarray((np.arange(192, dtype=np.uint8) % 4).reshape(12, 16), "P")
    picture.putpalette([9, 8, 7, 0, 255, 0, 1, 2, 3, 250, 120, 60])
    return saved(picture, **options)


def kinds() -> dict[str, bytes]:
    picture, alpha = Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0])
    clear, grey = picture.copy(), picture.convert("L")
    clear.putalpha(alpha)
    return {
        "rgb.png": saved(picture),
        "grey 16.png": saved(Image.fromarray(DEEP[..., 0])),
        "grey 16.tif": saved(Image.fromarray(DEEP[..., 0]), "TIFF"),
        "grey 16 clear.png": deep_png(DEEP[..., 0], 0, struct.pack(">H", int(DEEP[3, 4, 0]))),
        "grey alpha 16.png": deep_png(DEEP[..., :2], 4),
        "rgb 16.png": deep_png(DEEP, 2),
        "rgb 16 clear.png": deep_png(DEEP, 2, DEEP[3, 4].astype(">u2").tobytes()),
        "rgba 16.png": deep_png(np.concatenate([DEEP, DEEP[..., :1]], 2), 6),
        "int32.tif": saved(Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF"),
        "alpha.png": saved(clear),
        "alpha.webp": saved(clear, "WEBP", lossless=True),
        "grey alpha.png": saved(Image.merge("LA", (grey, alpha))),
        "grey clear.png": saved(grey, transparency=int(np.asarray(grey)[3, 4])),
        "rgb clear.png": saved(picture, transparency=tuple(COLOURS[3, 4].tolist())),
        "palette.png": palette(),
        "palette clear.png": palette(transparency=1),
        "palette bytes.png": palette(transparency=bytes([0, 85, 170, 255])),
        "palette.gif": saved(picture.convert("P"), "GIF", transparency=3),
        "cmyk.jpg": saved(picture.convert("CMYK"), "JPEG"),
        "cmyk.tif": saved(picture.convert("CMYK"), "TIFF"),
        "bits.png": saved(picture.convert("1")),
        **{f"turned {n}.jpg": saved(picture, "JPEG", exif=turned(n)) for n in range(1, 9)},
        "turned.png": saved(picture, exif=turned(6)),
        "turned.tif": saved(picture, "TIFF", exif=turned(6)),
        "turned.webp": saved(clear, "WEBP", lossless=True, exif=turned(8)),
        "turned 16.png": saved(Image.fromarray(DEEP[..., 0]), exif=turned(6)),
    }


@pytest.mark.parametrize("name", kinds())
def test_a_pipeline_sees_what_training_sees(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(kinds()[name])
    source = load_source(ImageDataConfig(source="folder", path=str(tmp_path)), "train")
    trained = ImageDataset(source, (8, 8), TransformConfig(), seed=0)[0]["pixel_values"]
    with Image.open(file) as picture:
        given = images_to_pixel_values("image", split_images("image", picture), (8, 8), "crop")
    assert torch.equal(given[0], trained)
    assert trained.std() > 0.1


def test_deep_pictures_keep_their_levels_and_what_is_clear_becomes_white():
    clear = np.zeros((12, 16), bool)
    clear[3, 4] = True
    for channels, kind in ((DEEP[..., 0], 0), (DEEP, 2)):
        got = np.asarray(read_picture(io.BytesIO(deep_png(channels, kind))), float)
        expected = channels[..., None].repeat(3, 2) / 257 if channels.ndim == 2 else channels / 257
        assert np.abs(got - expected).max() < 1
        key = channels[3:4, 4].astype(">u2").tobytes()
        seen = np.asarray(read_picture(io.BytesIO(deep_png(channels, kind, key))))
        assert (seen[clear] == 255).all() and np.array_equal(seen[~clear], got[~clear])


def test_palettes_and_tags_agree_with_their_plain_pictures():
    over = {i: np.array(rgb) for i, rgb in enumerate([[9, 8, 7], [0, 255, 0], [1, 2, 3], [250, 120, 60]])}
    seen = np.asarray(read_picture(io.BytesIO(palette(transparency=bytes([0, 85, 170, 255])))))[0, :4]
    for i, opacity in enumerate((0, 85, 170, 255)):
        assert np.abs(seen[i] - (over[i] * opacity + 255 * (255 - opacity)) / 255).max() <= 1
    upright = np.asarray(read_picture(io.BytesIO(kinds()["turned.png"])))
    assert np.array_equal(upright, np.rot90(COLOURS, -1))
    assert np.array_equal(np.asarray(read_picture(io.BytesIO(kinds()["turned.tif"]))), upright)


def test_tags_that_cannot_be_rewritten_turn_the_picture_all_the_same():
    """A tag of a type that PIL reads and cannot write, and tags that it cannot read at all."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0131, 3, 1, b"\1\0\0\0"), (0x9000, 2, 1, b"\1\0\0\0")]
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    picture, png = Image.fromarray(COLOURS), saved(Image.fromarray(COLOURS))
    with_bad_tag = Image.open(io.BytesIO(with_chunks(png, chunk(b"eXIf", block))))
    assert np.array_equal(np.asarray(split_images("image", with_bad_tag)[0]), np.rot90(COLOURS, -1))
    for exif in (b"Exif\0\0II*\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(9)):
        assert np.array_equal(read_picture(io.BytesIO(with_chunks(png, chunk(b"eXIf", exif[6:])))), COLOURS)
        jpeg = saved(picture, "JPEG")
        broken = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
        assert np.array_equal(read_picture(io.BytesIO(broken)), Image.open(io.BytesIO(jpeg)))


def test_an_exif_value_that_fails_to_be_written_is_none_of_our_business(monkeypatch):
    content = kinds()["turned.png"]

    def fails(*_):
        raise TypeError("a tag that cannot be written")

    monkeypatch.setattr(Image.Exif, "tobytes", fails)
    assert np.array_equal(read_picture(io.BytesIO(content)), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("at_end", [False, True])
def test_texts_of_a_png_never_matter(at_end, tmp_path):
    png, exif = kinds()["rgb.png"], turned(6).tobytes()[6:]
    long = zlib.compress(b"a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    texts = {
        "long": chunk(b"zTXt", b"words\0\0" + long),
        "international": chunk(b"iTXt", b"words\0\1\0\0\0" + long),
        "profile": chunk(b"iCCP", b"p\0\0" + long),
        "many": chunk(b"tEXt", b"words\0" + bytes(1 << 20)) * 80,
        "damaged": chunk(b"tEXt", b"words\0abc")[:-1] + b"\0",
    }
    for name, text in texts.items():
        assert np.array_equal(read_picture(io.BytesIO(with_chunks(png, text, at_end=at_end))), COLOURS), name
        (tmp_path / "x.png").write_bytes(with_chunks(with_chunks(png, text, at_end=at_end), chunk(b"eXIf", exif)))
        assert np.array_equal(read_picture(tmp_path / "x.png"), np.rot90(COLOURS, -1)), name
    with pytest.raises(OSError, match="truncated"):
        read_picture(io.BytesIO(with_chunks(png, texts["long"])[:-100]))


def test_damaged_segments_of_a_jpeg_never_matter():
    jpeg, exif = saved(Image.fromarray(COLOURS), "JPEG"), b"Exif\0\0" + turned(6).tobytes()[6:]
    expected = np.asarray(Image.open(io.BytesIO(jpeg)))
    damaged = [(0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0II*\0"), (0xED, b"Photoshop 3.0\08BIM"), (0xFE, b"\xff")]
    for marker, content in damaged:
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        tags = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        assert np.array_equal(read_picture(io.BytesIO(jpeg[:2] + segment + jpeg[2:])), expected)
        assert np.array_equal(read_picture(io.BytesIO(jpeg[:2] + segment + tags + jpeg[2:])), np.rot90(expected, -1))
    with pytest.raises(OSError, match="truncated"):
        read_picture(io.BytesIO(jpeg[:-100]))


def test_pictures_are_told_by_name_and_else_by_their_first_bytes():
    assert [is_picture_name(name) for name in ("a.PNG", "x/b.heic", "c.txt", "d.dat", "e")] == [1, 1, 0, None, None]
    for content in kinds().values():
        assert starts_as_picture(content[:16])
    for kind in ("BMP", "PPM", "JPEG2000", "AVIF", "GIF"):
        assert starts_as_picture(saved(Image.fromarray(COLOURS), kind)[:16])
    for content in (b"", b"this is text, no picture", b"II, the second", bytes(16), b"PK\3\4", b"BM is no bitmap"):
        assert not starts_as_picture(content[:16])
