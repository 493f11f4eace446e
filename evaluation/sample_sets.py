"""Sets of images to be evaluated, read as a stream: an .npz file, or a folder of pictures.

Every process reads its own batches, and no more than two of them are in memory at a time.
Legend: N images, n of a batch, HxW pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from nextblock.data.image_folder import scan_whole_folder
from nextblock.data.keyed_random import keyed_order
from nextblock.data.reading import picture_header
from nextblock.data.unreadable import UnreadableImageError
from nextblock.files.atomic import file_sha256
from nextblock.files.npz import NpzArray, npz_arrays, npz_keys
from nextblock.files.part_jobs import JOB_NAME
from nextblock.files.regular import is_regular, read_json

from .sample_order import IN_TURN, turn_order

# ADM's evaluator wants the images under the first name; the second is where its samples have their classes.
IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"
# Where `nextblock sample` keeps the images' own numbers, and in its job.json how many prompts it draws of.
INDEX_KEY, PROMPTS_KEY = "index", "num_prompts"
NPZ_NAME, PICTURES_NAME = "images.npz", "images"
# Classes and numbers of as many images as a job may have, 10^8.
_MAX_NUMBERS_BYTES = 8 * 10**8
_NUM_READERS = 4
# Of a class's folder: "207", or "207-golden_retriever" as `nextblock sample` names it.
_CLASS_NUMBER = re.compile(r"(\d{1,9})(-.*)?", re.DOTALL)


class SampleSet(Protocol):
    """Images of one size, numbered from 0 to N - 1.

    Args:
        path: what was opened, a file or a folder.
        image_size: (H, W).
        format: "npz", or the pictures' kind in PIL's words, "png" say; several kinds are joined by "+".
        class_labels: (N,) int64, or None where there are no classes.
        index: (N,) int64, each image's own number in the sampling job; None where none is known.
        job: what `job.json` says of the sampling job, or None.
    """

    path: Path
    image_size: tuple[int, int]
    format: str
    class_labels: np.ndarray | None
    index: np.ndarray | None
    job: dict | None

    def __len__(self) -> int:
        """N."""

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every `world_size`-th batch from batch `rank` on.

        Batches are the same for any number of processes: image numbers 0 to n - 1, then the next n, the last shorter.

        Args:
            batch_size: n ≥ 1.
            rank: of this process.
            world_size: how many processes share the images.

        Yields:
            The images' numbers (n,) int64, ascending, and the images (n, H, W, 3) uint8.

        Raises:
            ValueError: naming the file that is damaged or of another size.
        """

    def images(self, numbers: Sequence[int]) -> np.ndarray:
        """Read some images, (n, H, W, 3) uint8, in the order of their numbers given."""

    def sha256(self) -> str:
        """Hash the content: of an .npz file its bytes, of a folder the names and bytes of its pictures."""


def open_samples(path: str | Path) -> SampleSet:
    """Open a set of images.

    Args:
        path: an .npz file with `arr_0` (N, H, W, 3) uint8 and, where there are classes, `arr_1` (N,) integers; the
            folder of a finished `nextblock sample`; or a folder of pictures, in sub-folders where there are classes.

    Returns:
        The set. What is wrong with the files of an .npz is said here; of pictures the sizes are, by what their headers
        say.

    Raises:
        ValueError: naming what is missing, empty, damaged, unfinished or of another kind, size or dtype.
    """
    path = Path(path)
    if not path.is_dir():
        if not is_regular(path):
            raise ValueError(f"{path} does not exist; expected an .npz file or a folder of pictures")
        if path.suffix != ".npz":
            raise ValueError(f"{path} is a file; expected an .npz file or a folder of pictures")
        return NpzSamples(path, _job_of(path.parent))
    job = _job_of(path)
    if is_regular(path / NPZ_NAME):
        return NpzSamples(path / NPZ_NAME, job)
    if job is not None:
        path = path / PICTURES_NAME
        if not path.is_dir():
            raise ValueError(f"{path.parent} holds a sampling job without images; expected a finished one")
    elif path.name == PICTURES_NAME:
        job = _job_of(path.parent)
    return PictureSamples(path, job)


def _job_of(folder: Path) -> dict | None:
    """Read what a sampling job in a folder is; None where there is none."""
    if not is_regular(folder / JOB_NAME):
        return None
    job = read_json(folder / JOB_NAME)
    if not isinstance(job, dict):
        return None
    kinds = {"num_images_per_label": int, "seed": int}
    kinds |= {PROMPTS_KEY: int} if PROMPTS_KEY in job else {"class_labels": list}
    return job if all(isinstance(job.get(name), kind) for name, kind in kinds.items()) else None


