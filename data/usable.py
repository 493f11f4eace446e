"""The images of a source that can be read: what is left when the others are found out beforehand.

Legend: N images.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from .images import ImageDataConfig, ImageSource, load_source
from .unreadable import UnreadableImageError


class UsableImages:
    """The images of a source without some of them, numbered anew.

    Args:
        source: N images.
        unreadable: positions of those that are left out.

    Raises:
        ValueError: if none is left.
    """

    def __init__(self, source: ImageSource, unreadable: Sequence[int]):
        self.class_names = source.class_names
        self._source = source
        self._positions = np.setdiff1d(np.arange(len(source)), np.array(unreadable, np.int64))
        if not len(self._positions):
            raise ValueError(f"none of the {len(source)} images can be read; expected some usable ones")
        self.captions = None if source.captions is None else [source.captions[n] for n in self._positions.tolist()]

    def __len__(self) -> int:
        return len(self._positions)

    def image(self, index: int) -> Image.Image:
        """Read an image; one that went bad since raises an UnreadableImageError."""
        return self._source.image(int(self._positions[index]))

    def label(self, index: int) -> int:
        """Return the image's class."""
        return self._source.label(int(self._positions[index]))

    def identifier(self, index: int) -> str:
        """Return the image's name."""
        return self._source.identifier(int(self._positions[index]))


def find_unreadable(source: ImageSource, indices: Sequence[int], num_threads: int = 1) -> list[dict]:
    """Read images and list those that cannot be read.

    Args:
        source: the images.
        indices: which of them to read.
        num_threads: threads that read.

    Returns:
        For each, its "index", "image_id", "reason" and "detail", see `nextblock.data.unreadable`.

    Raises:
        UnreadableImageError: where the machine is at fault and not the image.
    """
    with ThreadPoolExecutor(num_threads) as executor:
        found = executor.map(partial(_try, source), indices)
        return [entry for entry in found if entry is not None]


def open_usable(config: ImageDataConfig, split: str, report: Callable[[str], None]) -> ImageSource:
    """Open the images of a split, without those that cannot be read where `config.on_error` is "skip".

    Args:
        config: where the images are.
        split: which of them.
        report: is told in one line what is left out.

    Returns:
        The images.

    Raises:
        ValueError: if the images are missing or unusable.
    """
    source = load_source(config, split)
    unreadable = find_unreadable(source, range(len(source))) if config.on_error == "skip" else []
    if not unreadable:
        return source
    report(describe_unreadable(unreadable, len(source), split))
    return UsableImages(source, [entry["index"] for entry in unreadable])


def _try(source: ImageSource, index: int) -> dict | None:
    """Say what is wrong with an image; None for a good one."""
    try:
        source.image(index)
        return None
    except UnreadableImageError as error:
        if error.reason is None:
            raise
        name = source.identifier(index)
        return {"index": int(index), "image_id": name, "reason": error.reason, "detail": error.detail}


def describe_unreadable(unreadable: Sequence[dict], num_images: int, split: str) -> str:
    """Say in one line how many images are left out, why, and name some."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(e["reason"] for e in unreadable).most_common())
    examples = ", ".join(entry["image_id"] for entry in unreadable[:3])
    return (
        f"{len(unreadable)} of {num_images} images of split {split!r} cannot be read and are left out "
        f"({reasons}), such as {examples}"
    )


def source_fingerprint(source: ImageSource) -> str:
    """Hash the names and labels of all images, and their captions where they have some."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.identifier(index)}\t{source.label(index)}\n".encode())
        if source.captions is not None:
            digest.update((json.dumps(source.captions[index]) + "\n").encode())
    return digest.hexdigest()
