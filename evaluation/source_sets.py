"""Images of any source as a set to be evaluated, brought to one size by a crop that results name.

Legend: N images, n of a batch, HxW pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nextblock.data.adm_crop import adm_crop
from nextblock.data.augment import cover_and_crop
from nextblock.data.images import ImageSource
from nextblock.files.atomic import file_sha256

CROPS = ("center", "adm")
_NUM_READERS = 4


class SourceSet:
    """A source's images at one size; see `nextblock.evaluation.sample_sets.SampleSet`.

    Args:
        source: N images of any sizes.
        name: what the images are called in results.
        image_size: (H, W).
        crop: "center", the largest centred part of the proportions, by a Lanczos filter, as trainings see held-out
            images; or "adm", as ADM prepared ImageNet, squares alone.

    Raises:
        ValueError: if there is no image, or the crop is none of these or not for this size.
    """

    def __init__(self, source: ImageSource, name: str, image_size: tuple[int, int], crop: str = "center"):
        if crop not in CROPS:
            raise ValueError(f"crop is {crop!r}; expected one of {list(CROPS)}")
        if crop == "adm" and image_size[0] != image_size[1]:
            raise ValueError(f"crop is 'adm' for images of {image_size[0]}x{image_size[1]}; expected squares")
        if not len(source):
            raise ValueError(f"{name} holds no image; expected at least one")
        self._source, self._crop = source, crop
        self.path, self.image_size, self.format = Path(name), tuple(image_size), f"{crop} crop"
        self.index, self.job, self.class_labels = None, None, None
        if source.class_names:
            self.class_labels = np.array([source.label(number) for number in range(len(source))], np.int64)

    def __len__(self) -> int:
        return len(self._source)

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `SampleSet.batches`."""
        with ThreadPoolExecutor(_NUM_READERS) as executor:
            for first in range(rank * batch_size, len(self), world_size * batch_size):
                numbers = np.arange(first, min(first + batch_size, len(self)))
                yield numbers, np.stack(list(executor.map(self._picture, numbers.tolist())))

    def images(self, numbers: Sequence[int]) -> np.ndarray:
        """See `SampleSet.images`."""
        return np.stack([self._picture(int(number)) for number in numbers])

    def sha256(self) -> str:
        """Hash names and bytes of the files; where there are none, names and pixels."""
        digest = hashlib.sha256()
        names = [self._source.identifier(number) for number in range(len(self))]
        if hasattr(self._source, "files"):
            for name, file in sorted(zip(names, self._source.files(), strict=True)):
                digest.update(f"{name}\0{file_sha256(file)}\n".encode("utf-8", "surrogateescape"))
            return digest.hexdigest()
        for number, name in enumerate(names):
            pixels = hashlib.sha256(self._source.image(number).tobytes()).hexdigest()
            digest.update(f"{name}\0{pixels}\n".encode())
        return digest.hexdigest()

    def _picture(self, number: int) -> np.ndarray:
        """Return one image, (H, W, 3)."""
        image = self._source.image(number)
        cropped = adm_crop(image, self.image_size[0]) if self._crop == "adm" else cover_and_crop(image, self.image_size)
        return np.asarray(cropped)
