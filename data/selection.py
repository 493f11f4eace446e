"""Part of a source's images, with labels and class names of its own: held-out shares, renamed and renumbered classes.

Whether an image is held out is a function of its identifier alone: more images, or another order, move none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from nextblock.files.regular import is_regular, read_text

from .class_numbers import check_names

if TYPE_CHECKING:
    from .images import ImageSource


class SelectedSource:
    """Some images of a source.

    Args:
        source: all images.
        indices: N positions of those selected, increasing.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], labels: Sequence[int], class_names: list[str]):
        self.class_names = class_names
        self.captions = None if source.captions is None else [source.captions[n] for n in indices]
        self._source = source
        self._indices = indices
        self._labels = labels

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Image.Image:
        """The picture, as the source has it."""
        return self._source.image(self._indices[index])

    def label(self, index: int) -> int:
        """The class, a position among the class names."""
        return self._labels[index]

    def identifier(self, index: int) -> str:
        """The source's name of the image."""
        return self._source.identifier(self._indices[index])


def is_held_out(identifier: str, fraction: float) -> bool:
    """Tell whether an image belongs to the held-out share.

    Args:
        identifier: the image's name in its source.
        fraction: the share, between 0 and 1.
    """
    digest = hashlib.blake2b(identifier.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def share_of(source: ImageSource, fraction: float, *, wants_held_out: bool) -> SelectedSource:
    """Divide a source by its images' identifiers.

    Args:
        source: all images.
        fraction: the share that is held out.
        wants_held_out: which part to return.

    Returns:
        The held-out images, or the others.

    Raises:
        ValueError: if that part is empty.
    """
    indices = [n for n in range(len(source)) if is_held_out(source.identifier(n), fraction) == wants_held_out]
    if not indices:
        part = "held-out part" if wants_held_out else "part to train on"
        raise ValueError(f"eval_fraction={fraction}: the {part} of {len(source)} images is empty")
    return SelectedSource(source, indices, [source.label(n) for n in indices], source.class_names)


def numbered_from(source: ImageSource, first_label: int | None, *, is_training: bool) -> ImageSource:
    """Let classes that are named by number begin at another number than 0.

    Args:
        source: the images.
        first_label: the number of the first class; None for 0, which is refused where labels look like numbers from 1.
        is_training: whether these are the training images, which show where numbers begin.

    Returns:
        The source, or its images labelled from 0 on.

    Raises:
        ValueError: if labels run from 1 without a gap and `first_label` does not say why, or one is below it.
    """
    names = source.class_names
    if first_label == 0 or names != [str(number) for number in range(len(names))] or not names:
        if first_label:
            raise ValueError(f"first_label={first_label}: classes have names, {names[:5]}; expected null")
        return source
    labels = [source.label(n) for n in range(len(source))]
    if first_label is None:
        if is_training and len(names) > 2 and set(labels) == set(range(1, len(names))):
            raise ValueError(
                f"labels run from 1 to {len(names) - 1}: class 0 would have no image; expected --data.first_label 1 "
                "where they are counted from 1, or --data.first_label 0 where class 0 is missing by chance"
            )
        return source
    if min(labels) < first_label:
        raise ValueError(f"first_label={first_label}: an image has the label {min(labels)}; expected none below it")
    shifted = [label - first_label for label in labels]
    return SelectedSource(source, range(len(source)), shifted, names[first_label:])


def with_class_names(source: ImageSource, given: list[str] | str | None, *, is_exact: bool) -> ImageSource:
    """Name the classes.

    Args:
        source: the images.
        given: names by label, or a file with one a line; None leaves the source's own.
        is_exact: whether the source knows all of its classes; else there may be more names than labels seen.

    Returns:
        The source, under the names given.

    Raises:
        ValueError: if names are too few, too many, blank or repeated, or the file is not there.
    """
    if given is None:
        return source
    names = given
    if isinstance(given, str):
        if not is_regular(given):
            raise ValueError(f"class_names={given!r} is no file; expected names by label, or a file with one a line")
        names = read_text(given).splitlines()
    names = [name.strip() for name in names]
    check_names(names, f"class_names={str(given)[:200]}")
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"class_names={given!r} holds blank or repeated names; expected one for each class")
    num_classes = len(source.class_names)
    if len(names) < num_classes or (is_exact or not num_classes) and len(names) != num_classes:
        raise ValueError(f"class_names={given!r}: {len(names)} names for {num_classes} classes; expected as many")
    source.class_names = names
    return source
