"""Judges pictures of handwritten digits in the space that scikit-learn's digits come from, 8x8 intensities.

The judge of classes is a support vector classifier fitted to the real training digits alone.
Legend: N images, HxW pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .metrics import frechet_distance, mean_pairwise_distance_by_class, nearest_distances

_SIDE = 8
_MEMORISATION_QUANTILE = 0.01


@dataclass(frozen=True)
class DigitSet:
    """Pictures of digits as the judge sees them.

    Args:
        features: (N, 64) float64 in [0, 1].
        class_labels: (N,) int64, the class that each picture shows or was asked for.
    """

    features: Tensor
    class_labels: Tensor

    @classmethod
    def from_images(cls, images: np.ndarray, class_labels: np.ndarray) -> DigitSet:
        """Reduce pictures to their 64 intensities.

        Args:
            images: (N, H, W, 3) uint8, H and W divisible by 8.
            class_labels: (N,) integers, the class that each picture shows or was asked for.

        Raises:
            ValueError: if the shapes do not fit.
        """
        features = grey_intensities(images)
        if np.shape(class_labels) != (len(features),):
            raise ValueError(f"class_labels have shape {np.shape(class_labels)}; expected ({len(features)},)")
        return cls(features, torch.as_tensor(class_labels, dtype=torch.int64))


def grey_intensities(images: np.ndarray) -> Tensor:
    """Reduce pictures to 8x8 intensities by the area mean of their grey value, the mean of the channels.

    Args:
        images: (N, H, W, 3) uint8, H and W divisible by 8.

    Returns:
        (N, 64) float64 in [0, 1].

    Raises:
        ValueError: if the array is not of that kind.
    """
    is_picture_stack = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    if not is_picture_stack or images.shape[1] % _SIDE or images.shape[2] % _SIDE:
        raise ValueError(
            f"images have shape {images.shape} and dtype {images.dtype}; "
            f"expected (N, H, W, 3) uint8 with H and W divisible by {_SIDE}"
        )
    num_images, height, width, _ = images.shape
    cells = images.reshape(num_images, _SIDE, height // _SIDE, _SIDE, width // _SIDE, 3)
    return torch.from_numpy(cells.mean(axis=(2, 4, 5), dtype=np.float64).reshape(num_images, -1) / 255)


def fit_judge(train: DigitSet):
    """Fit the judge of classes: a support vector classifier, rbf kernel, scikit-learn's defaults.

    Args:
        train: the real training digits.

    Returns:
        A fitted `sklearn.svm.SVC`; fitting draws no random numbers.
    """
    from sklearn.svm import SVC

    return SVC(kernel="rbf").fit(train.features.numpy(), train.class_labels.numpy())


def class_accuracy(judge, digits: DigitSet) -> float:
    """Fraction of pictures to which the judge gives their own class.

    Args:
        judge: what `fit_judge` returns.
        digits: the pictures, at least one.

    Returns:
        The fraction, in [0, 1].
    """
    judged = torch.from_numpy(judge.predict(digits.features.numpy()))
    return (judged == digits.class_labels).double().mean().item()


def digit_figures(
    train: DigitSet, heldout: DigitSet, reconstructions: DigitSet, samples: DigitSet
) -> dict[str, float]:
    """Measure samples against real digits: class accuracy, distribution, memorisation and diversity.

    Args:
        train: the real digits that the models were trained on.
        heldout: the real digits that no model saw.
        reconstructions: `heldout` after the tokenizer's encoding and decoding.
        samples: generated digits; the classes asked for must be those of `heldout`, at least two of each.

    Returns:
        `class_accuracy_*` from the judge;
        `frechet_*`: squared Fréchet distance to the held-out, where `frechet_train` is the floor that finite
        sets of real digits have and `frechet_*_ratio` is relative to it;
        `nearest_train_p1_*`: 1st percentile of the distance to the nearest training picture, and its ratio of
        samples over held-out, which copies of training pictures pull towards 0;
        `within_class_distance_*`: mean distance of two pictures of one class, averaged over the classes, and
        `diversity_ratio`, its ratio of samples over held-out.

    Raises:
        ValueError: if the classes differ.
    """
    expected, given = set(heldout.class_labels.tolist()), set(samples.class_labels.tolist())
    if expected != given:
        raise ValueError(
            f"samples are of the classes {sorted(given)}; expected those held out, {sorted(expected)}"
        )
    judge = fit_judge(train)
    figures = {
        "class_accuracy_samples": class_accuracy(judge, samples),
        "class_accuracy_heldout": class_accuracy(judge, heldout),
        "class_accuracy_reconstructions": class_accuracy(judge, reconstructions),
        "frechet_samples": frechet_distance(samples.features, heldout.features),
        "frechet_train": frechet_distance(train.features, heldout.features),
        "frechet_reconstructions": frechet_distance(reconstructions.features, heldout.features),
        "nearest_train_p1_samples": _nearest_percentile(samples, train),
        "nearest_train_p1_heldout": _nearest_percentile(heldout, train),
        "within_class_distance_samples": _within_class_distance(samples),
        "within_class_distance_heldout": _within_class_distance(heldout),
    }
    for ratio, numerator, denominator in (
        ("frechet_samples_ratio", "frechet_samples", "frechet_train"),
        ("frechet_reconstructions_ratio", "frechet_reconstructions", "frechet_train"),
        ("nearest_train_p1_ratio", "nearest_train_p1_samples", "nearest_train_p1_heldout"),
        ("diversity_ratio", "within_class_distance_samples", "within_class_distance_heldout"),
    ):
        figures[ratio] = figures[numerator] / figures[denominator]
    return figures


def _nearest_percentile(digits: DigitSet, train: DigitSet) -> float:
    """1st percentile of the distance to the nearest training picture."""
    return nearest_distances(digits.features, train.features).quantile(_MEMORISATION_QUANTILE).item()


def _within_class_distance(digits: DigitSet) -> float:
    """Mean distance of two pictures of one class, averaged over the classes."""
    distances = mean_pairwise_distance_by_class(digits.features, digits.class_labels)
    return sum(distances.values()) / len(distances)
