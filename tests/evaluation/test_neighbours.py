import numpy as np
import pytest
import torch

from nextblock.evaluation import neighbours
from nextblock.evaluation.neighbours import nearest, neighbour_figures


def _features(num_items, seed, shift=0.0, num_features=4):
    return torch.randn(num_items, num_features, generator=torch.Generator().manual_seed(seed)) + shift


def _brute_force(real, generated):
    """The papers' definitions, on whole matrices of distances."""

    def distances(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    real, generated = (features.double().numpy() for features in (real, generated))
    own_real, own_generated = np.sort(distances(real, real)), np.sort(distances(generated, generated))
    across = distances(generated, real)
    # Column 0 is the item itself.
    precision = (across <= own_real[:, 3]).any(1).mean()
    recall = (across <= own_generated[:, 3][:, None]).any(0).mean()
    inside = across <= own_real[:, 5]
    return precision, recall, inside.sum() / (5 * len(generated)), (across.min(0) <= own_real[:, 5]).mean()


@pytest.mark.parametrize("shift", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("block", [1 << 22, 40])
def test_figures_are_the_papers_definitions(shift, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_VALUES", block)
    monkeypatch.setattr(neighbours, "_COLUMNS", min(neighbours._COLUMNS, block // 4))
    real, generated = _features(50, seed=0), _features(37, seed=1, shift=shift)
    found = neighbour_figures(real, generated)
    assert found == pytest.approx(_brute_force(real, generated), abs=1e-12)
    if shift == 30:
        assert found == (0, 0, 0, 0)


def test_the_same_items_are_all_inside():
    real = _features(40, seed=2) + 100
    found = neighbour_figures(real, real.flip(0))
    assert found.precision == found.recall == found.coverage == 1 and found.density >= 1


def test_figures_do_not_depend_on_the_order():
    real, generated = _features(60, seed=3), _features(50, seed=4, shift=0.5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert neighbour_figures(real, generated) == neighbour_figures(real.flip(0), generated[order])


@pytest.mark.parametrize("is_same_set", [False, True])
def test_nearest_is_brute_force_and_copies_are_at_0(is_same_set):
    references = _features(30, seed=5)
    references[7] = references[20]
    queries = references if is_same_set else torch.cat([_features(8, seed=6), references[[4, 20]]])
    distances = np.linalg.norm(queries.double().numpy()[:, None] - references.double().numpy()[None], axis=2)
    if is_same_set:
        np.fill_diagonal(distances, np.inf)
    found = nearest(queries, references, is_same_set=is_same_set)
    np.testing.assert_allclose(found.distances, distances.min(1), rtol=1e-12)
    np.testing.assert_allclose(distances[np.arange(len(queries)), found.indices], distances.min(1), rtol=1e-12)
    assert (found.distances == 0).sum() == 2


def test_too_few_items_are_refused():
    with pytest.raises(ValueError, match="5 real and 9 generated items; expected more than 5 and 3"):
        neighbour_figures(_features(5, 0), _features(9, 1))
    with pytest.raises(ValueError, match="6 real and 3 generated"):
        neighbour_figures(_features(6, 0), _features(3, 1))
    with pytest.raises(ValueError, match="expected \\(items, features\\)"):
        neighbour_figures(_features(9, 0), _features(9, 1, num_features=3))
    with pytest.raises(ValueError, match="there are 1 references; expected at least 2"):
        nearest(_features(1, 0), _features(1, 0), is_same_set=True)
