import numpy as np
import pytest
import torch

from nextblock.evaluation.metrics import (
    frechet_distance,
    mean_pairwise_distance_by_class,
    mean_squared_errors,
    nearest_distances,
    psnr,
    psnr_from_error,
)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_moments(mean, variances, num_items, seed):
    """Draw items whose sample mean and unbiased sample covariance are exactly the given ones."""
    x = _normal(num_items, len(mean), seed=seed)
    x = torch.linalg.qr(x - x.mean(dim=0)).Q * (num_items - 1) ** 0.5
    return x * torch.tensor(variances, dtype=torch.float64).sqrt() + torch.tensor(mean, dtype=torch.float64)


def test_psnr_of_known_errors():
    originals = torch.zeros(3, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), v) for v in (0.2, 0.02, 0.0)])
    values = psnr(reconstructions, originals)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values[:2], torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert values[2] == float("inf")


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _normal(5, 3, 6, 4, seed=1).tanh(), _normal(5, 3, 6, 4, seed=2).tanh()
    expected = peak_signal_noise_ratio(x, y, data_range=2.0, dim=(1, 2, 3), reduction="none")
    # torchmetrics takes its logarithms in float32
    torch.testing.assert_close(psnr(x, y), expected, rtol=1e-6, atol=0)


def test_psnr_counts_in_float64_for_half_types():
    originals = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    reconstructions = torch.full_like(originals, 1 / 256)
    assert mean_squared_errors(reconstructions, originals).item() == 2.0**-16
    assert psnr(reconstructions, originals).item() == pytest.approx(10 * np.log10(4 * 2**16), abs=1e-12)


def test_psnr_depends_on_the_data_range():
    error = torch.tensor([0.01, 0.1])
    difference = psnr_from_error(error, 2.0) - psnr_from_error(error, 1.0)
    torch.testing.assert_close(difference, torch.full((2,), 20 * np.log10(2), dtype=torch.float64))
    with pytest.raises(ValueError, match="data_range is 0"):
        psnr_from_error(error, 0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 3, 4, 4), (0, 3, 4, 4)])
def test_errors_refuse_shapes_that_differ_or_are_empty(shape):
    originals = torch.zeros(shape if shape[0] == 0 else (2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected two equal shapes"):
        mean_squared_errors(torch.zeros(shape), originals)


def test_frechet_distance_closed_form_of_diagonal_covariances():
    mean_x, variances_x = [1.0, -2.0, 0.5], [4.0, 0.25, 1.0]
    mean_y, variances_y = [0.0, 1.0, 0.5], [1.0, 2.25, 1.0]
    x = _with_moments(mean_x, variances_x, num_items=50, seed=3)
    y = _with_moments(mean_y, variances_y, num_items=20, seed=4)
    # |mean difference|² + Σ (sd_x − sd_y)²
    assert frechet_distance(x, y) == pytest.approx((1 + 9 + 0) + (1 + 1 + 0), abs=1e-12)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    x = _normal(200, 6, seed=5) @ _normal(6, 6, seed=6)
    y = _normal(150, 6, seed=7) @ _normal(6, 6, seed=8) + 0.3
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    mean_term = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = mean_term + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_singular_covariances():
    x = torch.cat([_normal(30, 4, seed=9), torch.zeros(30, 2)], dim=1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    shift = torch.tensor([0.0, 0, 0, 0, 2, 1])
    assert frechet_distance(x, x.flip(0) + shift) == pytest.approx(5, abs=1e-12)
    # fewer items than features
    assert frechet_distance(x[:3], x[:3]) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="expected at least 2 of each"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="features"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_nearest_distances_equal_brute_force(chunk_size):
    queries, references = _normal(10, 4, seed=10), _normal(7, 4, seed=11)
    references[3] = queries[2]
    expected = (queries[:, None] - references[None]).square().sum(-1).sqrt().amin(1)
    nearest = nearest_distances(queries, references, chunk_size=chunk_size)
    torch.testing.assert_close(nearest, expected, rtol=1e-14, atol=0)
    assert nearest[2] == 0


def test_nearest_distances_refuse_no_references():
    with pytest.raises(ValueError, match="0 references"):
        nearest_distances(torch.zeros(3, 2), torch.zeros(0, 2))


def test_mean_pairwise_distance_by_class():
    features = torch.tensor([[0.0, 0], [9, 9], [3, 4], [0, 8], [9, 9]])
    class_labels = torch.tensor([5, 2, 5, 5, 2])
    # class 5: a 5-5-8 triangle
    assert mean_pairwise_distance_by_class(features, class_labels) == {
        2: 0.0,
        5: pytest.approx(6.0, abs=1e-12),
    }


def test_mean_pairwise_distance_refuses_a_single_item():
    with pytest.raises(ValueError, match="class 7 has a single item"):
        mean_pairwise_distance_by_class(torch.zeros(3, 2), torch.tensor([1, 7, 1]))
    with pytest.raises(ValueError, match="class_labels have shape"):
        mean_pairwise_distance_by_class(torch.zeros(3, 2), torch.zeros(2))
