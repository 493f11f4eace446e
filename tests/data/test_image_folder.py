"""What lies in a folder is an image, or named, or known to be none: links, other kinds, other names, labels."""

import os
import socket
from pathlib import Path

import datasets
import pytest
from PIL import Image

from nextblock.data.images import ImageDataConfig, load_source
from nextblock.data.unreadable import UnreadableImageError
from nextblock.data.usable import find_unreadable
from nextblock.files.names import restored_name


def solid(path: Path, level: int, file_format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, 0, 0)).save(path, file_format)


def opened(root: Path, split: str = "train", **options):
    return load_source(ImageDataConfig(source="folder", path=str(root), **options), split)


def found(source) -> dict[str, int]:
    return {source.identifier(i): source.image(i).getpixel((0, 0))[0] for i in range(len(source))}


def refused(root: Path) -> str:
    with pytest.raises(ValueError) as error:
        opened(root)
    return str(error.value)


def test_links_are_followed(tmp_path):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    solid(root / "cat" / "a.png", 1)
    solid(elsewhere / "deep" / "b.png", 2)
    solid(elsewhere / "c.png", 3)
    (root / "cat" / "more").symlink_to(elsewhere / "deep")
    (root / "dog").symlink_to(elsewhere)
    (root / "cat" / "d.png").symlink_to(elsewhere / "c.png")
    os.link(elsewhere / "c.png", root / "cat" / "e.png")
    source = opened(root)
    expected = {"cat/a.png": 1, "cat/d.png": 3, "cat/e.png": 3, "cat/more/b.png": 2}
    expected |= {"dog/c.png": 3, "dog/deep/b.png": 2}
    assert found(source) == expected and source.class_names == ["cat", "dog"]
    (tmp_path / "linked").symlink_to(root)
    assert found(opened(tmp_path / "linked")) == expected


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path):
    solid(tmp_path / "cat" / "a.png", 1)
    (tmp_path / "dog").symlink_to(tmp_path / "nowhere")
    assert f"{tmp_path / 'dog'} is a link to" in refused(tmp_path)
    (tmp_path / "dog").unlink()
    (tmp_path / "cat" / "b.png").symlink_to("nowhere.png")
    source = opened(tmp_path)
    with pytest.raises(UnreadableImageError) as error:
        source.image(1)
    assert error.value.reason == "missing"
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    assert f"{tmp_path / 'cat' / 'up'} is a link back to {tmp_path}" in refused(tmp_path)


@pytest.mark.parametrize("is_in_class", [False, True])
def test_pictures_of_other_kinds_are_read_or_named(tmp_path, is_in_class):
    folder = tmp_path / "cat" if is_in_class else tmp_path
    kinds = {"a.tga": "TGA", "b.JP2": "JPEG2000", "c.pcx": "PCX", "d.jpe": "BMP", "e.jpeg_large": "PNG", "f": "TIFF"}
    for name, kind in kinds.items():
        solid(folder / name, 9, kind)
    for name in ("g.heic", "h.svg", "i.cr2"):
        (folder / name).write_bytes(b"<svg>")
    for name in ("notes.txt", "Thumbs.db", "movie.mp4", "Makefile"):
        (folder / name).write_bytes(b"nothing to see")
    solid(folder / ".hidden.png", 1)
    source = opened(tmp_path)
    names = [Path(source.identifier(i)).name for i in range(len(source))]
    assert names == [*kinds, "g.heic", "h.svg", "i.cr2"]
    assert all(abs(source.image(i).getpixel((0, 0))[0] - 9) < 3 for i in range(len(kinds)))
    for index in range(len(kinds), len(names)):
        with pytest.raises(UnreadableImageError, match=names[index]):
            source.image(index)


def test_images_beside_class_folders_are_an_error_that_names_examples(tmp_path):
    solid(tmp_path / "cat" / "a.png", 1)
    solid(tmp_path / "b.TGA", 1)
    assert "such as b.TGA and cat/a.png" in refused(tmp_path)
    os.rename(tmp_path / "b.TGA", tmp_path / "b")
    assert found(opened(tmp_path)) == {"cat/a.png": 1}  # without its suffix nothing marks a TGA
    solid(tmp_path / "b", 1, "PNG")
    assert "such as b and cat/a.png" in refused(tmp_path)


