"""The images of a sampling job on disk: one .npz file put together from parts, or folders of pictures.

Every file is written under a temporary name, flushed and renamed, so that it is whole or not there.
Legend: N images of the job, n of a batch, HxW pixels.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from nextblock.evaluation.sample_sets import IMAGES_KEY, INDEX_KEY, LABELS_KEY, NPZ_NAME, PICTURES_NAME
from nextblock.files.atomic import flush_to_disk, write_whole
from nextblock.files.npz import DAMAGE, NpzArray, npz_arrays

LOSSY_FORMATS = ("jpeg", "webp")
PICTURE_FORMATS = ("png", *LOSSY_FORMATS)
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_NUM_READERS = 4
# Pictures of one colour are all that packs more tightly.
MAX_EXPANSION = 100


class NpzFile:
    """One .npz file in the layout of ADM's evaluator, `arr_0` (N, H, W, 3) uint8 and `arr_1` (N,) int64, the classes.

    Beside them lie the images' own numbers, `index` (N,) int64. Batches wait as files in `parts`, which vanishes once
    all are in the .npz file.

    Args:
        folder: of the job.
        class_labels: (N,) int64.
        image_size: (H, W).
        index: (N,) int64; None leaves it out of the file.
    """

    def __init__(
        self, folder: Path, class_labels: np.ndarray, image_size: Sequence[int], index: np.ndarray | None = None
    ):
        self.path = folder / NPZ_NAME
        self._parts = folder / "parts"
        self._numbers = {LABELS_KEY: class_labels} | ({} if index is None else {INDEX_KEY: index})
        self._shape = (len(class_labels), *image_size, 3)

    def has(self, batch: range) -> bool:
        """Whether a batch is on disk."""
        return self._part(batch).is_file() or self.path.is_file()

    def write(self, batch: range, images: np.ndarray) -> None:
        """Keep a batch (n, H, W, 3) of bytes."""
        self._parts.mkdir(exist_ok=True)
        write_whole(self._part(batch), partial(_write_array, images=images), partial(self._check_part, batch))

    def remove_damaged(self, batches: Sequence[range]) -> Iterator[str]:
        """Remove files that are not whole, so that their images are drawn again, and yield what was wrong with each.

        Processes may share the batches; the archive of all goes with the first one.
        """
        if self.path.is_file() and any(batch.start == 0 for batch in batches):
            try:
                self._images()
                arrays = npz_arrays(self.path, self._numbers)
                for name in self._numbers:
                    arrays[name].check_content()
            except DAMAGE as error:
                self.path.unlink()
                yield f"{self.path} is damaged ({error})"
        for batch in batches:
            if self._part(batch).is_file():
                try:
                    self._check_part(batch, self._part(batch))
                except DAMAGE as error:
                    self._part(batch).unlink()
                    yield str(error)

    def assemble(self, batches: Sequence[range]) -> None:
        """Put all batches, which must be on disk, into the .npz file."""
        if not self.path.is_file():
            write_whole(self.path, partial(self._write_archive, batches=batches), self._check_arrays)
        flush_to_disk(self.path.parent)
        if self._parts.is_dir():
            shutil.rmtree(self._parts)

    def check(self) -> None:
        """Refuse a file that does not hold exactly the job's images and classes.

        Raises:
            ValueError: naming it and what it holds.
        """
        self._check_arrays(self.path)

    def read(self, places: Sequence[int]) -> np.ndarray:
        """Read some images of an assembled file, (n, H, W, 3)."""
        rows = self._images().rows([range(place, place + 1) for place in sorted(places)])
        return np.concatenate([*rows])[np.argsort(np.argsort(places))]

    def _images(self) -> NpzArray:
        """Look up the images in the .npz file."""
        return npz_arrays(self.path, [IMAGES_KEY])[IMAGES_KEY]

    def _check_arrays(self, path: Path) -> None:
        """Refuse an .npz file that does not hold the job's images and numbers."""
        arrays = npz_arrays(path, (IMAGES_KEY, *self._numbers))
        same = [
            name in arrays and np.array_equal(arrays[name].read(numbers.nbytes), numbers)
            for name, numbers in self._numbers.items()
        ]
        shape = arrays[IMAGES_KEY].shape if IMAGES_KEY in arrays else None
        if shape != self._shape or not all(same):
            held = f"an array {shape} and" + ("" if all(same) else " other") + " classes"
            raise ValueError(f"{path} holds {held}; expected {self._shape} and the classes of the job")

    def _part(self, batch: range) -> Path:
        """A batch's own file."""
        return self._parts / f"{batch.start:09d}.npy"

    def _check_part(self, batch: range, path: Path) -> None:
        """Refuse a file that does not hold a batch's images, all of them and nothing else."""
        shape = (len(batch), *self._shape[1:])
        try:
            images = np.load(path, mmap_mode="r")
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged ({error}); expected an array {shape}") from error
        if images.shape != shape or images.dtype != np.uint8 or images.offset + images.nbytes != path.stat().st_size:
            raise ValueError(f"{path} holds an array {images.shape} of {images.dtype}; expected {shape} of uint8")

    def _write_archive(self, file: BinaryIO, batches: Sequence[range]) -> None:
        """Write what `np.savez` would, byte for byte, with one batch in memory at a time."""
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
                np.lib.format.write_array_header_1_0(member, header)
                for batch in batches:
                    self._check_part(batch, self._part(batch))
                    member.write(np.load(self._part(batch)).data)
            for name, numbers in self._numbers.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, numbers)


