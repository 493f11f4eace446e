"""How alike pictures and their reconstructions are: structural similarity, LPIPS, features; and bits of their tokens.

SSIM is Wang et al.'s (2004). Legend: N images, n of one process, B batch, F features, V codes, L tokens, HxW pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextblock.data.pixels import to_uint8

from .codebook import perplexity
from .features import FeatureExtractor
from .moments import Moments, MomentSums, frechet_distance_of, merged

# SSIM's window: a Gaussian of 11 pixels, the picture mirrored by five of them at its edges.
_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5
MIN_SSIM_SIDE = _WINDOW_RADIUS + 1
_SSIM_MEAN_TERM, _SSIM_SPREAD_TERM = 0.01**2, 0.03**2


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture, at levels in [0, 1], a Gaussian window of 1.5 pixels, over all channels.

    Args:
        reconstructions: (B, 3, H, W) in [-1, 1], H and W ≥ 6.
        originals: the same shape.

    Returns:
        (B,) float64, at most 1.

    Raises:
        ValueError: if the shapes differ or are too small for the window.
    """
    if reconstructions.shape != originals.shape or min(originals.shape[2:], default=0) < MIN_SSIM_SIDE:
        raise ValueError(
            f"reconstructions have shape {tuple(reconstructions.shape)}, originals {tuple(originals.shape)}; expected "
            f"two equal shapes (B, 3, H, W) of at least {MIN_SSIM_SIDE} pixels a side"
        )
    rows, columns = (_window(size, originals.device) for size in originals.shape[2:])
    values = []
    # One picture at a time: in float64, a batch of the five maps that are averaged takes gigabytes.
    for pair in zip(reconstructions, originals, strict=True):
        x, y = ((image.double() + 1) / 2 for image in pair)
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
        spread = (mean_xx - mean_x**2).clamp_min(0) + (mean_yy - mean_y**2).clamp_min(0)
        covariance = mean_xy - mean_x * mean_y
        brightness = (2 * mean_x * mean_y + _SSIM_MEAN_TERM) / (mean_x**2 + mean_y**2 + _SSIM_MEAN_TERM)
        values.append((brightness * (2 * covariance + _SSIM_SPREAD_TERM) / (spread + _SSIM_SPREAD_TERM)).mean())
    return torch.stack(values)


def _window(size: int, device: torch.device) -> Tensor:
    """Return the (size, size) float64 matrix that averages a row of pixels by SSIM's window, mirrored at its ends."""
    shifts = torch.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1)
    weights = torch.exp(-(shifts.double() ** 2) / (2 * _WINDOW_SIGMA**2))
    places = (torch.arange(size)[:, None] + shifts).abs()
    places = (size - 1) - ((size - 1) - places).abs()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1)).to(device)


def bit_figures(code_counts: Tensor, num_tokens: int, image_size: tuple[int, int]) -> dict[str, float]:
    """Say how many bits tokens take, written one by one.

    Args:
        code_counts: (K, V), how often each block used each code; also `SparseCounts`.
        num_tokens: L of one image.
        image_size: (H, W).

    Returns:
        `bits_per_token`, log2 V; `bits_per_pixel`, of all tokens of an image over its pixels; and
        `code_entropy_bits_per_token`, what a token takes on average if codes are written by their frequencies.
    """
    bits = math.log2(code_counts.shape[1])
    return {
        "bits_per_token": bits,
        "bits_per_pixel": bits * num_tokens / math.prod(image_size),
        "code_entropy_bits_per_token": torch.log2(perplexity(code_counts.sum(dim=0))).item(),
    }


@dataclass(frozen=True)
class Measured:
    """What one process has measured of its n images.

    Args:
        ssim: (n,) float64; empty where images are too small for it.
        lpips: (n,) float64; empty where there is no network.
        features: of originals and of reconstructions, (n, F) float32 where all N images are no more than F, else their
            sums; empty where there is no network.
    """

    ssim: Tensor
    lpips: Tensor
    features: tuple[Tensor, Tensor] | tuple[MomentSums, MomentSums] | tuple[()]


class SimilarityMeter:
    """Compares reconstructions with their originals, batch by batch, and keeps numbers alone.

    Args:
        num_images: N of all processes.
        lpips: gives LPIPS (B, 1, 1, 1) of two batches (B, 3, H, W) in [-1, 1]; None leaves it out.
        extractor: makes features of bytes; None leaves the Fréchet distance out.
    """

    def __init__(
        self,
        num_images: int,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        extractor: FeatureExtractor | None = None,
    ):
        self._num_images, self._lpips, self._extractor = num_images, lpips, extractor
        self._values: dict[str, list[Tensor]] = {"ssim": [], "lpips": []}
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._sums: tuple[MomentSums, MomentSums] | None = None

    def __call__(self, reconstructions: Tensor, originals: Tensor) -> None:
        """Compare a batch with its originals, both (B, 3, H, W) in [-1, 1]."""
        if min(originals.shape[2:]) >= MIN_SSIM_SIDE:
            self._values["ssim"].append(ssim(reconstructions, originals).cpu())
        if self._lpips is not None:
            distances = self._lpips(reconstructions.float(), originals.float())
            self._values["lpips"].append(distances.double().flatten().cpu())
        if self._extractor is not None:
            embedded = [self._extractor(to_uint8(images)).features for images in (originals, reconstructions)]
            self._add_features(embedded)

    def _add_features(self, embedded: Sequence[Tensor]) -> None:
        """Keep features of few images, which their moments alone do not tell exactly; else add them up."""
        num_features = embedded[0].shape[1]
        if self._num_images > num_features and self._sums is None:
            self._sums = MomentSums(num_features), MomentSums(num_features)
        for side, features in enumerate(embedded):
            if self._sums is None:
                self._features[side].append(features)
            else:
                self._sums[side].add(features)

    def measured(self) -> Measured:
        """Return what this process has measured."""
        values = {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in self._values.items()}
        features = self._sums or tuple(torch.cat(parts) for parts in self._features if parts)
        return Measured(values["ssim"], values["lpips"], features)


def similarity_figures(parts: Sequence[Measured], numbers: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Put together what several processes have measured.

    Args:
        parts: of each process.
        numbers: of each process, the numbers of its images, in its order.

    Returns:
        `ssim`, `lpips` and `fd`, the Fréchet distance of features; None where nothing was measured, or of one image.
    """
    order = np.argsort(np.concatenate(numbers))
    figures = {}
    for name in ("ssim", "lpips"):
        values = torch.cat([getattr(part, name) for part in parts])
        figures[name] = values[order].mean().item() if len(values) else None
    figures["fd"] = None
    if parts[0].features and len(order) > 1:
        sides = zip(*(part.features for part in parts), strict=True)
        figures["fd"] = frechet_distance_of(*(_moments(side, order) for side in sides))
    return figures


def _moments(parts: Sequence[Tensor] | Sequence[MomentSums], order: np.ndarray) -> Moments:
    """Return the moments of all images."""
    if isinstance(parts[0], MomentSums):
        return merged(parts).moments()
    return Moments.of(torch.cat(parts)[order])
