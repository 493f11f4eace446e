"""Labelled images from one of several places, and the dataset that turns them into model input.

A source hands out RGB pictures, labels and identifiers; `ImageDataset` resizes, augments and scales them.
Legend: B batch, HxW pixels, N images; pixel_values (3, H, W) in [-1, 1].
"""

import operator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from nextblock.files.names import restored_name

from .augment import TransformConfig, apply_transform
from .blocks import as_shape
from .captions import draw_captions, metadata_files
from .datasets_source import local_files, open_dataset
from .digits import DigitsSource, load_digits_split
from .image_folder import scan_image_folder
from .pixels import to_pixel_values
from .selection import numbered_from, share_of, with_class_names
from .streamed_source import open_stream
from .tar_source import TarSource, scan_tars, tar_files
from .unreadable import UnreadableImageError

SOURCES = ("digits", "folder", "datasets", "webdataset")


@dataclass(kw_only=True)
class ImageDataConfig:
    """Where images come from."""

    source: Literal["digits", "folder", "datasets", "webdataset"] | None = None
    """"digits" (scikit-learn's, 32x32), "folder" (image files), "datasets" (a dataset of that library) or
    "webdataset" (tar files of images with .cls labels); null where no images are given."""
    path: str | None = None
    """The image folder; a dataset's name on the hub, its folder, or what save_to_disk wrote; a folder of tar files."""
    split: str = "train"
    """The split to train on: for "folder" a sub-folder of path, or "train" for the whole path; for "datasets"
    also a slice such as "train[:90%]"; for "webdataset" split/*.tar or split*.tar in path."""
    eval_split: str | None = "test"
    """The split to evaluate on; none with null."""
    eval_fraction: float | None = None
    """Hold this share of `split` out under the name of `eval_split`, chosen by the images' names: for data without a
    split of its own."""
    class_names: list[str] | str | None = None
    """Names of the classes by label, or a file with one a line; null takes the data's own, or numbers."""
    first_label: int | None = None
    """Number of the first class where labels are bare numbers; null is 0, refused where labels look counted from 1."""
    image_column: str = "image"
    """The column of images ("datasets" only)."""
    label_column: str | None = "label"
    """The column of labels, numbers or texts ("datasets" only); null for unconditional data."""
    caption_column: str | None = None
    """Where captions are, a text or a list of texts an image: a column ("datasets"); a field of the metadata.jsonl or
    metadata.csv beside the images ("folder"); the ending of members such as 0001.txt ("webdataset"). null for none."""
    is_streamed: bool = False
    """Read a dataset as a stream, without a copy of it on the disk ("datasets" only). Streams can be tokenized, not
    trained on; each process first counts the rows in a pass over them, over the labels alone if files have columns."""
    on_error: Literal["stop", "skip"] = "stop"
    """At an image that cannot be read: "stop" there, or "skip" all such images, which are found by reading every image
    once beforehand; a training lists them in unreadable.json. (`tokenize` has an on_error of its own.)"""

    def __post_init__(self):
        if self.source not in (None, *SOURCES):
            raise ValueError(f"source={self.source!r}: expected one of {list(SOURCES)}")
        if self.source is None:
            given = [option.name for option in fields(self) if getattr(self, option.name) != option.default]
            if given:
                raise ValueError(f"data.source is missing; expected one of {list(SOURCES)} with data.{given[0]}")
            return
        if self.caption_column is not None and (self.source == "digits" or not self.caption_column):
            expected = "null: digits have no captions" if self.source == "digits" else "the name of a column, or null"
            raise ValueError(f"caption_column={self.caption_column!r}: expected {expected}")
        if self.source == "webdataset" and (self.caption_column or "").startswith("."):
            raise ValueError(f"caption_column={self.caption_column!r}: expected an ending without a dot, such as 'txt'")
        if self.source == "digits" and self.path is not None:
            raise ValueError(f"path={self.path!r}: source='digits' comes with scikit-learn and takes no path")
        if self.source != "digits" and not self.path:
            raise ValueError(f"path={self.path!r}: source={self.source!r} needs a path")
        if self.is_streamed and self.source != "datasets":
            raise ValueError(f"is_streamed=True: source={self.source!r} is no stream; expected source='datasets'")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={self.on_error!r}: expected one of ['stop', 'skip']")
        for name in ("split", "eval_split"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='': expected the name of a split")
        self._check_fraction()
        if self.first_label is not None and self.first_label < 0:
            raise ValueError(f"first_label={self.first_label}: expected 0 or more, or null")

    def _check_fraction(self) -> None:
        """Refuse a share to hold out that is none, or that there is no way or name to hold out."""
        fraction = self.eval_fraction
        if fraction is None:
            return
        if not 0 < fraction < 1:
            raise ValueError(f"eval_fraction={fraction}: expected a number between 0 and 1, or null")
        if self.eval_split in (None, self.split):
            raise ValueError(
                f"eval_split={self.eval_split!r} with eval_fraction={fraction}: expected a name for the images held "
                f"out, other than split={self.split!r}"
            )
        if self.is_streamed:
            raise ValueError(f"eval_fraction={fraction}: a stream cannot be divided; expected is_streamed=False")

    def check_given(self, hint: str = "") -> None:
        """Refuse a configuration that names no images.

        Args:
            hint: what else was looked for, for the message.

        Raises:
            ValueError: naming the options to give.
        """
        if self.source is None:
            raise ValueError(
                f"no images are given: data.source is missing{hint}; expected --data.source folder --data.path "
                f"my_images, or another of {list(SOURCES)}"
            )


class ImageSource(Protocol):
    """N labelled images; without classes where `class_names` is empty."""

    class_names: list[str]
    captions: list[tuple[str, ...]] | None
    """Of each image at least one text; None for images without captions."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The image as an RGB picture, not to be drawn on."""

    def label(self, index: int) -> int:
        """The class, a position in `class_names`; 0 for unconditional data."""

    def identifier(self, index: int) -> str:
        """A name that no other image of the source has and that stays the same from run to run."""


def load_source(config: ImageDataConfig, split: str, *, in_order: bool = False) -> ImageSource:
    """Opens one split of the configured images.

    Args:
        config: where the images are.
        split: which of them; class names and their order agree between the splits of one config.
        in_order: whether images will be read by increasing index, which is what a stream is for.

    Returns:
        The source.

    Raises:
        ValueError: naming the path, split, column or class that is missing or unusable, or refusing a stream that
            would be read in any other order.
    """
    config.check_given()
    if config.is_streamed and not in_order:
        raise ValueError(
            f"is_streamed=True: a stream of path={config.path!r} gives images in one order only, and here they are "
            "needed in any; expected is_streamed=False, or tokens that `nextblock tokenize` makes of the stream"
        )
    is_training = split == config.split
    if config.eval_fraction is None:
        source = numbered_from(_open(config, split), config.first_label, is_training=is_training)
    else:
        if split not in (config.split, config.eval_split):
            raise ValueError(f"split={split!r}: with eval_fraction there are {[config.split, config.eval_split]}")
        if config.source == "folder" and Path(config.path, config.eval_split).is_dir():
            raise ValueError(
                f"eval_fraction={config.eval_fraction}: path={config.path!r} has a sub-folder {config.eval_split!r}; "
                "expected null, or another eval_split"
            )
        source = numbered_from(_open(config, config.split), config.first_label, is_training=True)
        source = share_of(source, config.eval_fraction, wants_held_out=not is_training)
    return with_class_names(source, config.class_names, is_exact=config.source in ("digits", "folder"))


def _open(config: ImageDataConfig, split: str) -> ImageSource:
    """One split as the data has it."""
    if config.source == "digits":
        return DigitsSource(*load_digits_split(split))
    if config.source == "datasets":
        return open_stream(config, split) if config.is_streamed else open_dataset(config, split)
    root = Path(config.path)
    if config.source == "webdataset":
        return _open_tars(root, config, split)
    held_out = config.eval_split
    if held_out and (root / held_out).is_dir() and not (root / config.split).is_dir():
        # Else the whole path, held-out images included, would pass for the training split.
        raise ValueError(
            f"split={config.split!r} is not a sub-folder of path={config.path!r}, "
            f"although eval_split={held_out!r} is"
        )
    source = scan_image_folder(root, split)
    if split != config.split:
        # A class that has no image held out must not renumber the others.
        source = source.relabelled(scan_image_folder(root, config.split).class_names)
    return source if config.caption_column is None else source.captioned(config.caption_column)


def _open_tars(root: Path, config: ImageDataConfig, split: str) -> TarSource:
    """One split of tar files, with as many classes as the split that is trained on."""
    source = scan_tars(root, split, config.caption_column)
    if split != config.split:
        class_names = scan_tars(root, config.split).class_names
        if len(source.class_names) > len(class_names) or bool(class_names) != bool(source.class_names):
            raise ValueError(
                f"path={config.path!r}: split {split!r} has {len(source.class_names)} classes, split "
                f"{config.split!r} has {len(class_names)}; expected as many or fewer, or none in both"
            )
        source.class_names = class_names
    return source


def source_files(config: ImageDataConfig, source: ImageSource, split: str) -> tuple[Path | None, list[str]]:
    """Lists the files that a source's images are read from.

    Args:
        config: where the images are.
        source: what `load_source` opened.
        split: which split that is.

    Returns:
        A folder and paths below it, in an order that stays; None and no paths for images that lie in no folder here.
    """
    if config.source == "folder":
        root, files = Path(config.path), [restored_name(source.identifier(index)) for index in range(len(source))]
        return root, files if config.caption_column is None else files + metadata_files(root, files)
    if config.source == "webdataset":
        root = Path(config.path)
        files = tar_files(root, split if config.eval_fraction is None else config.split)
        return root, [file.relative_to(root).as_posix() for file in files]
    if config.source == "datasets" and Path(config.path).is_dir():
        return Path(config.path), local_files(config.path)
    return None, []


class ImageDataset(Dataset):
    """The images of a source as model input, augmented as a pure function of (seed, epoch, index).

    Args:
        source: the images.
        image_size: (H, W) in pixels, or one integer for a square.
        transform: how images are brought to that size and varied.
        seed: 0 or more.
        gives_captions: whether an item has one of its image's captions.

    Raises:
        ValueError: if `image_size` or `seed` is out of range, or captions are asked for and there are none.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int | tuple[int, int],
        transform: TransformConfig,
        seed: int,
        *,
        gives_captions: bool = False,
    ):
        if gives_captions and source.captions is None:
            raise ValueError(f"gives_captions=True: the {len(source)} images have no captions")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected 0 or more")
        self.source = source
        self.image_size = as_shape(image_size, "image_size")
        self.transform = transform
        self.seed = seed
        self.gives_captions = gives_captions

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Reads one image.

        Args:
            key: (epoch, index), or an index alone for epoch 0.

        Returns:
            "pixel_values" float32 (3, H, W) in [-1, 1], "class_labels" int, "index" int, and where captions are given
            "caption", drawn anew in every epoch.

        Raises:
            IndexError: if the index is not in 0..N-1.
            ValueError: if the image cannot be read.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[dict]:
        """Reads several images at once, which is how a DataLoader asks; a tenth faster than one by one.

        Args:
            keys: each as for one image.

        Returns:
            An item for each key.
        """
        keys = [self._checked(key) for key in keys]
        pixels = np.stack([self._transformed(epoch, index) for epoch, index in keys])
        items = [
            {"pixel_values": pixel_values, "class_labels": self.source.label(index), "index": index}
            for pixel_values, (_, index) in zip(to_pixel_values(pixels), keys, strict=True)
        ]
        if self.gives_captions:
            texts = [self.source.captions[index] for _, index in keys]
            numbers = draw_captions([len(each) for each in texts], self.seed, *zip(*keys, strict=True))
            for item, each, number in zip(items, texts, numbers, strict=True):
                item["caption"] = each[number]
        return items

    def _checked(self, key: int | tuple[int, int]) -> tuple[int, int]:
        """The key as (epoch, index), the index in range."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = operator.index(index)
        if not 0 <= index < len(self.source):
            raise IndexError(f"index {index} is not in 0..{len(self.source) - 1}")
        return epoch, index

    def _transformed(self, epoch: int, index: int) -> np.ndarray:
        """The image at its final size, uint8 (H, W, 3)."""
        try:
            image = self.source.image(index)
        except UnreadableImageError as error:
            hint = f" ({error.reason}; data.on_error=skip leaves such images out)" if error.reason else ""
            error.args = (f"{error}{hint}",)
            raise
        return apply_transform(image, self.image_size, self.transform, self.seed, epoch, index)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Stacks items of an `ImageDataset` into a batch.

    Args:
        items: B items.

    Returns:
        "pixel_values" float32 (B, 3, H, W), "class_labels" and "index" int64 (B,).
    """
    batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
    for name in ("class_labels", "index"):
        batch[name] = torch.tensor([item[name] for item in items], dtype=torch.int64)
    return batch
