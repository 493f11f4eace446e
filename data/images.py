"""Labelled images from one of three places, and the dataset that turns them into model input.

A source hands out RGB pictures, labels and identifiers; `ImageDataset` resizes, augments and scales them.
Legend: B batch, HxW pixels, N images; pixel_values (3, H, W) in [-1, 1].
"""

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .augment import TransformConfig, apply_transform
from .blocks import as_shape
from .digits import DigitsSource, load_digits_split
from .image_folder import scan_image_folder, to_rgb
from .tar_source import TarSource, scan_tars
from .unreadable import UnreadableImageError

IMAGE_DTYPES = ("PIL.Image.Image", "binary", "large_binary", "string", "large_string")


@dataclass(kw_only=True)
class ImageDataConfig:
    """Where images come from."""

    source: Literal["digits", "folder", "datasets", "webdataset"] = "digits"
    """"digits" (scikit-learn's, 32x32), "folder" (image files), "datasets" (a dataset of that library) or
    "webdataset" (tar files of images with .cls labels)."""
    path: str | None = None
    """The image folder; a dataset's name on the hub, its folder, or what save_to_disk wrote; a folder of tar files."""
    split: str = "train"
    """The split to train on: for "folder" a sub-folder of path, or "train" for the whole path; for "datasets"
    also a slice such as "train[:90%]"; for "webdataset" split/*.tar or split*.tar in path."""
    eval_split: str | None = "test"
    """The split to evaluate on; none with null."""
    image_column: str = "image"
    """The column of images ("datasets" only)."""
    label_column: str | None = "label"
    """The column of integer labels ("datasets" only); null for unconditional data."""

    def __post_init__(self):
        sources = ("digits", "folder", "datasets", "webdataset")
        if self.source not in sources:
            raise ValueError(f"source={self.source!r}: expected one of {list(sources)}")
        if self.source == "digits" and self.path is not None:
            raise ValueError(f"path={self.path!r}: source='digits' comes with scikit-learn and takes no path")
        if self.source != "digits" and not self.path:
            raise ValueError(f"path={self.path!r}: source={self.source!r} needs a path")
        for name in ("split", "eval_split"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='': expected the name of a split")


class ImageSource(Protocol):
    """N labelled images; unconditional where `class_names` is empty."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The image as an RGB picture, not to be drawn on."""

    def label(self, index: int) -> int:
        """The class, a position in `class_names`; 0 for unconditional data."""

    def identifier(self, index: int) -> str:
        """A name that no other image of the source has and that stays the same from run to run."""


def load_source(config: ImageDataConfig, split: str) -> ImageSource:
    """Opens one split of the configured images.

    Args:
        config: where the images are.
        split: which of them; class names and their order agree between the splits of one config.

    Returns:
        The source.

    Raises:
        ValueError: naming the path, split, column or class that is missing or unusable.
    """
    if config.source == "digits":
        return DigitsSource(*load_digits_split(split))
    if config.source == "datasets":
        return _open_dataset(config, split)
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
    return source


def _open_tars(root: Path, config: ImageDataConfig, split: str) -> TarSource:
    """One split of tar files, with as many classes as the split that is trained on."""
    source = scan_tars(root, split)
    if split != config.split:
        class_names = scan_tars(root, config.split).class_names
        if len(source.class_names) > len(class_names) or bool(class_names) != bool(source.class_names):
            raise ValueError(
                f"path={config.path!r}: split {split!r} has {len(source.class_names)} classes, split "
                f"{config.split!r} has {len(class_names)}; expected as many or fewer, or none in both"
            )
        source.class_names = class_names
    return source


class DatasetsSource:
    """Rows of a `datasets` dataset.

    Args:
        rows: a `datasets.Dataset` of N undecoded images.
        image_column: the column they are in.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
        name: what identifiers start with.
    """

    def __init__(self, rows, image_column: str, labels: np.ndarray, class_names: list[str], name: str):
        self.class_names = class_names
        self._rows = rows
        self._image_column = image_column
        self._labels = labels
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Decodes the row's image; raises a ValueError that names the row where that fails."""
        from datasets import Image as ImageFeature

        stored = self._rows[index][self._image_column]
        try:
            return to_rgb(ImageFeature().decode_example(stored))
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
            file = str((stored or {}).get("path"))
            where = f"the image {self.identifier(index)} of column {self._image_column!r} (path {file})"
            raise UnreadableImageError(where, file, error) from error

    def label(self, index: int) -> int:
        """The row's label."""
        return int(self._labels[index])

    def identifier(self, index: int) -> str:
        """The split and the row's number in it, as "<split>/<number>"."""
        return f"{self._name}/{index}"


def _open_dataset(config: ImageDataConfig, split: str) -> DatasetsSource:
    """One split, or slice of a split, of the configured dataset."""
    import datasets

    splits = _load_splits(config.path)
    try:
        sizes = {name: rows.num_rows for name, rows in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        message = f"split={split!r}: path={config.path!r} has the splits {list(splits)} ({error})"
        raise ValueError(message) from error
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    rows = datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0]
    for name in ("image_column", "label_column"):
        column = getattr(config, name)
        if column is not None and column not in rows.features:
            raise ValueError(f"{name}={column!r}: split {split!r} has the columns {list(rows.features)}")
    if not len(rows):
        raise ValueError(f"split={split!r} of path={config.path!r} has no rows")
    feature, column = rows.features[config.image_column], config.image_column
    if getattr(feature, "dtype", None) not in IMAGE_DTYPES:
        raise ValueError(f"image_column={column!r} holds {feature}; expected images, their bytes or paths")
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if config.label_column is None:
        return DatasetsSource(images, column, np.zeros(len(images), np.int64), [], split)
    labels = _read_labels(rows, config.label_column)
    class_names = _label_names(rows, splits, config.label_column)
    if labels.max() >= len(class_names):
        raise ValueError(
            f"label_column={config.label_column!r} holds the label {labels.max()}; expected one of the "
            f"{len(class_names)} classes {class_names}"
        )
    return DatasetsSource(images, column, labels, class_names, split)


def _load_splits(path: str) -> dict:
    """All splits of a dataset: what save_to_disk wrote, a folder of data files, or a name on the hub."""
    import datasets

    is_saved = any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if is_saved else datasets.load_dataset(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's own error may say no more than that generating the dataset failed.
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"path={path!r} cannot be loaded as a dataset: {error}{cause}") from error
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _read_labels(rows, column: str) -> np.ndarray:
    """A column of integer labels as int64, (N,)."""
    from datasets import ClassLabel

    feature = rows.features[column]
    dtype = str(getattr(feature, "dtype", None))
    if not (isinstance(feature, ClassLabel) or dtype.startswith(("int", "uint"))):
        raise ValueError(f"label_column={column!r} holds {feature}; expected ClassLabel or integers")
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    labels = np.full(len(rows), -1) if values.null_count else values.to_numpy().astype(np.int64)
    if labels.min() < 0:
        raise ValueError(
            f"label_column={column!r} holds missing or negative labels; expected 0 or more in every row, "
            "or null for label_column where images have no classes"
        )
    return labels


def _label_names(rows, splits: dict, column: str) -> list[str]:
    """The names of a ClassLabel, or the numbers up to the largest label of any split."""
    names = getattr(rows.features[column], "names", None)
    if names is not None:
        return list(names)
    labelled = [part for part in splits.values() if column in part.features and len(part)]
    largest = max(int(_read_labels(part, column).max()) for part in labelled)
    return [str(label) for label in range(largest + 1)]


class ImageDataset(Dataset):
    """The images of a source as model input, augmented as a pure function of (seed, epoch, index).

    Args:
        source: the images.
        image_size: (H, W) in pixels, or one integer for a square.
        transform: how images are brought to that size and varied.
        seed: 0 or more.

    Raises:
        ValueError: if `image_size` or `seed` is out of range.
    """

    def __init__(
        self, source: ImageSource, image_size: int | tuple[int, int], transform: TransformConfig, seed: int
    ):
        if seed < 0:
            raise ValueError(f"seed={seed}: expected 0 or more")
        self.source = source
        self.image_size = as_shape(image_size, "image_size")
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """Reads one image.

        Args:
            key: (epoch, index), or an index alone for epoch 0.

        Returns:
            "pixel_values" float32 (3, H, W) in [-1, 1], "class_labels" int, "index" int.

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
        values = np.divide(pixels.transpose(0, 3, 1, 2), np.float32(127.5), order="C")
        values -= 1
        return [
            {"pixel_values": pixel_values, "class_labels": self.source.label(index), "index": index}
            for pixel_values, (_, index) in zip(torch.from_numpy(values), keys, strict=True)
        ]

    def _checked(self, key: int | tuple[int, int]) -> tuple[int, int]:
        """The key as (epoch, index), the index in range."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = operator.index(index)
        if not 0 <= index < len(self.source):
            raise IndexError(f"index {index} is not in 0..{len(self.source) - 1}")
        return epoch, index

    def _transformed(self, epoch: int, index: int) -> np.ndarray:
        """The image at its final size, uint8 (H, W, 3)."""
        image = self.source.image(index)
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