class PictureFolder:
    """A picture file for each image, `images/<class>/<number>.png`, which an image folder reader reads back.

    Class folders are named by number and name, so that their order is the classes'; images without classes lie in
    `images` itself.

    Args:
        folder: of the job.
        class_labels: (N,) int64.
        num_classes: of the model; 0 if it is unconditional.
        class_names: of the model, or None.
        output_format: one of `PICTURE_FORMATS`.
        image_quality: of JPEG and WebP, 1 to 100.
        index: (N,) int64, the images' own numbers, by which they are named; None counts them as they come.
    """

    def __init__(
        self,
        folder: Path,
        class_labels: np.ndarray,
        num_classes: int,
        class_names: Sequence[str] | None,
        output_format: str,
        image_quality: int,
        index: np.ndarray | None = None,
    ):
        self.path = folder / PICTURES_NAME
        self._options = {"format": output_format}
        if output_format in LOSSY_FORMATS:
            self._options["quality"] = image_quality
        folders = [self.path / name for name in class_folder_names(num_classes, class_names)] or [self.path]
        width = len(str(len(class_labels) - 1))
        numbers = range(len(class_labels)) if index is None else index.tolist()
        self._files = [
            folders[label] / f"{number:0{width}d}.{output_format}"
            for number, label in zip(numbers, class_labels.tolist(), strict=True)
        ]

    def has(self, batch: range) -> bool:
        """Whether all of a batch's pictures are on disk."""
        return all(self._files[place].is_file() for place in batch)

    def write(self, batch: range, images: np.ndarray) -> None:
        """Write the pictures of a batch (n, H, W, 3) of bytes."""
        for place, image in zip(batch, images, strict=True):
            self._files[place].parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._files[place], partial(Image.fromarray(image).save, **self._options), _check_picture)

    def remove_damaged(self, batches: Sequence[range]) -> Iterator[str]:
        """Remove pictures that are not whole, so that they are drawn again, and yield what was wrong with each."""
        files = [file for batch in batches for file in self._files[batch.start : batch.stop] if file.is_file()]
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            for file, problem in zip(files, executor.map(_damage_of_picture, files), strict=True):
                if problem is not None:
                    file.unlink()
                    yield f"{file} is damaged ({problem})"

    def assemble(self, batches: Sequence[range]) -> None:
        """Remove what killed writes have left; the batches are the result."""
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()

    def check(self) -> None:
        """Refuse a folder that does not hold exactly the job's pictures.

        Raises:
            ValueError: naming a file too many or too few.
        """
        found = {Path(parent, name) for parent, _, names in os.walk(self.path) for name in names}
        wrong = min(found.symmetric_difference(self._files), default=None)
        if wrong is not None:
            problem = "is there" if wrong in found else "is missing"
            raise ValueError(f"{wrong} {problem}; expected exactly the job's {len(self._files)} images in {self.path}")

    def read(self, places: Sequence[int]) -> np.ndarray:
        """Read some pictures, (n, H, W, 3)."""
        images = []
        for place in places:
            with Image.open(self._files[place]) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.stack(images)


