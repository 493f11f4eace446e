"""Features of whole sets of images, made by any number of processes, in an order that depends on the images alone.

Items are sorted by a hash of their pixels: names, batches and processes then change no figure by a bit. Of larger sets
than wanted the features of the least hashes are kept, and the moments of all. Legend: N images, n kept, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextblock.files.atomic import write_whole

from .features import FeatureExtractor
from .moments import Moments, MomentSums
from .sample_sets import SampleSet

# Sets up to this size keep ADM's spatial features too, which gives exact roots of singular covariances.
_MAX_SPATIAL = 4096
_COLUMNS = 64


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images, sorted by the hashes of their pixels.

    Args:
        num_items: N.
        features: (n, F) float32.
        numbers: (n,) int64, which image of the set each is.
        class_labels: (n,) int64, or None where there are no classes.
        moments: of all N; None of a single image.
        spatial_moments: of ADM's spatial features, or None.
        class_probabilities: (N, C) float32 in the order of the images' numbers, or None.
        content_order: (N,) int64, the numbers of all images by their hashes.
    """

    num_items: int
    features: Tensor
    numbers: Tensor
    class_labels: Tensor | None
    moments: Moments | None
    spatial_moments: Moments | None
    class_probabilities: Tensor | None
    content_order: Tensor


class _Share:
    """What one process has made of its images so far.

    Args:
        num_own: its images.
        max_features: of how many images features are kept.
        batch_size: images added at a time at most.
    """

    def __init__(self, num_own: int, max_features: int, batch_size: int):
        # Room for as many again, so that making room is rare.
        self._capacity = num_own if num_own <= max_features else max_features + max(max_features, batch_size)
        self._max_features = max_features
        self._features: np.ndarray | None = None
        self._kept = np.empty((2, self._capacity), np.int64)
        self._num_kept = 0
        self._num_own = num_own
        self._columns: dict[str, tuple[np.ndarray, int]] = {}
        self.sums: dict[str, MomentSums] = {}

    def keep(self, keys: np.ndarray, numbers: np.ndarray, features: np.ndarray) -> None:
        """Keep the features of a batch with its keys and numbers; make room where there is none."""
        if self._features is None:
            self._features = np.empty((self._capacity, features.shape[1]), np.float32)
        if self._num_kept + len(keys) > self._capacity:
            self._trim()
        rows = slice(self._num_kept, self._num_kept + len(keys))
        self._kept[:, rows], self._features[rows] = (keys, numbers), features
        self._num_kept = rows.stop
        self.append("all", np.stack([keys, numbers]).T)

    def append(self, name: str, values: np.ndarray) -> None:
        """Keep something of every image of a batch."""
        if name not in self._columns:
            # Whole at once: joining batches at the end would hold them twice.
            self._columns[name] = np.empty((self._num_own, *values.shape[1:]), values.dtype), 0
        column, start = self._columns[name]
        column[start : start + len(values)] = values
        self._columns[name] = column, start + len(values)

    def sum(self, name: str, features: Tensor) -> None:
        """Add a batch to the moments of that name."""
        if name not in self.sums:
            self.sums[name] = MomentSums(features.shape[1])
        self.sums[name].add(features)

    def _trim(self) -> None:
        """Keep those of the least keys."""
        if self._num_kept > self._max_features:
            least = np.argsort(self._kept[0, : self._num_kept], kind="stable")[: self._max_features]
            rows = slice(len(least))
            self._kept[:, rows], self._features[rows] = self._kept[:, least], self._features[least]
            self._num_kept = len(least)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all of the share by name."""
        self._trim()
        arrays = {"kept": self._kept[:, : self._num_kept].T, "all": np.empty((0, 2), np.int64)}
        if self._features is not None:
            arrays["features"] = self._features[: self._num_kept]
        arrays |= {name: column for name, (column, _) in self._columns.items()}
        for name, sums in self.sums.items():
            arrays |= {f"{name}_count": np.array(sums.num_items), f"{name}_mean": sums.mean.numpy()}
            arrays[f"{name}_scatter"] = sums.scatter.numpy()
        return arrays


def embed(
    samples: SampleSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 100,
    max_features: int = 50_000,
    keeps_classes: bool = True,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] = lambda num_images: None,
) -> dict[str, np.ndarray]:
    """Make the features of one process's share of a set.

    Args:
        samples: N images.
        extractor: makes features.
        batch_size: images read at a time, rounded up to whole batches of the network; no figure depends on it.
        max_features: of how many images of the set features are kept at most.
        keeps_classes: whether class probabilities are kept, for an inception score.
        rank: of this process.
        world_size: how many processes share the images.
        on_batch: is told how many images were done, batch by batch.

    Returns:
        Arrays for `gathered`.
    """
    batch_size = -(-batch_size // extractor.num_rows) * extractor.num_rows
    firsts = range(rank * batch_size, len(samples), world_size * batch_size)
    num_own = sum(min(batch_size, len(samples) - first) for first in firsts)
    share = _Share(num_own, max_features, batch_size)
    for numbers, images in samples.batches(batch_size, rank, world_size):
        embedded = extractor(images)
        share.keep(_content_keys(images), numbers, embedded.features.numpy())
        if len(samples) > max_features:
            share.sum("sums", embedded.features)
        if keeps_classes and embedded.class_probabilities is not None:
            share.append("class_probabilities", embedded.class_probabilities.numpy())
        if embedded.spatial_features is not None and len(samples) <= _MAX_SPATIAL:
            share.append("spatial", embedded.spatial_features.numpy())
        elif embedded.spatial_features is not None:
            share.sum("spatial_sums", embedded.spatial_features)
        on_batch(len(images))
    return share.arrays()


def _content_keys(images: np.ndarray) -> np.ndarray:
    """Hash the pixels of each image to 63 bits, (n,) int64."""
    digests = (hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest() for image in images)
    return np.array([int.from_bytes(digest, "little") >> 1 for digest in digests], np.int64)


def save_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what `embed` returned as a file that is whole or not there."""
    write_whole(path, partial(np.savez, **arrays))


