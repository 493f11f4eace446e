"""Images of the `datasets` library, read in any order.

Legend: N images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nextblock.files.hub import find_dataset
from nextblock.files.regular import check_regular, check_size, is_regular

from .captions import check_captions
from .class_numbers import check_names, numbered_classes
from .reading import MAX_PICTURE_BYTES, is_picture_file, is_picture_name, read_picture
from .tar_members import check_plain
from .unreadable import UnreadableImageError

if TYPE_CHECKING:
    from .images import ImageDataConfig

# Of files in which the library looks for rows; it passes over what is called so and is no file.
_DATA_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv", ".txt", ".zip")
IMAGE_DTYPES = ("PIL.Image.Image", "binary", "large_binary", "string", "large_string")


class DatasetsSource:
    """Rows of a `datasets` dataset.

    Args:
        rows: a `datasets.Dataset` of N undecoded images.
        image_column: the column they are in.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
        name: what identifiers start with.
        captions: N tuples of texts; None without.
    """

    def __init__(
        self,
        rows,
        image_column: str,
        labels: np.ndarray,
        class_names: list[str],
        name: str,
        captions: list[tuple[str, ...]] | None,
    ):
        self.class_names = class_names
        self.captions = captions
        self._rows = rows
        self._image_column = image_column
        self._labels = labels
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Decodes the row's image; raises a ValueError that names the row where that fails."""
        return decode_stored(self._rows[index][self._image_column], self._image_column, self.identifier(index))

    def label(self, index: int) -> int:
        """The row's label."""
        return int(self._labels[index])

    def identifier(self, index: int) -> str:
        """The split and the row's number in it, as "<split>/<number>"."""
        return f"{self._name}/{index}"


def decode_stored(stored: dict | None, column: str, identifier: str) -> Image.Image:
    """Decodes an image as the library stores it.

    Args:
        stored: its "bytes", or the "path" they are at.
        column: the column that it is in.
        identifier: the image's name in a message.

    Returns:
        The picture in RGB.

    Raises:
        UnreadableImageError: where that fails.
    """
    from datasets.utils.file_utils import is_local_path, xopen

    stored = stored or {}
    content, path = stored.get("bytes"), stored.get("path")
    try:
        if content is not None:
            return read_picture(io.BytesIO(content))
        if path is None:
            raise FileNotFoundError("the row holds no image")
        if is_local_path(path):
            return read_picture(path)
        with xopen(path, "rb") as file:
            content = file.read(MAX_PICTURE_BYTES + 1)
        check_size(len(content), MAX_PICTURE_BYTES, "the file")
        return read_picture(io.BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
        where = f"the image {identifier} of column {column!r} (path {path})"
        raise UnreadableImageError(where, str(path), error) from error


def open_dataset(config: ImageDataConfig, split: str) -> DatasetsSource:
    """Opens one split, or slice of a split, of a dataset.

    Args:
        config: where the dataset is and which columns are used.
        split: which rows.

    Returns:
        The source.

    Raises:
        ValueError: naming the path, split, column or label that is missing or unusable.
    """
    import datasets

    splits = _load_splits(config.path)
    sizes = {name: rows.num_rows for name, rows in splits.items()}
    rows = [splits[name].select(range(*ends)) for name, *ends in parts_of_split(split, sizes, config.path)]
    rows = datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0]
    check_columns(config, split, rows.features)
    if not len(rows):
        raise ValueError(f"split={split!r} of path={config.path!r} has no rows")
    column = config.image_column
    images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    captions = None
    if config.caption_column is not None:
        texts = rows.select_columns([config.caption_column]).with_format("arrow")[:].column(0).to_pylist()
        names = [f"{split}/{row}" for row in range(len(texts))]
        captions = check_captions(texts, names, f"caption_column={config.caption_column!r}")
    if config.label_column is None:
        return DatasetsSource(images, column, np.zeros(len(images), np.int64), [], split, captions)
    if "string" in str(rows.features[config.label_column].dtype):
        return DatasetsSource(images, column, *_text_labels(rows, splits, config.label_column), split, captions)
    labels = _read_labels(rows, config.label_column)
    names = getattr(rows.features[config.label_column], "names", None)
    if names is None:
        labelled = [part for part in splits.values() if config.label_column in part.features and len(part)]
        names = classes_of([_read_labels(part, config.label_column) for part in labelled], config.label_column)
    check_labels(labels, names, config.label_column)
    return DatasetsSource(images, column, labels, list(names), split, captions)


