"""Sets of images read as a stream: the same images whatever they lie in, shared among processes, damage named."""

import hashlib
import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nextblock.evaluation.references import open_images
from nextblock.evaluation.sample_order import turn_order
from nextblock.evaluation.sample_sets import open_samples

N, H, W = 23, 6, 10
IMAGES = np.random.default_rng(0).integers(0, 256, (N, H, W, 3), dtype=np.uint8)
LABELS = np.arange(N) % 4


def write_pictures(folder, images, names) -> None:
    for image, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name, lossless=True)


def read(samples, batch_size: int = 5, rank: int = 0, world_size: int = 1) -> dict[int, bytes]:
    found = {}
    for numbers, images in samples.batches(batch_size, rank, world_size):
        assert images.dtype == np.uint8 and images.flags.writeable and len(images) == len(numbers) <= batch_size
        assert numbers[0] % batch_size == 0 and numbers[0] // batch_size % world_size == rank
        found |= {number: image.tobytes() for number, image in zip(numbers.tolist(), images, strict=True)}
    return found


@pytest.fixture(params=["stored", "deflated", "png", "webp", "bmp"])
def samples(request, tmp_path):
    """A set, and where it is by number what was written."""
    if request.param in ("stored", "deflated"):
        save = np.savez if request.param == "stored" else np.savez_compressed
        save(tmp_path / "set.npz", IMAGES, LABELS.astype(np.int32), mu=np.zeros(3))
        return open_samples(tmp_path / "set.npz")
    names = [f"{'abcd'[label]}/{number}.{request.param}" for number, label in enumerate(LABELS)]
    write_pictures(tmp_path / "set", IMAGES, names)
    return open_samples(tmp_path / "set")


def test_every_image_is_read_once_with_its_class_by_any_number_of_processes(samples):
    assert len(samples) == N and samples.image_size == (H, W) and samples.job is samples.index is None
    whole = read(samples)
    assert sorted(whole) == [*range(N)]
    written = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    assert [written[whole[number]] for number in range(N)] == samples.class_labels.tolist()
    assert samples.class_labels.dtype == np.int64
    if samples.format == "npz":
        assert [whole[number] for number in range(N)] == [image.tobytes() for image in IMAGES]
    for batch_size, world_size in ((5, 2), (4, 3), (100, 2), (1, 1)):
        parts = [read(samples, batch_size, rank, world_size) for rank in range(world_size)]
        assert sum(map(len, parts)) == N and {k: v for part in parts for k, v in part.items()} == whole
    chosen = [7, 3, 3, 22]
    assert [image.tobytes() for image in samples.images(chosen)] == [whole[number] for number in chosen]
    for wrong in ([], [N], [-1]):
        with pytest.raises(ValueError, match=f"expected some from 0 to {N - 1}"):
            samples.images(wrong)
    for wrong in ((0, 0, 1), (1, 2, 2), (1, -1, 2)):
        with pytest.raises(ValueError, match="batch_size is .*; expected"):
            next(samples.batches(*wrong))


def test_classes_are_the_numbers_of_folders_cropped_or_not(tmp_path):
    names = [f"{name}/{number}.png" for name in ("207-hen", "3") for number in (0, 1)]
    write_pictures(tmp_path / "set", IMAGES[:4], names)
    for size in ((H, W), (H // 2, W // 2)):
        images, crop = open_images(str(tmp_path / "set"), size)
        assert sorted(images.class_labels) == [3, 3, 207, 207] and (crop is None) == (size == (H, W))


def test_the_hash_tells_contents_apart_and_nothing_else(tmp_path):
    names = [f"{number}.png" for number in range(N)]
    for folder, order in (("one", range(N)), ("two", reversed(range(N)))):
        for number in order:
            write_pictures(tmp_path / folder, IMAGES[[number]], [names[number]])
    one, two = (open_samples(tmp_path / folder) for folder in ("one", "two"))
    assert one.sha256() == two.sha256() and read(one) == read(two) and one.class_labels is None
    write_pictures(tmp_path / "two", IMAGES[:1], [names[1]])
    assert two.sha256() != one.sha256()
    np.savez(tmp_path / "x.npz", IMAGES)
    sha256 = hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()
    assert open_samples(tmp_path / "x.npz").sha256() == sha256


def test_pictures_of_a_folder_are_in_no_order_of_classes(tmp_path):
    write_pictures(tmp_path, np.zeros((200, 1, 1, 3), np.uint8), [f"{n // 100}-c/{n:03d}.png" for n in range(200)])
    assert {tuple(sorted(set(part))) for part in open_samples(tmp_path).class_labels.reshape(10, 20)} == {(0, 1)}


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["03", "7-seven"], [3, 7]),
        (["b", "a"], [1, 0]),
        (["1-x", "1-y"], [0, 1]),  # no numbers of classes: they are not distinct
        (["3", "x"], [0, 1]),
        (["train", "val"], [0, 1]),
    ],
)
def test_folders_named_by_number_are_these_classes(tmp_path, folders, classes):
    write_pictures(tmp_path, IMAGES[:2], [f"{folder}/x{n}.png" for n, folder in enumerate(folders)])
    samples = open_samples(tmp_path)
    by_content = {IMAGES[n].tobytes(): label for n, label in enumerate(classes)}
    assert [by_content[image.tobytes()] for image in samples.images([0, 1])] == samples.class_labels.tolist()


