"""Pure metrics of pictures and feature sets, computed in float64 whatever comes in.

The Fréchet distance is Dowson and Landau's (1982), used as FID by Heusel et al. (2017, arXiv:1706.08500).
Legend: B batch, N and M items, F features, HxW pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIXEL_RANGE = 2.0  # pixel values lie in [-1, 1]


def mean_squared_errors(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Mean squared difference of each picture.

    Args:
        reconstructions: (B, ...) of any real dtype.
        originals: the same shape.

    Returns:
        (B,) float64.

    Raises:
        ValueError: if the shapes differ or there is no picture.
    """
    if reconstructions.shape != originals.shape or originals.ndim < 2 or originals.numel() == 0:
        raise ValueError(
            f"reconstructions have shape {tuple(reconstructions.shape)}, originals {tuple(originals.shape)}; "
            "expected two equal shapes (batch, ...) with at least one picture"
        )
    difference = reconstructions.double() - originals.double()
    return difference.square().flatten(1).mean(dim=1)


def psnr_from_error(mean_squared_error: Tensor, data_range: float = _PIXEL_RANGE) -> Tensor:
    """Peak signal-to-noise ratio that belongs to a mean squared error.

    Args:
        mean_squared_error: any shape, ≥ 0.
        data_range: distance between the least and the greatest possible value, > 0.

    Returns:
        Decibels, float64, the same shape; infinite where the error is 0.

    Raises:
        ValueError: if `data_range` is not positive.
    """
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range!r}; expected a positive number")
    return 10 * torch.log10(data_range**2 / mean_squared_error.double())


def psnr(reconstructions: Tensor, originals: Tensor, data_range: float = _PIXEL_RANGE) -> Tensor:
    """Peak signal-to-noise ratio of each picture; its mean over pictures is the usual figure of a data set.

    Args:
        reconstructions: (B, 3, H, W), in [-1, 1] under the default range.
        originals: the same shape.
        data_range: distance between the least and the greatest possible value, > 0.

    Returns:
        (B,) float64 in decibels; infinite where a reconstruction is exact.

    Raises:
        ValueError: if the shapes differ or `data_range` is not positive.
    """
    return psnr_from_error(mean_squared_errors(reconstructions, originals), data_range)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the Gaussians fitted to two feature sets.

    |mean_x - mean_y|² + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^½), with unbiased covariances S.

    Args:
        x: (N, F), N ≥ 2; the covariance may be singular.
        y: (M, F), M ≥ 2.

    Returns:
        The distance, ≥ 0 up to rounding.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_features(x=x, y=y)
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"x has {len(x)} rows and y {len(y)}; expected at least 2 of each")
    mean_x, root_x = _mean_and_covariance_root(x)
    mean_y, root_y = _mean_and_covariance_root(y)
    # With S = RᵀR, tr((S_x S_y)^½) is the nuclear norm of R_x R_yᵀ: no roots of eigenvalues near zero.
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * overlap
    return distance.item()


def nearest_distances(queries: Tensor, references: Tensor, chunk_size: int = 1024) -> Tensor:
    """Euclidean distance from each query to the reference that is nearest to it.

    Args:
        queries: (N, F).
        references: (M, F), M ≥ 1.
        chunk_size: queries compared at a time, ≥ 1; bounds the memory at chunk_size × M.

    Returns:
        (N,) float64.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_features(queries=queries, references=references)
    if len(references) == 0 or chunk_size < 1:
        raise ValueError(
            f"got {len(references)} references, chunk_size {chunk_size}; expected at least 1 of each"
        )
    references = references.double()
    nearest = [_distances(chunk.double(), references).amin(dim=1) for chunk in queries.split(chunk_size)]
    return torch.cat(nearest)


def mean_pairwise_distance_by_class(features: Tensor, class_labels: Tensor) -> dict[int, float]:
    """Mean Euclidean distance over the pairs of different items of each class.

    Args:
        features: (N, F).
        class_labels: (N,) integers.

    Returns:
        The mean distance of each class that occurs, in order of class.

    Raises:
        ValueError: if the shapes do not fit or a class has a single item.
    """
    _check_features(features=features)
    if class_labels.shape != features.shape[:1]:
        raise ValueError(f"class_labels have shape {tuple(class_labels.shape)}; expected ({len(features)},)")
    means = {}
    for label in class_labels.unique().tolist():
        items = features[class_labels == label].double()
        num_items = len(items)
        if num_items < 2:
            raise ValueError(f"class {label} has a single item; expected at least 2 to measure a distance")
        means[label] = _distances(items, items).sum().item() / (num_items * (num_items - 1))
    return means


def _check_features(**named: Tensor) -> None:
    """Refuse feature sets that are not matrices of equal width."""
    shapes = {name: tuple(features.shape) for name, features in named.items()}
    is_matrix = all(len(shape) == 2 for shape in shapes.values())
    if not is_matrix or len({shape[1] for shape in shapes.values()}) != 1:
        raise ValueError(f"feature sets have shapes {shapes}; expected (items, features), features alike")


def _mean_and_covariance_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (F,) and a matrix R with RᵀR the unbiased covariance."""
    x = x.double()
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """All Euclidean distances, exactly 0 for equal rows, which the matrix-product form does not give."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