def parts_of_split(split: str, sizes: Mapping[str, int], path: str) -> list[tuple[str, int, int]]:
    """Reads a split's name, or slices such as "train[:90%]+test".

    Args:
        split: in the library's notation.
        sizes: numbers of rows by split.
        path: the dataset in a message.

    Returns:
        (split, first row, row after the last) of each part.

    Raises:
        ValueError: if there is no such split.
    """
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split={split!r}: path={path!r} has the splits {list(sizes)} ({error})") from error
    return [(part.splitname, part.from_, part.to) for part in parts]


def check_columns(config: ImageDataConfig, split: str, features) -> None:
    """Refuses columns that are missing or hold something else than images, integer labels and texts.

    Raises:
        ValueError: naming the column.
    """
    from datasets import ClassLabel

    for name in ("image_column", "label_column", "caption_column"):
        column = getattr(config, name)
        if column is not None and column not in features:
            hint = ", or null for images without classes" if name == "label_column" else ""
            columns = f"the columns {list(features)}; expected one of them{hint}"
            raise ValueError(f"{name}={column!r}: split {split!r} has {columns}")
    feature = features[config.image_column]
    if getattr(feature, "dtype", None) not in IMAGE_DTYPES:
        raise ValueError(f"image_column={config.image_column!r} holds {feature}; expected images, their bytes or paths")
    if config.caption_column is not None:
        feature = features[config.caption_column]
        text = getattr(feature, "feature", feature)
        if getattr(text, "dtype", None) not in ("string", "large_string"):
            expected = "texts, or lists of texts"
            raise ValueError(f"caption_column={config.caption_column!r} holds {feature}; expected {expected}")
    if config.label_column is not None:
        feature = features[config.label_column]
        # The names of a stream's texts would be known only at its end.
        dtypes = ("int", "uint") if config.is_streamed else ("int", "uint", "string", "large_string")
        if not isinstance(feature, ClassLabel) and not str(getattr(feature, "dtype", None)).startswith(dtypes):
            expected = "ClassLabel or integers" if config.is_streamed else "ClassLabel, integers or texts"
            raise ValueError(f"label_column={config.label_column!r} holds {feature}; expected {expected}")


def classes_of(labels: list[np.ndarray], column: str) -> list[str]:
    """The numbers up to the largest label of any split, which name the classes where nothing else does."""
    largest = int(max(part.max() for part in labels))
    return numbered_classes(largest + 1, sum(map(len, labels)), f"label_column={column!r}")


def check_labels(labels: np.ndarray, class_names: list[str], column: str) -> None:
    """Refuses labels that are missing or no class.

    Args:
        labels: (N,), −1 where there is none.
        class_names: by label.
        column: theirs, for a message.

    Raises:
        ValueError: naming the column.
    """
    check_names(class_names, f"label_column={column!r}")
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        raise ValueError(
            f"label_column={column!r} holds missing or negative labels in {len(missing)} of {len(labels)} rows, such "
            f"as {missing[:3].tolist()}; expected 0 or more in every row, or null for label_column where images have "
            "no classes"
        )
    if labels.max() >= len(class_names):
        raise ValueError(
            f"label_column={column!r} holds the label {labels.max()} in row {labels.argmax()}; expected one of the "
            f"{len(class_names)} classes {class_names[:20]}"
        )


def _load_splits(path: str) -> dict:
    """All splits of a dataset: what save_to_disk wrote, a folder of data files, or a name on the hub."""
    import datasets

    check_tar_files(path)
    load = datasets.load_from_disk if is_saved_to_disk(path) else datasets.load_dataset
    with named_failures(path):
        find_dataset(path)
        loaded = load(path)
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    check_image_files(path, next(iter(splits.values())))
    return splits


