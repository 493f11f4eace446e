"""A job does not go on with images that were replaced under the same names."""

import os
import shutil
from pathlib import Path

import datasets
import pytest

from nextblock.data.images import ImageDataConfig, load_source, source_files
from nextblock.data.source_record import check_files

HINT = "start anew"


@pytest.fixture
def files(tmp_path) -> tuple[Path, list[str]]:
    names = ["a/0.png", "a/1.png", "b/2.png", "nowhere.png"]
    for number, name in enumerate(names[:3]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (10 + number))
    return tmp_path / "images", names


def goes_on(tmp_path, root, names, check, is_begun=True) -> None:
    check_files(tmp_path / "record.npz", root, names, check, is_begun=is_begun, hint=HINT)


@pytest.mark.parametrize("check", ["sizes", "files", "content"])
def test_the_first_changed_file_is_named(files, tmp_path, check):
    root, names = files
    os.mkfifo(root / "pipe.png")
    names.append("pipe.png")
    goes_on(tmp_path, *files, check)
    goes_on(tmp_path, *files, check)
    content = (root / names[1]).read_bytes()
    (root / names[1]).write_bytes(content + b"!")
    (root / names[2]).write_bytes(b"")
    expected = rf"{root}/a/1.png is not the file .*: it has 12 bytes and had 11 \(2 of 5 files have changed\); {HINT}"
    with pytest.raises(ValueError, match=expected):
        goes_on(tmp_path, *files, check)
    (root / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{root}/a/1.png is not the file .*: it is gone"):
        goes_on(tmp_path, *files, check)
    # A job that has made nothing of them yet may begin with whatever is there.
    goes_on(tmp_path, *files, check, is_begun=False)
    goes_on(tmp_path, *files, check)


def test_what_is_no_file_is_not_waited_for(files, tmp_path):
    root, names = files
    os.mkfifo(root / "pipe.png")
    os.symlink("/dev/zero", root / "endless.png")
    goes_on(tmp_path, root, [*names, "pipe.png", "endless.png"], "content")


def test_equal_sizes_are_told_apart_by_times_or_content(files, tmp_path):
    root, names = files
    times = (root / names[0]).stat()
    goes_on(tmp_path, *files, "content")
    shutil.copytree(root, tmp_path / "copy")
    for name in names[:3]:
        os.utime(tmp_path / "copy" / name, (0, 1e9))
    goes_on(tmp_path, tmp_path / "copy", names, "content")
    goes_on(tmp_path, tmp_path / "copy", names, "sizes")
    with pytest.raises(ValueError, match="copy/a/0.png is not the file .*: it was changed at 2001-"):
        goes_on(tmp_path, tmp_path / "copy", names, "files")
    (root / names[0]).write_bytes(b"y" * 10)
    os.utime(root / names[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    goes_on(tmp_path, *files, "files")
    with pytest.raises(ValueError, match="a/0.png is not the file .*: its content is another"):
        goes_on(tmp_path, *files, "content")


def test_records_that_do_not_fit_are_refused(files, tmp_path):
    root, names = files
    goes_on(tmp_path, *files, "files")
    with pytest.raises(ValueError, match=f"does not tell of the files' content.*; {HINT}"):
        goes_on(tmp_path, *files, "content")
    for others in (names[:3], [*names[:3], "other.png"]):
        with pytest.raises(ValueError, match=rf"has {len(others)} other files than the 4 of .*record.npz; {HINT}"):
            goes_on(tmp_path, root, others, "files")
    for content in (b"", b"no archive", (tmp_path / "record.npz").read_bytes()[:-30]):
        (tmp_path / "record.npz").write_bytes(content)
        with pytest.raises(ValueError, match=f"record.npz is damaged .*; {HINT}"):
            goes_on(tmp_path, *files, "files")


def test_the_files_of_every_source_are_known(image_folder, tmp_path):
    def listed(split="train", **options) -> list[str]:
        config = ImageDataConfig(**options)
        root, names = source_files(config, load_source(config, split), split)
        assert all((root / name).is_file() for name in names)
        return names

    options = {"source": "folder", "path": str(image_folder)}
    assert len(listed(**options)) == 48 and listed("test", **options)[0] == "test/blue tit/00.png"
    held_out = {"eval_split": "heldout", "eval_fraction": 0.3}
    parts = [listed(split, **options, **held_out) for split in ("train", "heldout")]
    assert sorted(parts[0] + parts[1]) == sorted(listed(**options)) and parts[1]
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(image_folder / "train" / "wren" / "00.png", os.path.join(os.fsencode(odd), b"\xff.png"))
    assert [os.fsencode(name) for name in listed(source="folder", path=str(odd), eval_split=None)] == [b"\xff.png"]
    rows = datasets.load_dataset("imagefolder", data_dir=str(image_folder), split="train").select(range(3))
    rows.save_to_disk(tmp_path / "saved")
    assert {"state.json", "dataset_info.json"} < set(listed(source="datasets", path=str(tmp_path / "saved")))
    shutil.make_archive(str(tmp_path / "tars" / "train-0"), "tar", image_folder / "train")
    assert listed(source="webdataset", path=str(tmp_path / "tars"), eval_split=None) == ["train-0.tar"]
    digits = ImageDataConfig(source="digits")
    assert source_files(digits, load_source(digits, "test"), "test") == (None, [])
