"""What samples are compared with: images, or statistics in a file, as ADM publishes them and as they are kept here.

A file of statistics is an .npz with `mu` and `sigma`, and `mu_s` and `sigma_s` for sFID; ADM's hold images too, for
precision and recall. Those kept here hold features and say how they were made. Legend: N images, F features.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nextblock.data.image_folder import scan_whole_folder
from nextblock.data.images import ImageDataConfig
from nextblock.data.reading import picture_header
from nextblock.data.usable import open_usable
from nextblock.files.atomic import file_sha256, write_whole
from nextblock.files.npz import npz_arrays, npz_keys
from nextblock.files.part_jobs import JOB_NAME
from nextblock.files.regular import is_regular

from .feature_sets import FeatureSet
from .moments import Moments
from .sample_sets import IMAGES_KEY, NPZ_NAME, SampleSet, class_numbers, open_samples
from .source_sets import SourceSet

_STATISTICS = ("mu", "sigma")
_SPATIAL = ("mu_s", "sigma_s")
_PROVENANCE = "provenance"
# Features of a million images.
_MAX_BYTES = 1 << 33


@dataclass(frozen=True)
class OpenedReference:
    """What was named as a reference, before any feature is made.

    Args:
        name: as it was given.
        images: whose features are to be made; None where a file has none.
        statistics: file of statistics, or None.
        sha256: of the file, or of the images' names and content.
        crop: how images were brought to size; None where they had it.
    """

    name: str
    images: SampleSet | None
    statistics: Path | None
    sha256: str
    crop: str | None

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if self.statistics is None:
            return "images"
        return "statistics" if self.images is None else "statistics and images"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        num_items: N of the moments; None where a file does not say.
        moments: of N images; None of a single one.
        spatial_moments: of ADM's spatial features, or None.
        features: of images, all or some of the N, or others where a file holds both; None where there are none.
    """

    num_items: int | None
    moments: Moments | None
    spatial_moments: Moments | None
    features: FeatureSet | None


def open_images(path: str, image_size: tuple[int, int], crop: str | None = None) -> tuple[SampleSet, str | None]:
    """Open images that are to have a size.

    Args:
        path: an .npz file, the folder of a sampling job, or a folder of pictures.
        image_size: (H, W).
        crop: how pictures are brought to size; None crops at the center those that need it.

    Returns:
        The images, and the name of the crop; None where all had the size.

    Raises:
        ValueError: naming what is wrong with them, or an .npz file of another size.
    """
    folder = Path(path)
    if folder.is_dir() and not is_regular(folder / NPZ_NAME) and not is_regular(folder / JOB_NAME):
        source = scan_whole_folder(folder)
        if crop is not None or any(picture_header(file)[1] != image_size for file in source.files()):
            images = SourceSet(source, path, image_size, crop or "center")
            if images.class_labels is not None:
                # As those of pictures that need no crop.
                images.class_labels = class_numbers(source.class_names)[images.class_labels]
            return images, crop or "center"
    images = open_samples(path)
    if tuple(images.image_size) != tuple(image_size):
        given, wanted = ("x".join(map(str, size)) for size in (images.image_size, image_size))
        raise ValueError(f"{path} has images of {given}; expected {wanted}, the samples' size")
    return images, None


def open_reference(path: str, image_size: tuple[int, int], crop: str | None = None) -> OpenedReference:
    """Open what a path names as a reference.

    Args:
        path: images, see `open_images`, or an .npz file of statistics.
        image_size: (H, W) of the samples.
        crop: see `open_images`.

    Returns:
        The reference.

    Raises:
        ValueError: naming what is missing, damaged, or neither images nor statistics.
    """
    file = Path(path)
    if is_regular(file) and file.suffix == ".npz":
        keys = npz_keys(file)
        has_images = IMAGES_KEY in keys
        if not has_images and not set(_STATISTICS) <= set(keys):
            raise ValueError(f"{path} holds the arrays {keys}; expected images as arr_0, or statistics as mu and sigma")
        images = open_images(path, image_size)[0] if has_images else None
        statistics = file if set(_STATISTICS) <= set(keys) else None
        return OpenedReference(path, images, statistics, file_sha256(file), None)
    images, crop = open_images(path, image_size, crop)
    return OpenedReference(path, images, None, images.sha256(), crop)


def open_data(data: ImageDataConfig, split: str, image_size: tuple[int, int], crop: str | None) -> OpenedReference:
    """Open a split of configured images as a reference.

    Args:
        data: where the images are.
        split: which of them.
        image_size: (H, W) of the samples.
        crop: how images are brought to size; None crops at the center.

    Returns:
        The reference.

    Raises:
        ValueError: naming what is wrong with the data.
    """
    name = f"{data.source}:{data.path or ''}:{split}"
    images = SourceSet(open_usable(data, split, print), name, image_size, crop or "center")
    return OpenedReference(name, images, None, images.sha256(), crop or "center")


