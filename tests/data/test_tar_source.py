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
    refused("1 of 2 images have no .cls, such as train.tar/b.png; expected one for every image, or for none")
    write_tar(tmp_path / "train.tar", {"A.PNG": png(1), "a.cls": b"3"})
    refused("1 of 1 .cls are of no image, such as a.cls")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"3", "a.old.CLS": b"3"})
    refused("a.old.CLS is a second label")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"cat"})
    refused("a.cls of .*train.tar holds 'cat'; expected a class number")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.left.png": png(1)})
    refused("a.left.png is a second image of its sample")
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0"})
    write_tar(tmp_path / "test.tar", {"a.png": png(1), "a.cls": b"1"})
    refused("split 'test' has 2 classes, split 'train' has 1", "test")
    (tmp_path / "train.tar").write_bytes(b"no tar file" * 100)
    refused("train.tar is no tar file that can be read")
    (tmp_path / "train.tar").write_bytes(b"")
    refused("train.tar is empty")
    (tmp_path / "train.tar").unlink()
    (tmp_path / "train.tar").symlink_to("nowhere")
    refused("train.tar is no tar file that can be read.*No such file")


def test_tars_that_would_be_passed_over_are_refused_or_read(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a.png": png(1)})
    write_tar(tmp_path / "train-1.TAR", {"b.png": png(2)})
    assert len(read(tmp_path)) == 2
    write_tar(tmp_path / "train" / "0.tar", {"c.png": png(3)})
    with pytest.raises(ValueError, match="has both .*expected one layout"):
        read(tmp_path)
    for name in ("train-2.tar.gz", "train-2.tgz", "train-2.tar.zst"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is compressed"):
            read(tmp_path / "other")
        (tmp_path / "other" / name).unlink()


def test_labels_are_found_in_any_case(tmp_path):
    write_tar(tmp_path / "train.tar", {"a.PNG": png(1), "a.CLS": b"2", "b.Png": png(2), "b.Cls": b"0"})
    source = read(tmp_path)
    assert [source.label(i) for i in range(2)] == [2, 0] and len(source.class_names) == 3


def eight(start: int = 0) -> dict[str, bytes]:
    return {f"{start + i}.png": png(start + i) for i in range(8)}


def levels(source) -> list[int]:
    return [source.image(i).getpixel((0, 0))[0] for i in range(len(source))]


def test_joined_tars_are_read_to_the_end(tmp_path):
    for start in (0, 8, 16):
        write_tar(tmp_path / f"part-{start}.tar", eight(start))
    parts = [(tmp_path / f"part-{start}.tar").read_bytes() for start in (0, 8, 16)]
    (tmp_path / "train.tar").write_bytes(b"".join(parts))
    assert levels(read(tmp_path)) == list(range(24))
    (tmp_path / "train.tar").write_bytes(parts[0] + parts[1][: 5 * 1024 + 100])
    with pytest.raises(ValueError, match=r"train\.tar"):
        read(tmp_path)


def test_a_tar_that_holds_less_than_it_should_is_refused(tmp_path):
    """Each sample takes two blocks, its header and its content."""
    write_tar(tmp_path / "train.tar", eight())
    whole, file = (tmp_path / "train.tar").read_bytes(), tmp_path / "train.tar"
    assert levels(read(tmp_path)) == list(range(8))
    header = 4 * 1024
    damages = {
        "damaged header": whole[: header + 150] + b"7" + whole[header + 151 :],
        "header of noise": whole[:header] + b"\xa5" * 512 + whole[header + 512 :],
        "missing header": whole[:header] + whole[header + 512 :],
        "missing end": whole[: 8 * 1024],
        "cut between members": whole[: 4 * 1024],
        "cut within a header": whole[: 4 * 1024 + 100],
        "cut within a member": whole[: 4 * 1024 + 520],
        "noise after the end": whole + b"noise",
        "damaged first header": b"x" + whole[1:],
    }
    for name, content in damages.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.tar"):
            read(tmp_path)
            pytest.fail(name)
    # A header of zeros looks like the end; what follows is no header.
    file.write_bytes(whole[:header] + bytes(512) + whole[header + 512 :])
    with pytest.raises(ValueError, match="damaged: there is no header at byte 4608"):
        read(tmp_path)
    # One block of zeros marks the end too.
    file.write_bytes(whole[: 8 * 1024 + 512])
    assert levels(read(tmp_path)) == list(range(8))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tars_of_which_a_dataset_would_lose_a_part_are_refused(tmp_path, is_streamed, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = {"path": str(tmp_path / "rows"), "image_column": "png", "label_column": None, "is_streamed": is_streamed}
    config = ImageDataConfig(source="datasets", **options)
    file = tmp_path / "rows" / "train.tar"
    write_tar(file, eight())
    whole = file.read_bytes()
    assert levels(load_source(config, "train", in_order=True)) == list(range(8))
    for message, content in {
        "holds 2 archives joined": whole * 2,
        "is cut off": whole[: 4 * 1024],
        "is damaged": whole[: 4 * 1024] + b"x" + whole[4 * 1024 + 1 :],
    }.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_source(config, "train", in_order=True)
    file.write_bytes(whole)
    with tarfile.open(file, "a") as archive:
        add_link(archive, "link.png", tarfile.LNKTYPE, "0.png")
    with pytest.raises(ValueError, match="holds 1 links such as link.png"):
        load_source(config, "train", in_order=True)


def add_link(archive: tarfile.TarFile, name: str, kind: bytes, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    archive.addfile(entry)


def test_links_in_a_tar_are_images(tmp_path):
    write_tar(tmp_path / "train.tar", {"x/a.png": png(7)})
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        add_link(archive, "hard.png", tarfile.LNKTYPE, "x/a.png")
        add_link(archive, "x/soft.png", tarfile.SYMTYPE, "a.png")
        add_link(archive, "y/twice.png", tarfile.SYMTYPE, "../x/soft.png")
        add_link(archive, "nowhere.png", tarfile.SYMTYPE, "../a.png")
        add_link(archive, "circle.png", tarfile.SYMTYPE, "circle.png")
        add_link(archive, "pipe.png", tarfile.FIFOTYPE, "")
    source = read(tmp_path)
    assert len(source) == 7 and levels_of(source, range(4)) == [7] * 4
    for index in (4, 5, 6):
        with pytest.raises(UnreadableImageError) as error:
            source.image(index)
        assert error.value.reason == "missing"


def levels_of(source, indices) -> list[int]:
    return [source.image(i).getpixel((0, 0))[0] for i in indices]


def test_pictures_of_other_kinds_in_a_tar_are_not_passed_over(tmp_path):
    tga = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 0, 0)).save(tga, "TGA")
    members = {"a.png": png(1), "b.TGA": tga.getvalue(), "c": png(3), "d.dat": png(4), "e.heic": b"?", "f.json": b"{}"}
    write_tar(tmp_path / "train.tar", members)
    source = read(tmp_path)
    assert [source.identifier(i)[10:] for i in range(len(source))] == ["a.png", "b.TGA", "c", "d.dat", "e.heic"]
    assert levels_of(source, range(4)) == [1, 9, 3, 4]
    with pytest.raises(UnreadableImageError, match=r"e\.heic"):
        source.image(4)


def test_labels_that_are_identifiers_are_refused(tmp_path):
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"30000000", "b.png": png(2), "b.cls": b"7"})
    with pytest.raises(ValueError, match="labels up to 30000000 for 2 images.*Identifiers are no classes"):
        read(tmp_path)
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"9" * 5000})
    with pytest.raises(ValueError, match="expected a class number"):
        read(tmp_path)
    write_tar(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"21840"})
    assert len(read(tmp_path).class_names) == 21841