def is_of_prompts(job: dict | None) -> bool:
    """Tell whether the numbers in a job's class labels are those of prompts, and no classes.

    Args:
        job: see `SampleSet`.
    """
    return job is not None and PROMPTS_KEY in job


class NpzSamples:
    """The images of an .npz file; see `SampleSet`.

    Args:
        path: of the file.
        job: see `SampleSet`.

    Raises:
        ValueError: if the file is damaged, empty, or holds something else.
    """

    def __init__(self, path: Path, job: dict | None = None):
        self.path, self.job, self.format = path, job, "npz"
        arrays = npz_arrays(path, (IMAGES_KEY, LABELS_KEY, INDEX_KEY))
        if IMAGES_KEY not in arrays:
            raise ValueError(
                f"{path} holds the arrays {npz_keys(path)}; expected {IMAGES_KEY}, images (N, H, W, 3) of uint8"
            )
        self._images = arrays[IMAGES_KEY]
        shape, dtype = self._images.shape, self._images.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"{path}: {IMAGES_KEY} is {shape} of {dtype}; expected (N, H, W, 3) of uint8")
        if 0 in shape:
            raise ValueError(f"{path}: {IMAGES_KEY} is {shape}; expected at least one image of at least one pixel")
        self.image_size = shape[1:3]
        self._images.check_content()
        self.class_labels = _read_numbers(arrays.get(LABELS_KEY), shape[0])
        self.index = _read_numbers(arrays.get(INDEX_KEY), shape[0])

    def __len__(self) -> int:
        return self._images.shape[0]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `SampleSet.batches`."""
        own = _own_batches(len(self), batch_size, rank, world_size)
        for batch, images in zip(own, self._images.rows(own), strict=True):
            yield np.arange(batch.start, batch.stop), images

    def images(self, numbers: Sequence[int]) -> np.ndarray:
        """See `SampleSet.images`."""
        ascending, places = np.unique(_checked(numbers, len(self)), return_inverse=True)
        rows = self._images.rows([range(number, number + 1) for number in ascending.tolist()])
        return np.concatenate([*rows])[places]

    def sha256(self) -> str:
        """See `SampleSet.sha256`."""
        return file_sha256(self.path)


class PictureSamples:
    """The pictures of a folder; see `SampleSet`.

    The pictures of a sampling job are numbered in the order in which its .npz file would hold them. Those of any other
    folder have no order, and are numbered in one that is random, the same for the same names: sorted by name they
    would be sorted by class.

    A class is a sub-folder. Where the names of all begin with numbers, as `nextblock sample` writes them, these are the
    classes; elsewhere classes are counted in the order of the names.

    Args:
        path: of the folder.
        job: see `SampleSet`.

    Raises:
        ValueError: if there is no picture, one cannot be read, sizes differ, or pictures of the job are missing.
    """

    def __init__(self, path: Path, job: dict | None = None):
        self.path, self.job, self.index = path, job, None
        self._source = scan_whole_folder(path)
        self._names = [self._source.identifier(number) for number in range(len(self._source))]
        self._order = keyed_order(0, num_items=len(self._names)).numpy()
        if job is not None:
            self._order_as_job(job)
        self.class_labels = None
        if self._source.class_names:
            labels = np.array([self._source.label(place) for place in self._order.tolist()], np.int64)
            self.class_labels = class_numbers(self._source.class_names)[labels]
        self.image_size = self._picture(int(self._order[0])).shape[:2]
        self.format = self._check_headers()

    def __len__(self) -> int:
        return len(self._names)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `SampleSet.batches`; the next batch is read while the caller works on one."""
        with ThreadPoolExecutor(_NUM_READERS) as executor:

            def begin(batch: range) -> list[Future]:
                return [executor.submit(self._picture, place) for place in self._order[batch.start : batch.stop]]

            own = _own_batches(len(self), batch_size, rank, world_size)
            coming = [begin(batch) for batch in own[:1]]
            for number, batch in enumerate(own):
                coming += [begin(following) for following in own[number + 1 : number + 2]]
                images = np.stack([picture.result() for picture in coming.pop(0)])
                yield np.arange(batch.start, batch.stop), images

    def images(self, numbers: Sequence[int]) -> np.ndarray:
        """See `SampleSet.images`."""
        return np.stack([self._picture(place) for place in self._order[_checked(numbers, len(self))]])

    def sha256(self) -> str:
        """See `SampleSet.sha256`."""
        digest = hashlib.sha256()
        for name, file in sorted(zip(self._names, self._source.files(), strict=True)):
            digest.update(f"{name}\0{file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def _order_as_job(self, job: dict) -> None:
        """Number the pictures as the sampling job does, which names each by its own number."""
        num_labels = job[PROMPTS_KEY] if is_of_prompts(job) else len(job["class_labels"])
        num_images_per_label = job["num_images_per_label"]
        num_images = num_labels * num_images_per_label
        places = {Path(name).stem: place for place, name in enumerate(self._names)}
        width = len(str(num_images - 1))
        expected = [f"{number:0{width}d}" for number in range(num_images)]
        missing = [stem for stem in expected if stem not in places]
        if missing or len(self._names) != num_images:
            raise ValueError(
                f"{self.path} holds {len(self._names)} pictures, of which {num_images - len(missing)} are of the "
                f"sampling job; expected all its {num_images} and no other: let `nextblock sample` finish it"
            )
        self.index = np.arange(num_images)
        if job.get("class_order") == IN_TURN:
            self.index = turn_order(job["seed"], num_labels, num_images_per_label)
        self._order = np.array([places[stem] for stem in expected])[self.index]

    def _picture(self, place: int) -> np.ndarray:
        """Read the picture that is at some place among the sorted names, (H, W, 3)."""
        picture = np.array(self._source.image(int(place)))
        size = getattr(self, "image_size", picture.shape[:2])
        if picture.shape[:2] != size:
            self._refuse_size(int(place), picture.shape[:2])
        return picture

    def _refuse_size(self, place: int, size: tuple[int, int]) -> None:
        """Say that a picture is of another size."""
        raise ValueError(
            f"{self.path}: {self._names[place]} is {size[0]}x{size[1]}, {self._names[int(self._order[0])]} "
            f"{self.image_size[0]}x{self.image_size[1]}; expected pictures of one size (height x width)"
        )

    def _check_headers(self) -> str:
        """Look at the header of every picture; return the kinds that there are."""
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            headers = list(executor.map(_header, self._source.files()))
        for place, (_, size) in enumerate(headers):
            # Turned upright, which is done when it is read, it may be of the right size.
            if size not in (self.image_size, self.image_size[::-1]):
                self._refuse_size(place, size)
        return "+".join(sorted({kind for kind, _ in headers}))


def _own_batches(num_images: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """Return the batches of a process."""
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size is {batch_size}, rank {rank} of {world_size}; expected a positive integer and a rank from 0 "
            "to one under the number of processes"
        )
    starts = range(batch_size * rank, num_images, batch_size * world_size)
    return [range(start, min(start + batch_size, num_images)) for start in starts]


def _checked(numbers: Sequence[int], num_images: int) -> np.ndarray:
    """Refuse numbers that no image has."""
    numbers = np.asarray(numbers, np.int64)
    if not numbers.size or numbers.min() < 0 or numbers.max() >= num_images:
        raise ValueError(f"numbers are {numbers[:10].tolist()}; expected some from 0 to {num_images - 1}")
    return numbers


def _read_numbers(array: NpzArray | None, num_images: int) -> np.ndarray | None:
    """Read an array that holds an integer for each image, where there is one."""
    if array is None:
        return None
    if array.shape != (num_images,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{array.path}: {array.key} is {array.shape} of {array.dtype}; expected ({num_images},) of integers, one "
            "for each image"
        )
    numbers = array.read(_MAX_NUMBERS_BYTES).astype(np.int64)
    if numbers.min() < 0:
        where = f"{array.path}: {array.key} holds {numbers.min()} at {numbers.argmin()}"
        raise ValueError(f"{where}; expected 0 or more for each image")
    return numbers


def class_numbers(names: list[str]) -> np.ndarray:
    """Return the class that each folder stands for: the number that its name begins with, or else its place.

    Args:
        names: of all folders, sorted.
    """
    matches = [_CLASS_NUMBER.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    is_numbered = len(set(numbers)) == len(names)
    return np.array(numbers if is_numbered else range(len(names)), np.int64)


def _header(file: Path) -> tuple[str, tuple[int, int]]:
    """Return the kind of a picture and its (H, W), by its header."""
    try:
        return picture_header(file)
    except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
        raise UnreadableImageError(f"the image file {file}", str(file), error) from error