def read_statistics(path: Path, num_features: int) -> Reference:
    """Read a file of statistics.

    Args:
        path: of the file.
        num_features: F of the features that samples have.

    Returns:
        Moments, and features where the file was kept here.

    Raises:
        ValueError: naming the file and what is wrong with its arrays.
    """
    names = (*_STATISTICS, *_SPATIAL, "num_items", "features", "numbers", "class_labels")
    found = {name: array.read(_MAX_BYTES) for name, array in npz_arrays(path, names).items()}
    moments = _read_moments(path, found, _STATISTICS)
    if len(moments.mean) != num_features:
        raise ValueError(f"{path} is of {len(moments.mean)} features; expected {num_features}, the samples' number")
    spatial = _read_moments(path, found, _SPATIAL) if set(_SPATIAL) <= found.keys() else None
    num_items = int(found["num_items"][0]) if found.get("num_items", np.zeros(0)).shape == (1,) else None
    features = None
    # Others may call something of theirs features too.
    if {"features", "numbers"} <= found.keys():
        features = _read_features(path, found, num_items, moments)
        moments = features.moments
    return Reference(num_items, moments, spatial, features)


def _read_features(
    path: Path, found: dict[str, np.ndarray], num_items: int | None, moments: Moments
) -> FeatureSet:
    """Return the features that a file keeps."""
    shapes = {name: found[name].shape for name in ("features", "numbers", "class_labels") if name in found}
    n, F = len(found["numbers"]), len(moments.mean)
    if shapes != {name: (n, F) if name == "features" else (n,) for name in shapes} or not 1 <= n <= (num_items or n):
        raise ValueError(f"{path} holds {shapes} of {num_items} images; expected ({n}, {F}), and a number for each row")
    rows = torch.from_numpy(found["features"])
    labels = torch.from_numpy(found["class_labels"]) if "class_labels" in found else None
    numbers = torch.from_numpy(found["numbers"])
    # Of all items, so that a file gives the figures that its images gave, to the bit.
    moments = Moments.of(rows) if len(rows) == num_items else moments
    return FeatureSet(num_items, rows, numbers, labels, moments, None, None, numbers)


def _read_moments(path: Path, found: dict[str, np.ndarray], names: tuple[str, str]) -> Moments:
    """Return one pair of mean and covariance."""
    for name in names:
        if found[name].dtype.kind not in "iuf":
            raise ValueError(f"{path}: {name} is of {found[name].dtype}; expected numbers")
    mean, covariance = (np.asarray(found[name], np.float64) for name in names)
    is_square = mean.ndim == 1 and len(mean) and covariance.shape == (len(mean), len(mean))
    if not is_square or not np.isfinite(covariance).all() or not np.isfinite(mean).all():
        raise ValueError(
            f"{path}: {names[0]} is {mean.shape} and {names[1]} {covariance.shape}; expected (F,) and (F, F), finite"
        )
    if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-8 * np.abs(covariance).max()):
        raise ValueError(f"{path}: {names[1]} is not symmetric; expected a covariance")
    if (covariance.diagonal() < 0).any():
        raise ValueError(f"{path}: {names[1]} has negative variances; expected a covariance")
    covariance = torch.from_numpy(covariance)
    return Moments(0, torch.from_numpy(mean), (covariance + covariance.T) / 2)


def save_reference(path: Path, reference: Reference, provenance: dict) -> None:
    """Keep a reference as a file of statistics that says how it was made.

    Args:
        path: of the file.
        reference: with moments.
        provenance: as JSON can hold it.
    """
    arrays = {"mu": reference.moments.mean.numpy(), "sigma": reference.moments.covariance.numpy()}
    if reference.spatial_moments is not None:
        arrays["mu_s"] = reference.spatial_moments.mean.numpy()
        arrays["sigma_s"] = reference.spatial_moments.covariance.numpy()
    if reference.num_items is not None:
        arrays["num_items"] = np.array([reference.num_items])
    if reference.features is not None:
        arrays |= {"features": reference.features.features.numpy(), "numbers": reference.features.numbers.numpy()}
        if reference.features.class_labels is not None:
            arrays["class_labels"] = reference.features.class_labels.numpy()
    arrays[_PROVENANCE] = np.frombuffer(json.dumps(provenance, sort_keys=True).encode(), np.uint8)
    write_whole(path, partial(np.savez, **arrays))


def provenance_of(path: Path) -> dict | None:
    """Return how a file of statistics says it was made; None where it does not say.

    Raises:
        ValueError: if the file is damaged.
    """
    arrays = npz_arrays(path, (_PROVENANCE,))
    return json.loads(arrays[_PROVENANCE].read(_MAX_BYTES).tobytes()) if arrays else None


def is_kept(path: Path, provenance: dict) -> bool:
    """Tell whether a reference of a provenance is kept in a file.

    Args:
        path: of the file, which may not be there.
        provenance: as `save_reference` took it.

    Returns:
        Whether it is; a reference of another provenance may be written over.

    Raises:
        ValueError: if there is something that no evaluation has kept, which must not be written over.
    """
    if not os.path.lexists(path):
        return False
    if not is_regular(path):
        raise ValueError("it is no file")
    found = provenance_of(path)
    if found is None:
        raise ValueError("it does not say what it was made of")
    return found == provenance
