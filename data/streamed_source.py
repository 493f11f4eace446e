"""Images of a `datasets` dataset that is streamed: read in order, without a copy of the dataset on the disk.

A job needs to know the number of rows and where each is, so one pass over the labels counts the rows of every piece
(a row group, a file, or several files); a row is then found by skipping pieces whole. Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nextblock.files.hub import find_dataset

from .captions import check_captions
from .datasets_source import (
    check_columns,
    check_image_files,
    check_labels,
    check_tar_files,
    classes_of,
    decode_stored,
    is_saved_to_disk,
    named_failures,
    parts_of_split,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

    from .images import ImageDataConfig

# Taking one piece out of a stream takes time in proportion to its files, so they are not taken one by one.
_MAX_PIECES = 256
_LABELS_AT_A_TIME = 1000
_IMAGES_AT_A_TIME = 16


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + num_rows` of a part of a stream."""

    stream: IterableDataset
    first: int
    num_rows: int

    def read(self, column: str, skip: int) -> Iterator[dict | None]:
        """Yields the undecoded images of all rows but the first `skip`."""
        num_left = self.num_rows - skip
        rows = self.stream.skip(self.first + skip).take(num_left)
        # Iterated over directly, a stream gives each worker process of a loader other rows.
        for batch in rows.iter(_IMAGES_AT_A_TIME):
            num_left -= len(batch[column])
            yield from batch[column]
        if num_left:
            raise ValueError(f"the stream ends {num_left} rows before its count; expected data that stays the same")


