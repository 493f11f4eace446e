"""Bad files of many kinds: each image ends in a shard or in the reject list, and the job says why."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from nextblock.data.reading import MAX_PICTURE_BYTES
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.data.unreadable import REASONS, UnreadableImageError, rejection_reason
from nextblock.files.names import restored_name
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.verify import damage_of

RNG = np.random.default_rng(0)


def encoded(file_format: str, mode: str = "RGB", size=(40, 30), **options) -> bytes:
    picture = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def encoded_deep() -> bytes:
    """A grey PNG of 16 bits."""
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 65536, (30, 40), dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG that says that it has 20 000 × 20 000 pixels."""
    file = io.BytesIO()
    PngImagePlugin.putchunk(file, b"IHDR", np.array([20000, 20000], ">u4").tobytes(), b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + file.getvalue() + encoded("PNG")[33:]


def flipped_byte(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


BAD = {
    "empty.png": (b"", "corrupt"),
    "text.jpg": (b"this is no picture", "corrupt"),
    "zeros.png": (bytes(500), "corrupt"),
    "header.png": (encoded("PNG")[:8], "corrupt"),
    "flipped.png": (flipped_byte(encoded("PNG"), 60), "corrupt"),
    "half.gif": (encoded("GIF")[:20], "corrupt"),
    "html.webp": (b"<html>404</html>", "corrupt"),
    "half.png": (encoded("PNG")[:400], "truncated"),
    "half.jpg": (encoded("JPEG")[:700], "truncated"),
    "half.bmp": (encoded("BMP")[:300], "truncated"),
    "half.tif": (encoded("TIFF")[:600], "truncated"),
    "half.ppm": (encoded("PPM")[:300], "truncated"),
    "narrow.png": (encoded("PNG", size=(3, 30)), "too small"),
    "dot.gif": (encoded("GIF", size=(1, 1)), "too small"),
    "float.tif": (encoded("TIFF", "F"), "unreadable mode"),
    "bomb.png": (bomb(), "decompression bomb"),
}
GOOD = {
    "rgb.jpg": encoded("JPEG"),
    "grey.png": encoded("PNG", "L"),
    "palette.gif": encoded("GIF", "P"),
    "alpha.png": encoded("PNG", "RGBA"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "bits.png": encoded("PNG", "1"),
    "deep.png": encoded_deep(),
}


@pytest.fixture
def bad_images(tmp_path) -> Path:
    root = tmp_path / "images" / "train"
    root.mkdir(parents=True)
    for name, (content, _) in BAD.items():
        (root / name).write_bytes(content)
    for name, content in GOOD.items():
        (root / name).write_bytes(content)
    os.symlink(tmp_path / "nowhere.png", root / "dangling.png")
    with open(root / "huge.png", "wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)  # all of it a hole
    return root.parent


@pytest.fixture
def arguments(tokenizer_dir, tmp_path) -> list:
    return [
        *("--tokenizer", tokenizer_dir, "--data.eval_split", "null", "--cpu", "true", "--has_flipped_view", "true"),
        *("--rows_per_shard", 10, "--batch_size", 4, "--min_image_side", 8, "--output_dir", tmp_path / "tokens"),
    ]


def test_a_folder_of_bad_files_is_accounted_for(bad_images, arguments, run_here, tmp_path):
    source = ["--data.source", "folder", "--data.path", bad_images]
    run_here(tokenize, TokenizeConfig, *arguments, *source, "--on_error", "skip", "--num_workers", 1)
    lines = [json.loads(line) for line in (tmp_path / "tokens" / "rejected.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"split", "image_id", "reason", "detail"} for line in lines)
    reasons = {line["image_id"]: line["reason"] for line in lines}
    expected = {f"train/{name}": reason for name, (_, reason) in BAD.items()}
    assert reasons == expected | {"train/dangling.png": "missing", "train/huge.png": "too large"}
    assert set(reasons.values()) == set(REASONS) and len(lines) == len(BAD) + 2
    # Nothing that differs from machine to machine.
    assert str(tmp_path) not in json.dumps(lines) and " 0x" not in json.dumps(lines)
    entry = TokenManifest.load(tmp_path / "tokens").splits["train"]
    assert (entry["num_images"], entry["num_rejected"], entry["num_views"]) == (len(BAD) + 2 + len(GOOD), 18, 2)
    tokens = TokenDataset(tmp_path / "tokens", "train", samples_views=True)
    assert len(tokens) == len(GOOD)
    tables = [pq.read_table(tmp_path / "tokens" / shard["file"]) for shard in entry["shards"]]
    ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
    assert ids == 2 * sorted(f"train/{name}" for name in GOOD)
    assert damage_of(tmp_path / "tokens") == []


def test_a_job_stops_at_a_bad_file_and_goes_on_when_told_to_skip(bad_images, arguments, run_here, tmp_path):
    source = ["--data.source", "folder", "--data.path", bad_images]
    message = r"bomb.png: DecompressionBombError.*\(decompression bomb; on_error=skip leaves"
    with pytest.raises(ValueError, match=message):
        run_here(tokenize, TokenizeConfig, *arguments, *source)
    run_here(tokenize, TokenizeConfig, *arguments, *source, "--on_error", "skip")
    assert damage_of(tmp_path / "tokens") == []


def test_bad_members_of_tar_files_are_listed_alike(bad_images, arguments, run_here, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in {"a.png": GOOD["grey.png"], "b.png": BAD["half.png"][0], "c.gif": b""}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    source = ["--data.source", "webdataset", "--data.path", tmp_path]
    run_here(tokenize, TokenizeConfig, *arguments, *source, "--on_error", "skip")
    lines = [json.loads(line) for line in (tmp_path / "tokens" / "rejected.jsonl").read_text().splitlines()]
    found = {line["image_id"]: line["reason"] for line in lines}
    assert found == {"train.tar/b.png": "truncated", "train.tar/c.gif": "corrupt"}


def test_names_that_are_no_utf_8_are_listed_and_tokenized(arguments, run_here, tmp_path):
    names = {b"caf\xe9.png": GOOD["grey.png"], b"bad\xff.png": b"", "日本.png".encode(): GOOD["rgb.jpg"]}
    folder = os.fsencode(tmp_path / "images")
    os.makedirs(folder + b"/cl\xe4ss")
    for name, content in names.items():
        with open(folder + b"/cl\xe4ss/" + name, "wb") as file:
            file.write(content)
    source = ["--data.source", "folder", "--data.path", tmp_path / "images"]
    run_here(tokenize, TokenizeConfig, *arguments, *source, "--on_error", "skip", "--num_workers", 1)
    (line,) = (tmp_path / "tokens" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["image_id"] == "cl\\xe4ss/bad\\xff.png"
    (shard,) = TokenManifest.load(tmp_path / "tokens").splits["train"]["shards"]
    ids = pq.read_table(tmp_path / "tokens" / shard["file"])["image_id"].to_pylist()[:2]
    assert ids == ["cl\\xe4ss/caf\\xe9.png", "cl\\xe4ss/日本.png"]
    assert os.path.exists(os.path.join(folder, os.fsencode(restored_name(ids[0]))))
    assert TokenManifest.load(tmp_path / "tokens").class_names == ["cl\\xe4ss"]
    assert damage_of(tmp_path / "tokens") == []


def test_a_split_of_bad_files_alone_fails(arguments, run_here, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"")
    source = ["--data.source", "folder", "--data.path", tmp_path / "bad", "--on_error", "skip"]
    with pytest.raises(ValueError, match="split 'train': all 1 images were rejected"):
        run_here(tokenize, TokenizeConfig, *arguments, *source)


def test_counts_that_do_not_add_up_fail_the_job(bad_images, arguments, run_here, tmp_path, monkeypatch):
    """A file that goes bad between its first view and its second is in one view and not in the other."""
    source = ["--data.source", "folder", "--data.path", bad_images, "--on_error", "skip"]

    def spoiled(folder, *rest):
        shards = sorted((folder / "data").glob("*.parquet"))
        shards[-1].unlink()
        (bad_images / "train" / "rgb.jpg").write_bytes(b"")
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("nextblock.tokenize_images.finish", spoiled)
    with pytest.raises(KeyboardInterrupt):
        run_here(tokenize, TokenizeConfig, *arguments, *source)
    message = "18 images were rejected in view 0 and 19 in view 1; expected the same images"
    with pytest.raises(ValueError, match=message):
        run_here(tokenize, TokenizeConfig, *arguments, *source, "--source_check", "names")
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_a_fault_of_the_machine_is_no_reason_to_reject():
    assert rejection_reason(OSError(24, "Too many open files")) is None
    assert rejection_reason(OSError(22, "Invalid argument")) == "corrupt"
    error = UnreadableImageError("the image /here/a.png", "/here/a.png", OSError("bad /here/a.png at 0x7f00"))
    assert error.detail == "OSError: bad … " and "/here/a.png" in str(error)
