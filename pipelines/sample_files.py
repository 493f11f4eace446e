"""The images of a sampling job on disk: one .npz file put together from parts, or folders of pictures.

Every file is written under a temporary name, flushed and renamed, so that it is whole or not there.
Legend: N images of the job, n of a batch, HxW pixels.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from nextblock.files.atomic import flush_to_disk, write_whole
from nextblock.files.regular import open_regular

NPZ_NAME = "images.npz"
# ADM's evaluator wants the images under the first name; the second is where its samples have their labels.
IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"
LOSSY_FORMATS = ("jpeg", "webp")
PICTURE_FORMATS = ("png", *LOSSY_FORMATS)
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_NUM_READERS = 4
# What reading an archive or array that was cut short may raise.
_DAMAGE = (OSError, ValueError, EOFError, KeyError, struct.error, zipfile.BadZipFile)
# Pictures of one colour are all that packs more tightly.
MAX_EXPANSION = 100


class NpzFile:
    """One .npz file in the layout of ADM's evaluator, `arr_0` (N, H, W, 3) uint8 and `arr_1` (N,) int64, the classes.

    Batches wait as files in `parts`, which vanishes once all are in the .npz file.

    Args:
        folder: of the job.
        class_labels: (N,) int64.
        image_size: (H, W).
    """

    def __init__(self, folder: Path, class_labels: np.ndarray, image_size: Sequence[int]):
        self.path = folder / NPZ_NAME
        self._parts = folder / "parts"
        self._class_labels = class_labels
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
                map_images(self.path)
                with np.load(self.path) as arrays:
                    arrays[LABELS_KEY].shape  # noqa: B018  It is read here.
            except _DAMAGE as error:
                self.path.unlink()
                yield f"{self.path} is damaged ({error})"
        for batch in batches:
            if self._part(batch).is_file():
                try:
                    self._check_part(batch, self._part(batch))
                except _DAMAGE as error:
                    self._part(batch).unlink()
                    yield str(error)

    def assemble(self, batches: Sequence[range]) -> None:
        """Put all batches, which must be on disk, into the .npz file."""
        if not self.path.is_file():
            write_whole(self.path, partial(self._write_archive, batches=batches), map_images)
        flush_to_disk(self.path.parent)
        if self._parts.is_dir():
            shutil.rmtree(self._parts)

    def check(self) -> None:
        """Refuse a file that does not hold exactly the job's images and classes.

        Raises:
            ValueError: naming it and what it holds.
        """
        images = map_images(self.path)
        with np.load(self.path) as arrays:
            has_labels = np.array_equal(arrays[LABELS_KEY], self._class_labels)
        if images.shape != self._shape or not has_labels:
            held = f"an array {images.shape} and" + ("" if has_labels else " other") + " classes"
            raise ValueError(f"{self.path} holds {held}; expected {self._shape} and the classes of the job")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Read some images of an assembled file, (n, H, W, 3)."""
        return map_images(self.path)[list(indices)]

    def _part(self, batch: range) -> Path:
        """A batch's own file."""
        return self._parts / f"{batch.start:09d}.npy"

    def _check_part(self, batch: range, path: Path) -> None:
        """Refuse a file that does not hold a batch's images, all of them and nothing else."""
        shape = (len(batch), *self._shape[1:])
        try:
            images = np.load(path, mmap_mode="r")
        except _DAMAGE as error:
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
            with archive.open(f"{LABELS_KEY}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, self._class_labels)


class PictureFolder:
    """A picture file for each image, `images/<class>/<position>.png`, which an image folder reader reads back.

    Class folders are named by number and name, so that their order is the classes'; images without classes lie in
    `images` itself.

    Args:
        folder: of the job.
        class_labels: (N,) int64.
        num_classes: of the model; 0 if it is unconditional.
        class_names: of the model, or None.
        output_format: one of `PICTURE_FORMATS`.
        image_quality: of JPEG and WebP, 1 to 100.
    """

    def __init__(
        self,
        folder: Path,
        class_labels: np.ndarray,
        num_classes: int,
        class_names: Sequence[str] | None,
        output_format: str,
        image_quality: int,
    ):
        self.path = folder / "images"
        self._options = {"format": output_format}
        if output_format in LOSSY_FORMATS:
            self._options["quality"] = image_quality
        folders = [self.path / name for name in class_folder_names(num_classes, class_names)] or [self.path]
        width = len(str(len(class_labels) - 1))
        self._files = [
            folders[label] / f"{index:0{width}d}.{output_format}" for index, label in enumerate(class_labels.tolist())
        ]

    def has(self, batch: range) -> bool:
        """Whether all of a batch's pictures are on disk."""
        return all(self._files[index].is_file() for index in batch)

    def write(self, batch: range, images: np.ndarray) -> None:
        """Write the pictures of a batch (n, H, W, 3) of bytes."""
        for index, image in zip(batch, images, strict=True):
            self._files[index].parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._files[index], partial(Image.fromarray(image).save, **self._options), _check_picture)

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

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Read some pictures, (n, H, W, 3)."""
        images = []
        for index in indices:
            with Image.open(self._files[index]) as image:
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
    """Read the images and the classes of an .npz file.

    Args:
        path: of it.

    Returns:
        (N, H, W, 3) uint8, and (N,) integers.

    Raises:
        ValueError: if it holds something else, or claims to hold more than its size can mean.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for key in (IMAGES_KEY, LABELS_KEY):
                _check_claim(archive, key, path)
            file.seek(0)
            with np.load(file) as arrays:
                images, class_labels = arrays[IMAGES_KEY], arrays[LABELS_KEY]
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected what `nextblock sample` writes") from error
    is_whole = images.ndim == 4 and images.shape[3] == 3 and class_labels.shape == images.shape[:1]
    if not is_whole or images.dtype != np.uint8 or class_labels.dtype.kind not in "iu":
        held = f"arrays {images.shape} of {images.dtype} and {class_labels.shape} of {class_labels.dtype}"
        raise ValueError(f"{path} holds {held}; expected (N, H, W, 3) of uint8 and (N,) of integers")
    return images, class_labels


def _check_claim(archive: zipfile.ZipFile, key: str, path: Path) -> None:
    """Refuse an array whose header claims another size than its member has, or a member that unpacks without end."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{path}: {key} is of version {version}; expected one of {list(read_header)}")
        shape, _, dtype = read_header[version](member)
        claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    most = MAX_EXPANSION * os.path.getsize(path)
    if claimed != held or held > most:
        raise ValueError(
            f"{path}: the header of {key} claims {claimed} bytes, its member {held}; expected as many, {most} at most"
        )


def map_images(path: Path) -> np.ndarray:
    """Map the images of an .npz file that holds them uncompressed into memory, (N, H, W, 3) uint8."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{IMAGES_KEY}.npy").header_offset
    with open(path, "rb") as file:
        # A zip member begins with 30 bytes, of which the last four count those of its name and of extra fields.
        file.seek(start + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)
