"""What files claim to hold is checked before memory is taken for it: archives, labels, pictures, shards, manifests."""

import io
import json
import tarfile
import tracemalloc
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.reading import MAX_PICTURE_BYTES, read_picture
from nextblock.data.token_shards import read_footer, read_shard
from nextblock.data.tokens import TokenManifest
from nextblock.data.unreadable import UnreadableImageError
from nextblock.data.usable import find_unreadable
from nextblock.files.atomic import file_sha256
from nextblock.files.regular import TooLargeError

HUGE = 100 << 30


@pytest.fixture(autouse=True)
def little_memory():
    """No test takes more than 64 MB of Python's memory."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **pax) -> bytes:
    """A tar header that claims a size."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.pax_headers = size, kind, pax
    return entry.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content + bytes(-len(content) % 512)


def sparse(name: str) -> bytes:
    """GNU's sparse file: no bytes and a real size of 100 GB."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[483:495] = b"\x80" + HUGE.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
TARS = {
    "sparse label": (member("a.png", png()) + sparse("a.cls") + END, "a.cls is stored with holes"),
    "sparse label of PAX": (
        member("a.png", png())
        + header("a.cls", 0, **{"GNU.sparse.size": str(HUGE), "GNU.sparse.map": f"{HUGE},0"})
        + END,
        "a.cls is stored with holes",
    ),
    "beyond the end": (member("a.png", png()) + header("b.png", HUGE) + END, "no tar file that can be read|cut off"),
    "long label": (member("a.png", png()) + member("a.cls", b"1" * 70_000) + END, "a.cls of .* has 70000 bytes"),
    "spaces": (member("a.png", png()) + member("a.cls", b"1" + b" " * 20_000) + END, "a.cls of .* has 20001 bytes"),
    "long name": (header("././@LongLink", HUGE, tarfile.GNUTYPE_LONGNAME) + END, "announces 107374182400 bytes"),
    "attributes": (header("p", HUGE, tarfile.XHDTYPE) + END, "announces 107374182400 bytes"),
    "all attributes": (header("p", HUGE, tarfile.XGLTYPE) + END, "announces 107374182400 bytes"),
    "names of names": (header("p", 512, tarfile.GNUTYPE_LONGNAME) * 2 * 3000 + END, "no tar file that can be read"),
    "broken map": (
        header("a.cls", 512, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}) + bytes(512),
        "no tar file that can be read",
    ),
}


# To `datasets` any member is a column, and what a number is Python's affair.
@pytest.mark.parametrize(
    ("source", "kind"),
    [("webdataset", kind) for kind in TARS]
    + [("datasets", kind) for kind in TARS if kind not in ("long label", "spaces")],
)
def test_archives_that_claim_more_than_they_hold_are_refused(kind, source, tmp_path):
    content, message = TARS[kind]
    (tmp_path / "train.tar").write_bytes(content)
    if source == "datasets":
        message = f"{message}|holds .* links"
    with pytest.raises(ValueError, match=message):
        load_source(ImageDataConfig(source=source, path=str(tmp_path), label_column="cls"), "train")


def test_a_picture_too_large_for_one_is_rejected_alone(tmp_path):
    with open(tmp_path / "train.tar", "wb") as file:
        file.write(member("a.png", png()) + header("b.png", MAX_PICTURE_BYTES + 512))
        file.seek(MAX_PICTURE_BYTES + 512, 1)
        file.write(END)
    source = load_source(ImageDataConfig(source="webdataset", path=str(tmp_path)), "train")
    (entry,) = find_unreadable(source, range(2))
    assert (entry["image_id"], entry["reason"]) == ("train.tar/b.png", "too large")
    with pytest.raises(ValueError, match="b.png of .* has 1073742336 bytes"):
        load_source(ImageDataConfig(source="datasets", path=str(tmp_path)), "train")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_a_picture_that_claims_more_pixels_than_any_is_not_unpacked(size, tmp_path):
    content = bytearray(png())
    content[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(content)
    source = load_source(ImageDataConfig(source="folder", path=str(tmp_path)), "train")
    with pytest.raises(UnreadableImageError) as error:
        source.image(0)
    assert error.value.reason == "decompression bomb"


def test_pixels_are_bounded_on_request():
    assert read_picture(io.BytesIO(png()), max_pixels=16).size == (4, 4)
    with pytest.raises(Image.DecompressionBombError, match="4×4 pixels; expected 15 at most"):
        read_picture(io.BytesIO(png()), max_pixels=15)


def test_a_programme_that_draws_a_picture_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    source = load_source(ImageDataConfig(source="folder", path=str(tmp_path)), "train")
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        source.image(0)


def test_class_names_beyond_any_name_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    rows = {"image": [{"bytes": png(), "path": None}] * 2, "label": ["cat", "x" * 2_000_000]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="label_column='label' holds a name of 2000000 characters, 'xxx"):
        load_source(ImageDataConfig(source="datasets", path=str(tmp_path / "rows")), "train")
    (tmp_path / "names.txt").write_text("y" * 2000)
    config = ImageDataConfig(source="folder", path=str(tmp_path), class_names=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="names.txt holds a name of 2000 characters"):
        load_source(config, "train")
    with open(tmp_path / "names.txt", "wb") as file:
        file.truncate(HUGE)
    with pytest.raises(TooLargeError, match="names.txt has 107374182400 bytes"):
        load_source(config, "train")


def test_a_shard_that_claims_more_values_than_its_bytes_mean_is_not_unpacked(tmp_path, monkeypatch):
    path, length = tmp_path / "x.parquet", 40_000
    idx = pa.ListArray.from_arrays(np.array([0, length], np.int32), np.zeros(length, np.uint16))
    pq.write_table(pa.table({"idx": idx, "label": [0], "view": pa.array([0], pa.int32())}), path)
    assert read_shard(path, 1, file_sha256(path)).idx.shape == (1, length)
    monkeypatch.setattr("nextblock.data.token_shards._SMALL_BYTES", 0)
    monkeypatch.setattr("nextblock.data.token_shards._MAX_EXPANSION", 8)
    with pytest.raises(ValueError, match="x.parquet claims 40002 values; expected [0-9]* at most in a file"):
        read_shard(path, 1, file_sha256(path))
    with pytest.raises(ValueError, match="has 1 rows; expected 1000000000000 as in its manifest"):
        read_shard(path, 10**12, file_sha256(path))


def test_a_list_of_rejects_beyond_reading_is_named(tmp_path):
    table = pa.table({"idx": [1]}).replace_schema_metadata({"nextblock.rejected": "[" * 5000})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet has a list of rejected images that is damaged"):
        read_footer(tmp_path / "x.parquet")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format_version": ' + "1" * 1_000_000 + "}"])
def test_a_manifest_beyond_reading_is_named(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        TokenManifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 10**12}))
    with pytest.raises(ValueError, match="format_version 1000000000000; expected"):
        TokenManifest.load(tmp_path)
