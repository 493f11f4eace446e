"""Figures of distributions beside the Fréchet distance: kernel distance, inception score, Fréchet distance by class.

KID: Bińkowski et al. 2018, arXiv:1801.01401; inception score: Salimans et al. 2016, arXiv:1606.03498.
Legend: N items, F features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .metrics import frechet_distance

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
# ADM's evaluator takes the score of every 5000 images in a row.
SPLIT_SIZE = 5000


class KernelDistance(NamedTuple):
    """KID, and how it was taken.

    Args:
        mean: over the subsets.
        std: over the subsets, of the population; 0 for a single one.
        num_subsets: how many pairs of subsets.
        subset_size: items of each.
    """

    mean: float
    std: float
    num_subsets: int
    subset_size: int


class InceptionScore(NamedTuple):
    """The inception score, and how it was taken.

    Args:
        mean: over the splits, in [1, C].
        std: over the splits, of the population; 0 for a single one.
        num_splits: of up to 5000 images in a row.
    """

    mean: float
    std: float
    num_splits: int


def kernel_distance(x: Tensor, y: Tensor, generator: torch.Generator) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under the kernel (x·y/F + 1)³, over random subsets as KID has it.

    Args:
        x: (N, F), N ≥ 2.
        y: (M, F), M ≥ 2.
        generator: on the CPU, draws 100 subsets of up to 1000 of each set; sets no larger are taken whole, once.

    Returns:
        Mean and deviation over the subsets.

    Raises:
        ValueError: if the shapes do not fit.
    """
    size = min(len(x), len(y), SUBSET_SIZE)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or size < 2:
        raise ValueError(
            f"feature sets have shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (items, features), features "
            "alike and at least 2 items"
        )
    num_subsets = 1 if len(x) == len(y) == size else NUM_SUBSETS
    values = []
    for _ in range(num_subsets):
        parts = (items[torch.randperm(len(items), generator=generator)[:size]].double() for items in (x, y))
        values.append(_discrepancy(*parts))
    found = torch.stack(values)
    return KernelDistance(found.mean().item(), found.std(correction=0).item(), num_subsets, size)


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased discrepancy of two sets of n items."""
    num_items, num_features = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / num_features + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (num_items * (num_items - 1))
    return within - 2 * kernel(x, y).mean()


def inception_score(
    class_probabilities: Tensor, split_size: int = SPLIT_SIZE, order: Tensor | None = None
) -> InceptionScore:
    """Exponential of the mean divergence of an image's classes from those of its split, averaged over the splits.

    Args:
        class_probabilities: (N, C) in the order of the images, which matters where there are several splits.
        split_size: images in a row that make a split.
        order: (N,) int64, the images in the order to be taken; None takes them as they are.

    Returns:
        Mean and deviation over the splits.

    Raises:
        ValueError: if there is no image.
    """
    if class_probabilities.ndim != 2 or not len(class_probabilities):
        raise ValueError(f"class_probabilities are {tuple(class_probabilities.shape)}; expected (images ≥ 1, classes)")
    scores = []
    order = torch.arange(len(class_probabilities)) if order is None else order
    for rows in order.split(split_size):
        part = class_probabilities[rows].double()
        mean = part.mean(dim=0)
        # As a difference of entropies: no class of probability 0 is a trouble.
        divergence = torch.xlogy(part, part).sum(dim=1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(divergence.exp())
    found = torch.stack(scores)
    return InceptionScore(found.mean().item(), found.std(correction=0).item(), len(scores))


def class_frechet_distances(
    x: Tensor, class_labels_x: Tensor, y: Tensor, class_labels_y: Tensor
) -> dict[int, float]:
    """Squared Fréchet distance class by class.

    Args:
        x: (N, F).
        class_labels_x: (N,) integers.
        y: (M, F).
        class_labels_y: (M,) integers.

    Returns:
        The distance of each class that has at least two items in both sets, in order of class.
    """
    distances = {}
    for label in class_labels_x.unique().tolist():
        own, others = x[class_labels_x == label], y[class_labels_y == label]
        if min(len(own), len(others)) >= 2:
            distances[label] = frechet_distance(own, others)
    return distances
