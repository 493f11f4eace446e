"""What a sampling job leaves: the .npz file as other tools read it, folders of pictures, damage that is noticed."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from nextblock.files.atomic import write_whole
from nextblock.pipelines.sample_files import NpzFile, PictureFolder, class_folder_names, read_samples

LABELS = np.array([0, 0, 3, 3, 12], np.int64)
BATCHES = [range(0, 2), range(2, 4), range(4, 5)]
# Gradients, which lossy formats keep roughly.
IMAGES = np.stack([np.add.outer(np.arange(8), np.arange(12))[..., None] * [n + 1, 5, 9] for n in range(5)])
IMAGES = IMAGES.astype(np.uint8)


def write(files) -> None:
    for batch in reversed(BATCHES):
        assert not files.has(batch)
        files.write(batch, IMAGES[batch.start : batch.stop])
        assert files.has(batch)
    files.assemble(BATCHES)
    files.check()
    assert all(files.has(batch) for batch in BATCHES)


def test_the_npz_file_is_what_numpy_would_write(tmp_path):
    files = NpzFile(tmp_path, LABELS, (8, 12))
    write(files)
    np.savez(tmp_path / "expected.npz", IMAGES, LABELS)
    assert files.path.read_bytes() == (tmp_path / "expected.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.npz", "images.npz"]
    assert np.array_equal(files.read([4, 1, 4]), IMAGES[[4, 1, 4]])


def test_the_images_own_numbers_lie_beside_them_and_name_the_pictures(tmp_path):
    index = np.array([3, 0, 4, 1, 2])
    files = NpzFile(tmp_path, LABELS[index], (8, 12), index)
    for batch in BATCHES:
        files.write(batch, IMAGES[index[batch.start : batch.stop]])
    files.assemble(BATCHES)
    files.check()
    with np.load(files.path) as arrays:
        assert arrays.files == ["arr_0", "arr_1", "index"] and np.array_equal(arrays["index"], index)
        assert np.array_equal(arrays["arr_0"], IMAGES[index]) and np.array_equal(arrays["arr_1"], LABELS[index])
    images, class_labels = read_samples(files.path)
    assert np.array_equal(images, IMAGES) and np.array_equal(class_labels, LABELS)
    with pytest.raises(ValueError, match="and other classes; expected"):
        NpzFile(tmp_path, LABELS[index], (8, 12), index[::-1]).check()
    pictures = PictureFolder(tmp_path, LABELS[index], 13, None, "png", 95, index)
    for batch in BATCHES:
        pictures.write(batch, IMAGES[index[batch.start : batch.stop]])
    pictures.check()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "12" / "4.png")), IMAGES[4])
    np.savez(tmp_path / "x.npz", IMAGES, LABELS, index=np.array([3, 0, 4, 1, 1]))
    with pytest.raises(ValueError, match="index is no order of 5 images"):
        read_samples(tmp_path / "x.npz")


def test_the_npz_file_can_be_streamed_as_adms_evaluator_does(tmp_path):
    write(NpzFile(tmp_path, LABELS, (8, 12)))
    with zipfile.ZipFile(tmp_path / "images.npz") as archive:
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert (shape, is_fortran, dtype) == ((5, 8, 12, 3), False, np.uint8)
            assert member.read() == IMAGES.tobytes()


def test_an_npz_file_of_other_images_or_classes_is_refused(tmp_path):
    files = NpzFile(tmp_path, LABELS, (8, 12))
    write(files)
    with pytest.raises(ValueError, match=r"images.npz holds an array \(5, 8, 12, 3\) and other classes; expected"):
        NpzFile(tmp_path, LABELS + 1, (8, 12)).check()
    with pytest.raises(ValueError, match=r"holds an array \(5, 8, 12, 3\) and classes; expected \(5, 8, 8, 3\)"):
        NpzFile(tmp_path, LABELS, (8, 8)).check()


def test_a_part_of_another_size_is_refused(tmp_path):
    files, message = NpzFile(tmp_path, LABELS, (8, 12)), r"holds an array \(2, .*; expected \(1, 8, 12, 3\) of uint8"
    files.write(BATCHES[0], IMAGES[:2])
    with pytest.raises(ValueError, match=message):
        files.write(BATCHES[2], IMAGES[:2])
    assert len(list((tmp_path / "parts").iterdir())) == 1
    for batch in BATCHES[1:]:
        np.save(tmp_path / "parts" / f"{batch.start:09d}.npy", IMAGES[:2])
    with pytest.raises(ValueError, match=f"000000004.npy {message}"):
        files.assemble(BATCHES)
    assert not files.path.exists()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("num_lost", [1, 5, 20, 60])
def test_a_picture_cut_short_is_removed(tmp_path, output_format, num_lost):
    files = PictureFolder(tmp_path, LABELS, 13, None, output_format, 95)
    write(files)
    cut = tmp_path / "images" / "03" / f"2.{output_format}"
    cut.write_bytes(cut.read_bytes()[:-num_lost])
    (problem,) = files.remove_damaged(BATCHES)
    assert problem.startswith(f"{cut} is damaged (") and not cut.exists()
    assert list(files.remove_damaged(BATCHES)) == [] and not files.has(BATCHES[1])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_lie_in_a_folder_for_each_class(tmp_path, output_format):
    files = PictureFolder(tmp_path, LABELS, 13, None, output_format, 95)
    write(files)
    found = sorted(path.relative_to(tmp_path / "images").as_posix() for path in tmp_path.rglob(f"*.{output_format}"))
    assert found == [f"{name}.{output_format}" for name in ("00/0", "00/1", "03/2", "03/3", "12/4")]
    for path, image in zip(found, IMAGES, strict=True):
        with Image.open(tmp_path / "images" / path) as picture:
            assert picture.format == output_format.upper() and picture.mode == "RGB"
            difference = np.abs(np.asarray(picture).astype(int) - image)
            assert difference.max() == 0 if output_format == "png" else difference.mean() < 4
    assert np.abs(files.read([0, 4]).astype(int) - IMAGES[[0, 4]]).mean() < 4


def test_the_quality_reaches_lossy_formats(tmp_path):
    for output_format in ("jpeg", "webp"):
        PictureFolder(tmp_path, LABELS, 13, None, output_format, 30).write(range(4, 5), IMAGES[4:])
        expected = io.BytesIO()
        Image.fromarray(IMAGES[4]).save(expected, format=output_format, quality=30)
        assert (tmp_path / "images" / "12" / f"4.{output_format}").read_bytes() == expected.getvalue()


def test_a_picture_too_many_or_too_few_is_noticed_and_leftovers_of_kills_are_removed(tmp_path):
    files = PictureFolder(tmp_path, LABELS, 13, None, "png", 95)
    write(files)
    (tmp_path / "images" / "03" / ".2.png.tmp").touch()
    files.assemble(BATCHES)
    files.check()
    (tmp_path / "images" / "03" / "5.png").touch()
    with pytest.raises(ValueError, match=r"03/5.png is there; expected exactly the job's 5 images in "):
        files.check()
    (tmp_path / "images" / "03" / "5.png").unlink()
    (tmp_path / "images" / "03" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"03/2.png is missing; expected exactly the job's 5 images in "):
        files.check()
    assert [files.has(batch) for batch in BATCHES] == [True, False, True]


def test_class_folders_sort_as_classes_do_and_are_safe_names():
    names = ["Zebra", "a/b: c", "tench, Tinca tinca", "Kühe", *[f"{n}" * 99 for n in range(7)]]
    folders = class_folder_names(11, names)
    assert folders[:4] == ["00-Zebra", "01-a_b_c", "02-tench_Tinca_tinca", "03-Kühe"]
    assert sorted(folders) == folders and max(map(len, folders)) == 53
    assert class_folder_names(3, None) == ["0", "1", "2"] and class_folder_names(0, None) == []


def test_a_file_appears_only_once_it_is_whole(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    path = tmp_path / "file"
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, fail)
    assert not path.exists()
    write_whole(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole" and sorted(tmp_path.iterdir()) == [path]


def write_npz(path, images: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """An .npz file of two members as they are given."""
    labels = io.BytesIO()
    np.save(labels, np.zeros(2, np.int64))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", images)
        archive.writestr("arr_1.npy", labels.getvalue())


def npy(shape: tuple, content: bytes = b"", descr: str = "|u1") -> bytes:
    """A header that claims a shape, and some content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("content", "compression", "message"),
    [
        (npy((10**6, 1000, 1000, 3)), zipfile.ZIP_STORED, "arr_0 claims 3000000000000 bytes, its member 0"),
        (npy((2, 1000, 1000, 3), bytes(6_000_000)), zipfile.ZIP_DEFLATED, "arr_0 in .* has 6000000 bytes; expected"),
        (npy((2, 2, 2, 3), bytes(23)), zipfile.ZIP_STORED, "claims 24 bytes, its member 23"),
        (npy((2, 2, 2), bytes(8)), zipfile.ZIP_STORED, r"holds arrays \(2, 2, 2\) of uint8"),
        (npy((3, 2, 2, 3), bytes(36)), zipfile.ZIP_STORED, "holds arrays"),
        (npy((2, 2, 2, 3), bytes(96), "<f4"), zipfile.ZIP_STORED, "holds arrays .* of float32"),
        (npy((2,), bytes(16), "|O"), zipfile.ZIP_STORED, "[Oo]bject"),
        (b"no array", zipfile.ZIP_STORED, "magic"),
    ],
    ids=range(8),
)
def test_samples_that_claim_more_than_they_hold_are_refused(content, compression, message, tmp_path):
    write_npz(tmp_path / "x.npz", content, compression)
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "x.npz")


def test_samples_are_read_packed_or_not_and_files_of_other_kinds_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", images, np.array([1, 0]))
        read, class_labels = read_samples(tmp_path / "x.npz")
        assert np.array_equal(read, images) and class_labels.tolist() == [1, 0]
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="x.npz cannot be read"):
        read_samples(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images)
    with pytest.raises(ValueError, match="x.npz cannot be read: .*arr_1"):
        read_samples(tmp_path / "x.npz")