def test_several_kinds_grey_and_turned_pictures_and_those_with_too_much_text_are_read(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("L", (W, H), 7).save(tmp_path / "set" / "grey.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (H, W), (9, 9, 9)).save(tmp_path / "set" / "turned.jpg", exif=turned)
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "x" * 2_000_000, zip=True)  # PIL opens no more than a megabyte
    Image.new("RGB", (W, H)).save(tmp_path / "set" / "text.png", pnginfo=text)
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    samples = open_samples(tmp_path / "set")
    assert samples.format == "bmp+jpeg+png" and samples.image_size == (H, W)
    assert sorted(np.unique(samples.images([0, 1, 2]))) == [0, 7, 9]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_is_bounded_by_batches(tmp_path, save):
    images = (np.arange(400) % 251).astype(np.uint8).repeat(64 * 64 * 3).reshape(400, 64, 64, 3)
    save(tmp_path / "x.npz", images)
    expected = images[::40].copy()
    tracemalloc.start()
    try:
        samples = open_samples(tmp_path / "x.npz")
        found = [batch[0] for _, batch in samples.batches(40)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    # The first image of each batch keeps its batch.
    assert peak < len(found) * 40 * images[0].nbytes + 4 * 10**6
    assert sum(len(batch) for _, batch in samples.batches(40)) == 400


def npz(arr_0=None, **others) -> bytes:
    file = io.BytesIO()
    np.savez(file, **({} if arr_0 is None else {"arr_0": arr_0}), **others)
    return file.getvalue()


def claimed(shape: tuple, content: bytes) -> bytes:
    """An archive whose header claims a shape."""
    member, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue() + content)
    return file.getvalue()


def flipped(content: bytes) -> bytes:
    return content[:300] + bytes([content[300] ^ 1]) + content[301:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: File is not a zip file"),
        (b"no archive", "cannot be read"),
        (npz(IMAGES)[:-100], "cannot be read"),
        (flipped(npz(IMAGES)), "cannot be read: Bad CRC-32"),
        (npz(images=IMAGES), r"holds the arrays \['images'\]; expected arr_0"),
        (npz(IMAGES / 255), r"arr_0 is \(23, 6, 10, 3\) of float64; expected \(N, H, W, 3\) of uint8"),
        (npz(IMAGES.astype(np.int64)), "of int64; expected"),
        (npz(IMAGES.transpose(0, 3, 1, 2).copy()), r"\(23, 3, 6, 10\) of uint8; expected \(N, H, W, 3\)"),
        (npz(IMAGES[..., 0].copy()), r"\(23, 6, 10\) of uint8; expected"),
        (npz(IMAGES[:0]), "expected at least one image"),
        (npz(np.asfortranarray(IMAGES)), "arr_0 is column by column"),
        (npz(np.uint8(3)), "arr_0 is a single number"),
        (npz(np.array([None])), "arr_0 is an array of Python objects"),
        (npz(IMAGES, arr_1=LABELS[1:]), r"arr_1 is \(22,\) of int64; expected \(23,\) of integers"),
        (npz(IMAGES, arr_1=LABELS * 0.5), r"arr_1 is \(23,\) of float64"),
        (npz(IMAGES, index=LABELS[:, None]), r"index is \(23, 1\) of int64"),
        (claimed((10**6, 1000, 1000, 3), b""), "arr_0 claims 3000000000000 bytes, its member 0"),
    ],
    ids=range(17),
)
def test_npz_files_that_are_damaged_or_hold_something_else_are_named(tmp_path, content, message):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.npz.* {message}|x.npz {message}"):
        open_samples(tmp_path / "x.npz")


