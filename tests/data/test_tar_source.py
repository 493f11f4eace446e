"""WebDataset tar files: samples, labels and splits, and tars that do not fit."""

import io
import tarfile

import pytest
from PIL import Image

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.unreadable import UnreadableImageError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def read(root, split="train", **options):
    return load_source(ImageDataConfig(source="webdataset", path=str(root), **options), split)


def test_samples_are_read_in_order_with_their_labels(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a.png": png(1), "a.cls": b"2\n", "x/b.cls": b"0", "x/b.seg.PNG": png(2)})
    write_tar(tmp_path / "train-1.tar", {"a.json": b"{}", "a.png": png(3), "a.cls": b"1"})
    write_tar(tmp_path / "test" / "0.tar", {"c.png": png(4), "c.cls": b"1"})
    source = read(tmp_path)
    assert [source.image(i).getpixel((0, 0)) for i in range(len(source))] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert [source.label(i) for i in range(3)] == [2, 0, 1] and source.class_names == ["0", "1", "2"]
    ids = ["train-0.tar/a.png", "train-0.tar/x/b.seg.PNG", "train-1.tar/a.png"]
    assert [source.identifier(i) for i in range(3)] == ids
    held_out = read(tmp_path, "test")
    assert held_out.class_names == ["0", "1", "2"] and held_out.identifier(0) == "test/0.tar/c.png"


def test_samples_without_labels_are_unconditional(tmp_path):
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "b.png": b"no picture"})
    source = read(tmp_path)
    assert source.class_names == [] and source.label(1) == 0
    with pytest.raises(UnreadableImageError, match=r"b.png of .*train.tar") as error:
        source.image(1)
    assert (error.value.reason, error.value.detail) == ("corrupt", "UnidentifiedImageError: cannot identify image file")


def test_tars_that_do_not_fit_are_refused(tmp_path):
    def refused(message, split="train"):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, split)

    refused("expected tar files")
    write_tar(tmp_path / "train.tar", {"a.txt": b""})
    refused("hold no images")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2)})
    refused("b.png and 0 more have no .cls")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"cat"})
    refused("a.cls of .*train.tar holds 'cat'; expected a class number")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.left.png": png(1)})
    refused("a.left.png is a second image of its sample")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0"})
    write_tar(tmp_path / "test.tar", {"a.png": png(1), "a.cls": b"1"})
    refused("split 'test' has 2 classes, split 'train' has 1", "test")
    (tmp_path / "train.tar").write_bytes(b"no tar file" * 100)
    refused("train.tar is no tar file that can be read")
