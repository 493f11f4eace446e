"""Structural similarity beside an independent reference, bits of tokens, and figures of several processes as of one."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.image import StructuralSimilarityIndexMeasure

from nextblock.data.pixels import to_uint8
from nextblock.evaluation.metrics import frechet_distance
from nextblock.evaluation.similarity import SimilarityMeter, bit_figures, similarity_figures, ssim

N = 37


def images(seed: int, count: int = N, height: int = 16, width: int = 12) -> torch.Tensor:
    return 2 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 1


def blurred(levels: np.ndarray) -> np.ndarray:
    return gaussian_filter(levels, 1.5, mode="mirror", truncate=3.5)


def test_ssim_equals_its_definition_and_torchmetrics():
    originals = images(0, 5)
    reconstructions = (originals + 0.3 * images(1, 5)).clamp(-1, 1)
    found = ssim(reconstructions, originals)
    for value, *pair in zip(found.tolist(), reconstructions, originals, strict=True):
        maps = []
        for x, y in zip(*((np.asarray(image, np.float64) + 1) / 2 for image in pair), strict=True):
            mean_x, mean_y = blurred(x), blurred(y)
            spread = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2 + 0.03**2
            covariance = 2 * (blurred(x * y) - mean_x * mean_y) + 0.03**2
            brightness = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
            maps.append(brightness * covariance / spread)
        assert value == pytest.approx(np.mean(maps), abs=1e-9)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert found.mean().item() == pytest.approx(metric((reconstructions + 1) / 2, (originals + 1) / 2).item(), abs=1e-5)
    assert found.dtype == torch.float64 and ssim(originals, originals).tolist() == pytest.approx([1.0] * 5)
    for wrong in (images(0, 5)[..., :5], images(0, 4)):
        with pytest.raises(ValueError, match="expected two equal shapes"):
            ssim(wrong, wrong if wrong.shape[-1] == 5 else originals)


def test_bits_of_tokens():
    counts = torch.tensor([[2, 2, 0, 0], [2, 2, 0, 0]])
    expected = {"bits_per_token": 2, "bits_per_pixel": 2 * 5 / 8, "code_entropy_bits_per_token": pytest.approx(1)}
    assert bit_figures(counts, 5, (4, 2)) == expected
    assert bit_figures(torch.ones(1, 1000), 1, (1, 1))["code_entropy_bits_per_token"] == pytest.approx(math.log2(1000))


def measure(world_size: int, num_features: int, batch_size: int = 4) -> dict:
    """Measure as several processes would, with features of as many columns of the pixels."""
    originals, reconstructions = images(0), images(1)
    extractor = lambda pixels: SimpleNamespace(  # noqa: E731
        features=torch.from_numpy(pixels.reshape(len(pixels), -1)[:, :num_features].astype(np.float32))
    )
    lpips = lambda x, y: (x - y).square().mean(dim=(1, 2, 3), keepdim=True)  # noqa: E731
    parts, numbers = [], []
    for rank in range(world_size):
        meter, own = SimilarityMeter(N, lpips, extractor), []
        for start in range(rank * batch_size, N, batch_size * world_size):
            meter(reconstructions[start : start + batch_size], originals[start : start + batch_size])
            own += range(start, min(start + batch_size, N))
        parts.append(meter.measured())
        numbers.append(np.array(own))
    return similarity_figures(parts, numbers)


@pytest.mark.parametrize("num_features", [9, 100])
def test_any_number_of_processes_measures_the_same(num_features):
    whole = measure(1, num_features)
    for world_size in (2, 3):
        assert measure(world_size, num_features) == pytest.approx(whole, rel=1e-9)
    x, y = (torch.from_numpy(to_uint8(images(n)).reshape(N, -1)[:, :num_features].astype(float)) for n in (0, 1))
    assert whole["fd"] == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert whole["lpips"] == pytest.approx((images(0) - images(1)).square().mean().item(), rel=1e-6)
    assert whole["ssim"] == pytest.approx(ssim(images(1), images(0)).mean().item(), rel=1e-12)


def test_what_is_not_asked_for_or_impossible_is_none():
    meter = SimilarityMeter(3)
    meter(images(0, 3, 5), images(1, 3, 5))
    assert similarity_figures([meter.measured()], [np.arange(3)]) == {"ssim": None, "lpips": None, "fd": None}
