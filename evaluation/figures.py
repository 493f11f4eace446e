"""All figures of a set of samples beside a reference, as flat names and values; what cannot be had says why.

Legend: N images, F features.
"""

from __future__ import annotations

import torch

from .distribution import InceptionScore, class_frechet_distances, kernel_distance
from .feature_sets import FeatureSet
from .moments import Moments, frechet_distance_of
from .neighbours import DENSITY_K, MANIFOLD_K, Nearest, nearest, neighbour_figures
from .references import Reference

_MEMORISATION_QUANTILE = 0.01


class Figures(dict):
    """Values by name; a name without a value is None, and name_reason says why."""

    def leave_out(self, reason: str, *names: str) -> None:
        """Say that figures cannot be had."""
        self.update({name: None for name in names} | {f"{name}_reason": reason for name in names})


def sample_figures(
    samples: FeatureSet,
    reference: Reference,
    *,
    score: InceptionScore | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Figures:
    """Take all figures that samples and a reference allow.

    Args:
        samples: features of the samples.
        reference: moments, features or both.
        score: the samples' inception score; None where there are no class probabilities.
        seed: of KID's subsets.
        device: where distances are computed.

    Returns:
        `fd`, the Fréchet distance, `sfid`, `kid`, `inception_score`, `precision`, `recall`, `density`, `coverage`,
        `fd_per_class_mean` and the like, and how many images they are of; in `fd_per_class` the distances of the
        classes by number.
    """
    figures = Figures(num_samples=samples.num_items, num_features=samples.features.shape[1])
    figures["num_reference"] = reference.num_items
    if reference.num_items is None:
        figures["num_reference_reason"] = "the reference's file does not say of how many images its statistics are"
    _add_frechet(figures, "fd", samples.moments, reference.moments, "")
    _add_frechet(figures, "sfid", samples.spatial_moments, reference.spatial_moments, " of ADM's spatial features")
    _add_score(figures, score)
    _add_pairwise(figures, samples, reference.features, seed, device)
    _add_classes(figures, samples, reference.features)
    return figures


def memorisation_figures(
    samples: FeatureSet, train: FeatureSet | None, real: FeatureSet | None, device: torch.device | str = "cpu"
) -> tuple[Figures, Nearest | None]:
    """Compare how far samples and other real images lie from the nearest training image.

    Args:
        samples: features of the samples.
        train: of the training images; None where there are none.
        real: of real images that are none of those; None takes each training image beside the others.
        device: where distances are computed.

    Returns:
        `nearest_train_p1_samples`, the 1st percentile of samples' distances, `nearest_train_p1_real`, and their ratio,
        which copies of training images pull towards 0; and the nearest training image of every sample.
    """
    figures, names = Figures(), [f"nearest_train_p1_{name}" for name in ("samples", "real", "ratio")]
    if train is None:
        figures.leave_out("there are no images to look for neighbours among, but statistics alone", *names)
        return figures, None
    found = nearest(samples.features, train.features, device)
    figures[names[0]] = found.distances.quantile(_MEMORISATION_QUANTILE).item()
    if real is None and len(train.features) < 2:
        figures.leave_out("there is a single training image", *names[1:])
        return figures, found
    queries = train if real is None else real
    beside = nearest(queries.features, train.features, device, is_same_set=real is None)
    figures[names[1]] = beside.distances.quantile(_MEMORISATION_QUANTILE).item()
    if figures[names[1]] > 0:
        figures[names[2]] = figures[names[0]] / figures[names[1]]
    else:
        figures.leave_out("a hundredth and more of the real images are training images themselves", names[2])
    return figures, found


def _add_frechet(figures: Figures, name: str, x: Moments | None, y: Moments | None, what: str) -> None:
    """Add a Fréchet distance."""
    if y is None or x is None:
        whose = "samples have" if x is None else "reference has"
        figures.leave_out(f"the {whose} no covariance{what}", name)
    else:
        figures[name] = frechet_distance_of(x, y)


def _add_score(figures: Figures, score: InceptionScore | None) -> None:
    """Add the inception score."""
    names = ("inception_score", "inception_score_std", "inception_score_num_splits")
    if score is None:
        figures.leave_out("the features come without class scores, which Inception's state dict has", *names)
        return
    figures.update(zip(names, score, strict=True))


def _add_pairwise(
    figures: Figures, samples: FeatureSet, features: FeatureSet | None, seed: int, device: torch.device | str
) -> None:
    """Add what compares items with items."""
    kernel = ("kid", "kid_std", "kid_num_subsets", "kid_subset_size")
    shares = ("precision", "recall", "density", "coverage")
    figures["num_sample_features"] = len(samples.features)
    figures["num_reference_features"] = 0 if features is None else len(features.features)
    if features is None:
        figures.leave_out("the reference is statistics alone, without features of images", *kernel, *shares)
        return
    num_samples, num_real = len(samples.features), len(features.features)
    if min(num_samples, num_real) < 2:
        figures.leave_out("there are fewer than two images", *kernel)
    else:
        generator = torch.Generator().manual_seed(seed)
        figures.update(zip(kernel, kernel_distance(features.features, samples.features, generator), strict=True))
    if num_real <= DENSITY_K or num_samples <= MANIFOLD_K:
        few = f"{num_real} images of the reference and {num_samples} samples are too few for {DENSITY_K} and "
        figures.leave_out(f"{few}{MANIFOLD_K} neighbours", *shares)
    else:
        figures.update(zip(shares, neighbour_figures(features.features, samples.features, device), strict=True))
    figures["precision_recall_k"], figures["density_coverage_k"] = MANIFOLD_K, DENSITY_K


def _add_classes(figures: Figures, samples: FeatureSet, features: FeatureSet | None) -> None:
    """Add the Fréchet distance class by class: its mean, and the worst of them."""
    names = ("fd_per_class_mean", "fd_per_class_worst", "fd_per_class_worst_class", "fd_per_class_num_classes")
    own = None if samples.class_labels is None else samples.class_labels
    others = None if features is None else features.class_labels
    if own is None or others is None:
        whose = "samples have" if own is None else "reference has"
        figures.leave_out(f"the {whose} no classes", *names)
        return
    if set(own.tolist()) - set(others.tolist()):
        figures.leave_out("the samples are of classes that the reference has not", *names)
        return
    distances = class_frechet_distances(samples.features, own, features.features, others)
    if not distances:
        figures.leave_out("no class has two images in both sets", *names)
        return
    worst = max(distances, key=distances.get)
    mean = sum(distances.values()) / len(distances)
    figures.update(zip(names, (mean, distances[worst], worst, len(distances)), strict=True))
    figures["fd_per_class"] = {str(label): value for label, value in distances.items()}
