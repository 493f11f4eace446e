"""Figures of who lies near whom in feature space: precision and recall, density and coverage, nearest real image.

Improved precision and recall: Kynkäänniemi et al. 2019, arXiv:1904.06991; density and coverage: Naeem et al. 2020,
arXiv:2002.09797. Distances are taken in float64, block by block. Legend: N real and M generated items, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# The papers' numbers of neighbours.
MANIFOLD_K, DENSITY_K = 3, 5
_COLUMNS = 4096
_BLOCK_VALUES = 1 << 22


class NeighbourFigures(NamedTuple):
    """What neighbours tell of M generated items.

    Args:
        precision: share of generated items within the 3rd neighbour's distance of a real one, in [0, 1].
        recall: share of real items within the 3rd neighbour's distance of a generated one, in [0, 1].
        density: how many balls of real items, up to their 5th neighbours, hold a generated one, over 5; ≥ 0.
        coverage: share of real items in whose ball, up to the 5th neighbour, a generated one lies, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Nearest(NamedTuple):
    """The nearest of some references to each query.

    Args:
        indices: (n,) int64, which it is.
        distances: (n,) float64, how far it is; 0 where they are equal.
    """

    indices: Tensor
    distances: Tensor


def neighbour_figures(real: Tensor, generated: Tensor, device: torch.device | str = "cpu") -> NeighbourFigures:
    """Compare two sets of features by the balls around their items.

    Args:
        real: (N, F), N > 5.
        generated: (M, F), M > 3.
        device: where distances are computed.

    Returns:
        The four figures.

    Raises:
        ValueError: if the shapes do not fit, or there are too few items.
    """
    _check(real=real, generated=generated)
    if len(real) <= DENSITY_K or len(generated) <= MANIFOLD_K:
        raise ValueError(
            f"there are {len(real)} real and {len(generated)} generated items; expected more than {DENSITY_K} and "
            f"{MANIFOLD_K}, whose neighbours so far away are looked for"
        )
    real_squares = _squared_radii(real, DENSITY_K, device)
    manifold, density = real_squares[:, MANIFOLD_K - 1], real_squares[:, DENSITY_K - 1]
    generated_manifold = _squared_radii(generated, MANIFOLD_K, device)[:, MANIFOLD_K - 1]
    is_precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    is_recalled, is_covered = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    num_balls = 0
    for rows, columns, squares in _blocks(generated, real, device):
        is_precise[rows] |= (squares <= manifold[columns]).any(dim=1)
        is_recalled[columns] |= (squares <= generated_manifold[rows, None]).any(dim=0)
        is_inside = squares <= density[columns]
        is_covered[columns] |= is_inside.any(dim=0)
        num_balls += is_inside.sum().item()
    shares = (flags.double().mean().item() for flags in (is_precise, is_recalled))
    return NeighbourFigures(*shares, num_balls / (DENSITY_K * len(generated)), is_covered.double().mean().item())


def nearest(
    queries: Tensor, references: Tensor, device: torch.device | str = "cpu", *, is_same_set: bool = False
) -> Nearest:
    """Find the nearest reference to each query.

    Args:
        queries: (n, F).
        references: (N, F), N ≥ 1.
        device: where distances are computed.
        is_same_set: whether the queries are the references, so that none is its own neighbour; N ≥ 2 then.

    Returns:
        The nearest references and their distances.

    Raises:
        ValueError: if the shapes do not fit, or there is no reference.
    """
    _check(queries=queries, references=references)
    if len(references) < 1 + is_same_set:
        raise ValueError(f"there are {len(references)} references; expected at least {1 + is_same_set}")
    least = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=device)
    indices = torch.zeros(len(queries), dtype=torch.int64, device=device)
    for rows, columns, squares in _blocks(queries, references, device, is_same_set=is_same_set):
        found, places = squares.min(dim=1)
        is_nearer = found < least[rows]
        indices[rows] = torch.where(is_nearer, places + columns.start, indices[rows])
        least[rows] = torch.minimum(found, least[rows])
    indices = indices.cpu()
    pairs = zip(queries.split(_COLUMNS), indices.split(_COLUMNS), strict=True)
    # Once more by the difference itself, which is 0 for equal features.
    distances = [(some.double() - references[places].double()).norm(dim=1) for some, places in pairs]
    return Nearest(indices, torch.cat(distances))


def _check(**named: Tensor) -> None:
    """Refuse feature sets that are not matrices of equal width."""
    shapes = {name: tuple(features.shape) for name, features in named.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) != 1:
        raise ValueError(f"feature sets have shapes {shapes}; expected (items, features), features alike")


def _squared_radii(features: Tensor, k: int, device: torch.device | str) -> Tensor:
    """Return the squared distances of every item to its first k neighbours, (N, k), ascending."""
    radii = torch.full((len(features), k), torch.inf, dtype=torch.float64, device=device)
    for rows, _, squares in _blocks(features, features, device, is_same_set=True):
        nearer = torch.cat([radii[rows], squares], dim=1)
        radii[rows] = nearer.topk(k, dim=1, largest=False, sorted=True).values
    return radii


def _blocks(
    x: Tensor, y: Tensor, device: torch.device | str, *, is_same_set: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield squared distances of some items of x to some of y; an item's own distance is infinite in its own set."""
    num_columns = min(len(y), _COLUMNS)
    num_rows = max(1, _BLOCK_VALUES // num_columns)
    # Centred, so that products lose no digits to a common mean.
    center = y[:_COLUMNS].double().mean(dim=0)
    for top in range(0, len(x), num_rows):
        rows = slice(top, min(top + num_rows, len(x)))
        some = x[rows].double().sub(center).to(device)
        lengths = some.square().sum(dim=1)
        for left in range(0, len(y), num_columns):
            columns = slice(left, min(left + num_columns, len(y)))
            others = y[columns].double().sub(center).to(device)
            squares = (lengths[:, None] + others.square().sum(dim=1) - 2 * some @ others.T).clamp_min_(0)
            if is_same_set:
                own = torch.arange(rows.start, rows.stop, device=device)
                own = own[(own >= left) & (own < columns.stop)]
                squares[own - rows.start, own - left] = torch.inf
            yield rows, columns, squares