def _write_array(file: BinaryIO, images: np.ndarray) -> None:
    """Write what `np.save` would, byte for byte; that loses the error of a full disk."""
    header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(images).data)


def _damage_of_picture(path: Path) -> str | None:
    """Say what keeps a picture from being read; None where it can be."""
    try:
        with Image.open(path) as image:
            image.load()
            ending = _ENDINGS.get(image.format, b"")
        # PIL reads pictures to their last pixel, and no further.
        return None if path.read_bytes().endswith(ending) else "it is cut short"
    except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
        return str(error)


def _check_picture(path: Path) -> None:
    """Refuse a picture that cannot be read back."""
    damage = _damage_of_picture(path)
    if damage is not None:
        raise ValueError(f"{path} is damaged ({damage})")


def class_folder_names(num_classes: int, class_names: Sequence[str] | None) -> list[str]:
    """Name a folder for each class, such as `207-golden_retriever`: sorted by name they are in the classes' order.

    Args:
        num_classes: 0 gives no names.
        class_names: one a class, or None; what is no letter or digit becomes "_".

    Returns:
        The names.
    """
    names = [f"{label:0{len(str(num_classes - 1))}d}" for label in range(num_classes)]
    if class_names is None:
        return names
    words = [re.sub(r"\W+", "_", name)[:50] for name in class_names]
    return [f"{number}-{word}" for number, word in zip(names, words, strict=True)]


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and the classes of an .npz file, in the order of the images' own numbers where it holds these.

    Args:
        path: of it.

    Returns:
        (N, H, W, 3) uint8, and (N,) integers.

    Raises:
        ValueError: if it holds something else, or claims to hold more than its size can mean.
    """
    arrays = npz_arrays(path, (IMAGES_KEY, LABELS_KEY, INDEX_KEY))
    for key in (IMAGES_KEY, LABELS_KEY):
        if key not in arrays:
            raise ValueError(f"{path} cannot be read: it has no {key}; expected what `nextblock sample` writes")
    most = MAX_EXPANSION * os.path.getsize(path)
    for array in arrays.values():
        array.check_content()
    images, class_labels = (arrays[key].read(most) for key in (IMAGES_KEY, LABELS_KEY))
    is_whole = images.ndim == 4 and images.shape[3] == 3 and class_labels.shape == images.shape[:1]
    if not is_whole or images.dtype != np.uint8 or class_labels.dtype.kind not in "iu":
        held = f"arrays {images.shape} of {images.dtype} and {class_labels.shape} of {class_labels.dtype}"
        raise ValueError(f"{path} holds {held}; expected (N, H, W, 3) of uint8 and (N,) of integers")
    if INDEX_KEY not in arrays:
        return images, class_labels
    index = arrays[INDEX_KEY].read(most)
    if not np.array_equal(np.sort(index, axis=None), np.arange(len(images))):
        raise ValueError(f"{path}: {INDEX_KEY} is no order of {len(images)} images; expected each number once")
    places = np.argsort(index)
    return images[places], class_labels[places]
