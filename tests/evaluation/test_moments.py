import math

import numpy as np
import pytest
import torch

from nextblock.evaluation.metrics import frechet_distance
from nextblock.evaluation.moments import Moments, MomentSums, frechet_distance_of, merged


def _features(num_items, num_features, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return torch.randn(num_items, num_features, generator=generator, dtype=torch.float64) @ mixing + shift


def test_moments_are_numpys():
    features = _features(3000, 5, seed=0, shift=1e4)
    moments = Moments.of(features)
    np.testing.assert_allclose(moments.mean, features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10)
    assert moments.num_items == 3000 and moments.root is None


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_moments_do_not_depend_on_how_items_are_dealt_out(num_parts):
    features = _features(200, 4, seed=1, shift=50)
    parts = [MomentSums(4) for _ in range(num_parts)]
    for number, row in enumerate(features.split(9)):
        parts[number % num_parts].add(row)
    moments, expected = merged(parts).moments(), Moments.of(features)
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, expected.covariance, rtol=1e-11, atol=1e-12)
    other = Moments.of(_features(100, 4, seed=2))
    assert frechet_distance_of(moments, other) == pytest.approx(frechet_distance_of(expected, other), rel=1e-12)


def test_frechet_distance_closed_form_of_the_moments_alone():
    """Commuting covariances: |mean difference|² + Σ (sd_x − sd_y)²."""
    basis = torch.linalg.qr(_features(4, 4, seed=3)).Q
    variances_x, variances_y = torch.tensor([4.0, 1, 0.25, 0]).double(), torch.tensor([1.0, 1, 2.25, 9]).double()
    x = Moments(0, torch.tensor([1.0, 0, -2, 0]).double(), basis @ variances_x.diag() @ basis.T)
    y = Moments(0, torch.tensor([0.0, 0, 1, 0]).double(), basis @ variances_y.diag() @ basis.T)
    assert frechet_distance_of(x, y) == pytest.approx((1 + 9) + (1 + 0 + 1 + 9), abs=1e-9)
    assert frechet_distance_of(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("num_x", "num_y"), [(400, 300), (10, 300), (10, 12), (33, 32)])
def test_frechet_distance_of_moments_is_that_of_the_features(num_x, num_y):
    x, y = _features(num_x, 32, seed=4), _features(num_y, 32, seed=5, shift=0.3)
    given = frechet_distance_of(Moments.of(x), Moments.of(y))
    assert given == pytest.approx(frechet_distance(x, y), rel=1e-10)
    # As a file of statistics would have them, without the roots.
    bare = [Moments(0, moments.mean, moments.covariance) for moments in (Moments.of(x), Moments.of(y))]
    assert frechet_distance_of(*bare) == pytest.approx(given, rel=1e-9)


def test_frechet_distance_is_torchmetrics_own():
    from torchmetrics.image.fid import _compute_fid

    x, y = Moments.of(_features(100, 8, seed=6)), Moments.of(_features(90, 8, seed=7, shift=1))
    expected = _compute_fid(x.mean, x.covariance, y.mean, y.covariance).item()
    assert frechet_distance_of(x, y) == pytest.approx(expected, rel=1e-9)


def test_features_of_one_value_are_no_trouble():
    x = torch.ones(5, 3)
    assert frechet_distance_of(Moments.of(x), Moments.of(x + 2)) == pytest.approx(12, abs=1e-12)
    bare = Moments(5, x[0].double(), torch.zeros(3, 3).double())
    assert frechet_distance_of(bare, Moments.of(x + 2)) == pytest.approx(12, abs=1e-12)


def test_what_has_no_moments_is_refused():
    with pytest.raises(ValueError, match="there are 1 items; expected at least 2"):
        Moments.of(torch.ones(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(torch.tensor([[1.0, math.nan], [0, 0]]))
    with pytest.raises(ValueError, match="of 2 and 3 features"):
        frechet_distance_of(Moments.of(torch.rand(4, 2)), Moments.of(torch.rand(4, 3)))