def gathered(
    parts: Sequence[dict[str, np.ndarray] | Path], class_labels: np.ndarray | None, max_features: int = 50_000
) -> FeatureSet:
    """Put the shares of all processes together.

    Args:
        parts: what `embed` returned, or files of it; arrays are taken over and changed.
        class_labels: (N,) int64 of the whole set, or None.
        max_features: as `embed` was given.

    Returns:
        The set's features, the same to the bit for any number of processes.
    """
    loaded = [np.load(part) if isinstance(part, Path) else part for part in parts]
    keys, numbers = np.concatenate([part["kept"] for part in loaded]).T
    order = np.lexsort([numbers, keys])[:max_features]
    features = _sorted_rows(loaded, order)
    all_keys, all_numbers = np.concatenate([part["all"] for part in loaded]).T
    content_order = all_numbers[np.lexsort([all_numbers, all_keys])]
    num_items = len(all_numbers)
    moments = None
    if num_items > 1:
        moments = Moments.of(features) if len(features) == num_items else _summed(loaded, "sums")
    probabilities = _by_number(loaded, "class_probabilities")
    kept = torch.from_numpy(numbers[order])
    return FeatureSet(
        num_items=num_items,
        features=features,
        numbers=kept,
        class_labels=None if class_labels is None else torch.from_numpy(np.asarray(class_labels, np.int64))[kept],
        moments=moments,
        spatial_moments=_spatial_moments(loaded, content_order),
        class_probabilities=None if probabilities is None else torch.from_numpy(probabilities),
        content_order=torch.from_numpy(content_order),
    )


def _sorted_rows(parts: Sequence, order: np.ndarray) -> Tensor:
    """Return the rows of the shares' features in an order, with no second copy of all at any time."""
    if len(parts) == 1:
        features = parts[0]["features"]
        for start in range(0, features.shape[1], _COLUMNS):
            block = features[:, start : start + _COLUMNS]
            block[: len(order)] = block[order]
        return torch.from_numpy(features[: len(order)])
    places = np.full(sum(len(part["kept"]) for part in parts), -1)
    places[order] = np.arange(len(order))
    rows, start = None, 0
    for part in (part for part in parts if len(part["kept"])):
        own = part["features"]
        rows = np.empty((len(order), own.shape[1]), np.float32) if rows is None else rows
        here = places[start : start + len(own)]
        rows[here[here >= 0]] = own[here >= 0]
        start += len(own)
    return torch.from_numpy(rows)


def _by_number(parts: Sequence, name: str) -> np.ndarray | None:
    """Return a column of all images in the order of their numbers."""
    if not any(name in part for part in parts):
        return None
    if len(parts) == 1:
        # One process reads the images in the order of their numbers.
        return parts[0][name]
    column = None
    num_items = sum(len(part["all"]) for part in parts)
    for part in parts:
        if name in part:
            own = part[name]
            column = np.empty((num_items, *own.shape[1:]), own.dtype) if column is None else column
            column[part["all"][:, 1]] = own
    return column


def _summed(parts: Sequence, name: str) -> Moments:
    """Return the moments of the sums of all shares."""
    total = None
    for part in parts:
        if f"{name}_count" in part:
            mean = torch.from_numpy(part[f"{name}_mean"])
            total = total or MomentSums(len(mean))
            total.merge(int(part[f"{name}_count"]), mean, torch.from_numpy(part[f"{name}_scatter"]))
    return total.moments()


def _spatial_moments(parts: Sequence, content_order: np.ndarray) -> Moments | None:
    """Return the moments of ADM's spatial features, where there are some."""
    if any("spatial_sums_count" in part for part in parts):
        return _summed(parts, "spatial_sums")
    spatial = _by_number(parts, "spatial")
    if spatial is None or len(spatial) < 2:
        return None
    return Moments.of(torch.from_numpy(spatial[content_order]))