def check_tar_files(path: str) -> None:
    """Refuse a folder with tar files that the library would read a part of only, without a word.

    Raises:
        ValueError: naming the tar file; or what is called like a file of data and is none, such as a pipe.
    """
    entries = _entries(path) if Path(path).is_dir() else ()
    for file in sorted(entry.path for entry in entries if entry.name.endswith(_DATA_SUFFIXES)):
        check_regular(file)
        if file.endswith(".tar"):
            check_plain(Path(file))


def check_image_files(path: str, rows) -> None:
    """Refuse a folder of image files of which the library passes over some, without a word.

    Args:
        path: the dataset.
        rows: one of its splits, a dataset or a stream.

    Raises:
        ValueError: naming some of them.
    """
    if rows.info.builder_name != "imagefolder" or not Path(path).is_dir():
        return
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    lost = [
        Path(entry.path)
        for entry in _entries(path)
        if not _is_known(entry, ImageFolder.EXTENSIONS) and _may_be_picture(entry)
    ]
    if lost:
        raise ValueError(
            f"path={path!r}: `datasets` passes over {len(lost)} images or links to folders, such as {min(lost)}; "
            "expected kinds of images that it knows, or data.source 'folder', which takes all of them"
        )


def _entries(folder: str) -> Iterator[os.DirEntry]:
    """Yield all that lies below a folder but folders themselves; names with a leading dot are passed over."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            else:
                yield entry


def _is_known(entry: os.DirEntry, suffixes: Collection[str]) -> bool:
    """Whether the library reads something as an image: it passes over pipes and links that lead nowhere."""
    return Path(entry.name).suffix.lower() in suffixes and _is_file(entry)


def _may_be_picture(entry: os.DirEntry) -> bool:
    """Whether something is a picture or called so, or a link to a folder or to nowhere."""
    if _is_file(entry):
        return is_picture_file(entry.path)
    is_lost = entry.is_symlink() and (os.path.isdir(entry.path) or not os.path.exists(entry.path))
    return bool(is_picture_name(entry.name)) or is_lost


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a regular file, or a link to one; most are, as their folder says without a look at them."""
    return entry.is_file(follow_symlinks=False) or is_regular(entry.path)


@contextmanager
def named_failures(path: str) -> Iterator[None]:
    """Raises a ValueError that names the dataset where the library cannot load it."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # The library's own error may say no more than that generating the dataset failed.
        cause = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) not in str(error) else ""
        raise ValueError(f"path={path!r} cannot be loaded as a dataset: {error}{cause}") from error


def local_files(path: str) -> list[str]:
    """Lists all files of a dataset's folder but hidden ones.

    Args:
        path: the folder.

    Returns:
        Paths below it, sorted.
    """
    found = []
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(parent, name).relative_to(path).as_posix() for name in names if name[0] != "."]
    return sorted(found)


def has_column(path: str, column: str) -> bool:
    """Whether a dataset has a column in any of its splits; raises a ValueError where it cannot be loaded."""
    return any(column in rows.features for rows in _load_splits(path).values())


def is_saved_to_disk(path: str) -> bool:
    """Whether a folder is what the library's save_to_disk writes."""
    return any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_labels(rows, column: str) -> np.ndarray:
    """A column of integer labels as int64, (N,), −1 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    # An unsigned label beyond int64 would come out negative: it is refused as one.
    return pc.fill_null(pc.cast(values, pa.int64(), safe=False), -1).to_numpy().astype(np.int64)


def _text_labels(rows, splits: Mapping, column: str) -> tuple[np.ndarray, list[str]]:
    """Number the texts of a column in their order, alike in every split; return labels (N,) and names."""
    names = set()
    for part in splits.values():
        if column in part.features:
            names |= set(part.select_columns([column]).with_format("arrow")[:].column(column).unique().to_pylist())
    names = sorted(names - {None})
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(text, -1) for text in rows.select_columns([column])[column]], np.int64)
    check_labels(labels, names, column)
    return labels, names
