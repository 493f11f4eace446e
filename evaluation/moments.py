"""Mean and covariance of features, gathered in float64 batch by batch, and the Fréchet distance of two of them.

FID is this distance of Inception features (Heusel et al. 2017, arXiv:1706.08500). Legend: N items, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs to know of N items.

    Args:
        num_items: N; 0 where a file of statistics does not say.
        mean: (F,) float64.
        covariance: (F, F) float64, unbiased.
        root: (R, F) float64 with rootᵀ·root the covariance, where it is known; R ≤ F.
    """

    num_items: int
    mean: Tensor
    covariance: Tensor
    root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Take the moments of features.

        Args:
            features: (N, F) of any real dtype, N ≥ 2. Of no more items than features a root is kept that is exact
                where the covariance is singular.

        Raises:
            ValueError: if there are fewer than two items, or values that are not finite.
        """
        num_items, num_features = features.shape
        sums = MomentSums(num_features)
        for chunk in features.split(_CHUNK):
            sums.add(chunk)
        moments = sums.moments()
        if num_items > num_features:
            return moments
        root = torch.linalg.qr(features.double() - moments.mean, mode="r").R / (num_items - 1) ** 0.5
        return cls(num_items, moments.mean, moments.covariance, root)

    def covariance_root(self) -> Tensor:
        """Return (R, F) float64 whose product with itself is the covariance; R < F where that is singular."""
        if self.root is not None:
            return self.root
        values, vectors = torch.linalg.eigh(self.covariance)
        # What rounding leaves of eigenvalues that are zero would count by its square root.
        is_kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return values[is_kept].sqrt()[:, None] * vectors[:, is_kept].T


class MomentSums:
    """Adds up moments batch by batch, by the update of Chan, Golub and LeVeque (1979), stable for any mean.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int):
        self.num_items = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add items.

        Args:
            features: (n, F) of any real dtype, on the CPU.

        Raises:
            ValueError: if a value is not finite.
        """
        if not len(features):
            return
        features = features.double()
        if not features.isfinite().all():
            raise ValueError("features hold values that are not finite; expected finite ones from a network in order")
        mean = features.mean(dim=0)
        centered = features - mean
        self.merge(len(features), mean, centered.T @ centered)

    def merge(self, num_items: int, mean: Tensor, scatter: Tensor) -> None:
        """Add the sums of other items.

        Args:
            num_items: how many.
            mean: (F,) float64.
            scatter: (F, F) float64, the sum of outer products of their differences to their mean.
        """
        if not num_items:
            return
        total = self.num_items + num_items
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.num_items * num_items / total)
        self.mean += shift * (num_items / total)
        self.num_items = total

    def moments(self) -> Moments:
        """Return the moments of all that were added.

        Raises:
            ValueError: if they are fewer than two.
        """
        if self.num_items < 2:
            raise ValueError(f"there are {self.num_items} items; expected at least 2 to have a covariance")
        return Moments(self.num_items, self.mean.clone(), self.scatter / (self.num_items - 1))


def frechet_distance_of(x: Moments, y: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with given moments; see `nextblock.evaluation.metrics`.

    Args:
        x: of one set.
        y: of the other; covariances may be singular.

    Returns:
        The distance, ≥ 0 up to rounding.

    Raises:
        ValueError: if they are of different numbers of features.
    """
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"moments are of {len(x.mean)} and {len(y.mean)} features; expected the same number")
    root_x, root_y = x.covariance_root(), y.covariance_root()
    # With S = RᵀR, tr((S_x S_y)^½) is the nuclear norm of R_x R_yᵀ.
    overlap = nuclear_norm(root_x @ root_y.T)
    spread = x.covariance.trace() + y.covariance.trace()
    return ((x.mean - y.mean).square().sum() + spread - 2 * overlap).item()


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the singular values of a matrix, 0 for an empty one."""
    return torch.linalg.svdvals(matrix).sum() if matrix.numel() else matrix.new_zeros(())


def merged(parts: Sequence[MomentSums]) -> MomentSums:
    """Add up the sums of several processes, in their order."""
    total = MomentSums(len(parts[0].mean))
    for part in parts:
        total.merge(part.num_items, part.mean, part.scatter)
    return total