class StreamedSource:
    """Rows of a streamed dataset, quick to read by increasing index; going back opens the stream again.

    Args:
        pieces: undecoded images, one piece after the other.
        image_column: the column they are in.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
        name: what identifiers start with.
        captions: N tuples of texts; None without.
    """

    def __init__(
        self,
        pieces: list[Piece],
        image_column: str,
        labels: np.ndarray,
        class_names: list[str],
        name: str,
        captions: list[tuple[str, ...]] | None,
    ):
        self.class_names = class_names
        self.captions = captions
        self._pieces = pieces
        self._starts = np.cumsum([0] + [piece.num_rows for piece in pieces])
        self._image_column = image_column
        self._labels = labels
        self._name = name
        self._rows: Iterator[dict | None] = iter(())
        self._position = -1

    def __len__(self) -> int:
        return len(self._labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_rows": iter(()), "_position": -1}

    def image(self, index: int) -> Image.Image:
        """Decodes the row's image; raises a ValueError that names the row where that fails."""
        return decode_stored(self._stored(index), self._image_column, self.identifier(index))

    def label(self, index: int) -> int:
        """The row's label."""
        return int(self._labels[index])

    def identifier(self, index: int) -> str:
        """The split and the row's number in it, as "<split>/<number>"."""
        return f"{self._name}/{index}"

    def _stored(self, index: int) -> dict | None:
        """Reads on to a row, or from the start of its piece where that is nearer."""
        piece = int(np.searchsorted(self._starts, index, side="right")) - 1
        if not self._starts[piece] <= self._position <= index:
            self._rows, self._position = self._rows_from(piece, index - int(self._starts[piece])), index
        for stored in self._rows:
            self._position += 1
            if self._position > index:
                return stored
        raise AssertionError(f"row {index} of {len(self)} is in no piece")

    def _rows_from(self, piece: int, skip: int) -> Iterator[dict | None]:
        """Yields undecoded images from one on."""
        yield from self._pieces[piece].read(self._image_column, skip)
        for later in self._pieces[piece + 1 :]:
            yield from later.read(self._image_column, 0)


def open_stream(config: ImageDataConfig, split: str) -> StreamedSource:
    """Opens one split, or slice of a split, of a dataset as a stream and counts its rows.

    Args:
        config: where the dataset is and which columns are used.
        split: which rows.

    Returns:
        The source, whose labels and identifiers are those of the same dataset read in any order.

    Raises:
        ValueError: naming the path, split, column or label that is missing or unusable.
    """
    import datasets

    streams = _load_streams(config.path)
    features = next(iter(streams.values())).features
    if features is None:
        raise ValueError(
            f"path={config.path!r}: the columns of this format are unknown before all is read; expected Parquet, "
            "WebDataset or image folders, or is_streamed=False"
        )
    check_columns(config, split, features)
    counts = _Counts(config, streams, features)
    parts = parts_of_split(split, counts, config.path)
    labels = np.concatenate([counts.labels(name)[first:end] for name, first, end in parts])
    if not len(labels):
        raise ValueError(f"split={split!r} of path={config.path!r} has no rows")
    column, pieces = config.image_column, []
    for name, first, end in parts:
        undecoded = [
            piece.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            for piece in _pieces_of(streams[name])
        ]
        pieces += _cut(undecoded, counts.of_pieces(name), first, end)
    captions = None if config.caption_column is None else _read_captions(config, split, parts)
    if config.label_column is None:
        return StreamedSource(pieces, column, np.zeros(len(labels), np.int64), [], split, captions)
    names = getattr(features[config.label_column], "names", None)
    if names is None:
        names = classes_of([counts.labels(name) for name in streams if counts[name]], config.label_column)
    check_labels(labels, names, config.label_column)
    return StreamedSource(pieces, column, labels, list(names), split, captions)


def _read_captions(config: ImageDataConfig, split: str, parts: list[tuple[str, int, int]]) -> list[tuple[str, ...]]:
    """Captions of the rows of a split, read in a pass of their own."""
    column, texts = config.caption_column, []
    streams = _load_streams(config.path, [column])
    for name, first, end in parts:
        for batch in streams[name].select_columns([column]).skip(first).take(end - first).iter(_LABELS_AT_A_TIME):
            texts += batch[column]
    return check_captions(texts, [f"{split}/{row}" for row in range(len(texts))], f"caption_column={column!r}")


def _load_streams(path: str, columns: list[str] | None = None) -> dict[str, IterableDataset]:
    """All splits of a dataset; with columns, the others are not even read, where the format allows for that."""
    import datasets

    if is_saved_to_disk(path):
        raise ValueError(
            f"path={path!r} was written by save_to_disk, which needs no copy to be read; expected is_streamed=False"
        )
    check_tar_files(path)
    with named_failures(path):
        find_dataset(path)
        options = {}
        if columns is not None and hasattr(datasets.load_dataset_builder(path).config, "columns"):
            options["columns"] = columns
        streams = datasets.load_dataset(path, streaming=True, **options)
    check_image_files(path, next(iter(streams.values())))
    # Streams from the hub come decoded, which fails at the first broken image.
    return {split: stream.decode(False) if stream.features else stream for split, stream in streams.items()}


def _pieces_of(stream: IterableDataset) -> list[IterableDataset]:
    """Cuts a stream into parts that can be opened each by itself, in order."""
    if hasattr(stream, "reshard"):  # Row groups of Parquet files, where the library can tell them apart.
        stream = stream.reshard()
    num_pieces = min(stream.num_shards, _MAX_PIECES)
    return [stream.shard(num_pieces, index) for index in range(num_pieces)]


def _cut(streams: list[IterableDataset], counts: list[int], first: int, end: int) -> list[Piece]:
    """The pieces of a split, and parts of pieces, that make up the rows from `first` up to `end`."""
    pieces, start = [], 0
    for stream, count in zip(streams, counts, strict=True):
        low, high = max(first - start, 0), min(end - start, count)
        if low < high:
            pieces.append(Piece(stream, low, high - low))
        start += count
    return pieces


class _Counts(Mapping):
    """Rows by split, counted when they are asked for, along with their labels."""

    def __init__(self, config: ImageDataConfig, streams: dict[str, IterableDataset], features):
        numbers = ("int", "uint", "float", "bool")
        narrow = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).startswith(numbers)]
        self._column = config.label_column or (narrow or [config.image_column])[0]
        self._has_labels = config.label_column is not None
        self._names = list(streams)
        self._streams = _load_streams(config.path, [self._column])
        self._labels: dict[str, list[np.ndarray]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, split: str) -> int:
        if split not in self._names:
            raise KeyError(split)
        return sum(self.of_pieces(split))

    def of_pieces(self, split: str) -> list[int]:
        """Rows of each piece of a split."""
        return [len(labels) for labels in self._of_pieces(split)]

    def labels(self, split: str) -> np.ndarray:
        """Labels of a split, (N,), −1 where there is none or no column of them."""
        return np.concatenate(self._of_pieces(split))

    def _of_pieces(self, split: str) -> list[np.ndarray]:
        """Labels of each piece of a split."""
        if split not in self._labels:
            self._labels[split] = [self._read(piece) for piece in _pieces_of(self._streams[split])]
        return self._labels[split]

    def _read(self, piece: IterableDataset) -> np.ndarray:
        """Labels of a piece."""
        labels = []
        for batch in piece.select_columns([self._column]).iter(_LABELS_AT_A_TIME):
            values = batch[self._column]
            if self._has_labels:
                # An unsigned label beyond int64 is refused like one that is missing.
                labels += [-1 if value is None or value >= 1 << 63 else value for value in values]
            else:
                labels += [-1] * len(values)
        return np.array(labels, np.int64)