def test_what_is_neither_file_nor_folder_is_an_image_that_cannot_be_read(tmp_path):
    cat = tmp_path / "cat"
    solid(cat / "a.png", 1)
    os.mkfifo(cat / "notes")
    assert len(opened(tmp_path)) == 1
    os.mkfifo(cat / "pipe.png")
    os.symlink("/dev/zero", cat / "device.jpg")
    os.symlink("circle.png", cat / "circle.png")
    os.symlink(cat / "nowhere", cat / "dangling.png")
    (cat / "folder.png").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(cat / "socket.gif"))
    listener.close()
    source = opened(tmp_path)
    names = ["circle.png", "dangling.png", "device.jpg", "folder.png", "pipe.png", "socket.gif"]
    assert [source.identifier(index) for index in range(7)] == [f"cat/{name}" for name in ["a.png", *names]]
    for index, name in enumerate(names, start=1):
        with pytest.raises(UnreadableImageError, match=name) as error:
            source.image(index)
        assert error.value.reason == "missing" and str(tmp_path) not in error.value.detail
    assert "a pipe; expected a file" in find_unreadable(source, [5])[0]["detail"]
    # A folder that holds images is one, whatever it is called.
    solid(cat / "folder.png" / "b.png", 1)
    assert "cat/folder.png/b.png" in [each.identifier(index) for each in [opened(tmp_path)] for index in range(7)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_pipes_that_datasets_would_pass_over_are_named(is_streamed, tmp_path):
    solid(tmp_path / "rows" / "a.png", 1)
    options = {"source": "datasets", "label_column": None, "is_streamed": is_streamed}
    os.mkfifo(tmp_path / "rows" / "x.png")
    with pytest.raises(ValueError, match="passes over 1 images or links to folders, such as .*x.png"):
        load_source(ImageDataConfig(path=str(tmp_path / "rows"), **options), "train", in_order=True)
    for name in ("b.parquet", "metadata.csv", "b.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is a pipe; expected a file"):
            load_source(ImageDataConfig(path=str(tmp_path), **options), "train", in_order=True)
        (tmp_path / name).unlink()


def test_a_folder_called_like_a_picture_beside_loose_ones_is_no_image(tmp_path):
    solid(tmp_path / "a.png", 1)
    (tmp_path / "x.png").mkdir()
    source = opened(tmp_path)
    assert [entry["image_id"] for entry in find_unreadable(source, range(len(source)))] == ["x.png"]


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    solid(tmp_path / "cat" / "deep" / "a.png", 1)
    scandir = os.scandir

    def forbidding(folder):
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert "deep cannot be looked into" in refused(tmp_path)


def test_names_that_are_no_utf_8_are_escaped_and_come_back(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"a\xff.png", b"b.png"):
        solid(Path(os.fsdecode(folder + b"/" + name)), 5)
    source = opened(tmp_path)
    assert found(source) == {"caf\\xe9/a\\xff.png": 5, "caf\\xe9/b.png": 5} and source.class_names == ["caf\\xe9"]
    assert (tmp_path / restored_name(source.identifier(0))).is_file()
    with open(folder + b"/b.png", "wb"):
        pass
    with pytest.raises(UnreadableImageError) as error:
        opened(tmp_path).image(1)
    (str(error.value) + error.value.detail).encode("utf-8")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_files_that_a_dataset_would_pass_over_are_refused(tmp_path, is_streamed, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    solid(root / "train" / "cat" / "a.png", 1)
    solid(root / "train" / "dog" / "b.jp2", 2)
    solid(root / "train" / "dog" / "c.png", 2)
    (root / "train" / "dog" / "notes.txt").write_text("no picture")
    config = ImageDataConfig(source="datasets", path=str(root), is_streamed=is_streamed)
    assert len(load_source(config, "train", in_order=True)) == 3
    (tmp_path / "elsewhere").mkdir()
    lost = {
        "c.heic": lambda path: path.write_bytes(b"x"),
        "d": lambda path: solid(path, 3, "PNG"),
        "e": lambda path: path.symlink_to(tmp_path / "elsewhere"),
        "f": lambda path: path.symlink_to(tmp_path / "nowhere"),
    }
    for name, make in lost.items():
        make(root / "train" / "dog" / name)
        with pytest.raises(ValueError, match=rf"passes over 1 images or links.*dog/{name}; .*'folder'"):
            load_source(config, "train", in_order=True)
        (root / "train" / "dog" / name).unlink()