def test_wrong_folders_and_pictures_are_named(tmp_path):
    for name in ("nowhere", "nowhere.npz"):
        with pytest.raises(ValueError, match=f"{name} does not exist; expected an .npz file or a folder of pictures"):
            open_samples(tmp_path / name)
    (tmp_path / "x.tar").touch()
    with pytest.raises(ValueError, match="x.tar is a file; expected an .npz file or a folder"):
        open_samples(tmp_path / "x.tar")
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(ValueError, match="set holds no images"):
        open_samples(folder)
    write_pictures(folder, IMAGES, [f"{number}.png" for number in range(N)])
    Image.new("RGB", (W, H + 1)).save(folder / "tall.png")
    with pytest.raises(ValueError, match="6x10.*7x10|7x10.*6x10; expected pictures of one size"):
        open_samples(folder)
    (folder / "tall.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image file .*tall.png"):
        open_samples(folder)
    (folder / "tall.png").unlink()
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:-60])
    with pytest.raises(ValueError, match="cannot read the image file .*5.png"):
        samples = open_samples(folder)
        read(samples)
    # Turned by its tag, a picture of the right sides may be of the wrong size: that is seen when it is read.
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (W, H)).save(folder / "5.png", format="jpeg", exif=turned)
    with pytest.raises(ValueError, match="6x10.*10x6|10x6.*6x10"):
        samples = open_samples(folder)
        read(samples)


@pytest.fixture
def sampling_job(tmp_path):
    """The folder of a job of eight images, four of the class 3 and four of the class 1."""
    job = {"class_labels": [3, 1], "num_images_per_label": 4, "seed": 5, "class_order": "in turn"}
    write_pictures(tmp_path / "images", IMAGES[:8], [f"{3 - n // 4 * 2}-x/{n}.png" for n in range(8)])
    (tmp_path / "job.json").write_text(json.dumps(job))
    return tmp_path


def test_pictures_of_a_sampling_job_are_in_its_order(sampling_job):
    order = turn_order(5, 2, 4)
    for path in (sampling_job, sampling_job / "images"):
        samples = open_samples(path)
        assert samples.index.tolist() == order.tolist() and samples.job["seed"] == 5
        assert samples.class_labels.tolist() == [3 if number < 4 else 1 for number in order]
        np.testing.assert_array_equal(samples.images(range(8)), IMAGES[order])
    job = json.loads((sampling_job / "job.json").read_text())
    job.pop("class_order")
    (sampling_job / "job.json").write_text(json.dumps(job))
    assert open_samples(sampling_job).index.tolist() == [*range(8)]
    (sampling_job / "images" / "1-x" / "6.png").unlink()
    with pytest.raises(ValueError, match="holds 7 pictures, of which 7 are of the sampling job; expected all its 8"):
        open_samples(sampling_job)
    np.savez(sampling_job / "images.npz", IMAGES, index=np.arange(N))
    samples = open_samples(sampling_job)
    assert samples.format == "npz" and samples.index.tolist() == [*range(N)] and samples.job["seed"] == 5


def test_a_sampling_job_without_images_is_named(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "job.json").write_text('{"class_labels": [0], "num_images_per_label": 4, "seed": 5}')
    with pytest.raises(ValueError, match="holds a sampling job without images; expected a finished one"):
        open_samples(tmp_path)


@pytest.mark.parametrize(("num_labels", "num_images_per_label"), [(1, 7), (10, 10), (7, 13), (1000, 11)])
def test_as_many_images_in_a_row_as_there_are_classes_are_of_all_of_them(num_labels, num_images_per_label):
    order = turn_order(3, num_labels, num_images_per_label)
    assert sorted(order) == [*range(num_labels * num_images_per_label)]
    windows = np.lib.stride_tricks.sliding_window_view(order // num_images_per_label, num_labels)
    assert all(len(set(window)) == num_labels for window in windows[:: max(1, len(windows) // 50)])
    tenths = np.array_split(order // num_images_per_label, 10)
    assert all(len(set(tenth)) == num_labels for tenth in tenths if len(tenth) >= num_labels)
    if num_labels > 1:
        assert turn_order(4, num_labels, num_images_per_label).tolist() != order.tolist()
