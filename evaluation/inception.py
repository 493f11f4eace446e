"""Inception-v3 as TensorFlow published it in 2015, the network of FID and of the inception score.

Names and shapes are those of pytorch-fid's and torch-fidelity's file; the network differs from torchvision's in its
pools (Szegedy et al. 2016, arXiv:1512.00567). Legend: n pictures, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, NUM_FEATURES, NUM_CLASSES = 299, 2048, 1008
# ADM's spatial features: so many channels of one map of 17x17.
_NUM_SPATIAL_CHANNELS = 7


class InceptionOutput(NamedTuple):
    """What the network says of n pictures.

    Args:
        features: (n, 2048), averaged over places.
        class_probabilities: (n, 1008), softmax without the bias, which inception scores leave out.
        spatial_features: (n, 2023), the first 7 channels of a map of 17x17, places first: what ADM's sFID compares.
    """

    features: Tensor
    class_probabilities: Tensor
    spatial_features: Tensor


class ConvNorm(nn.Module):
    """Convolution, batch norm of fixed statistics, ReLU."""

    def __init__(self, num_inputs: int, num_outputs: int, kernel: int | tuple[int, int] = 1, stride=1, padding=None):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        # Strided convolutions shrink the map without padding; the others keep its size unless told.
        same = 0 if stride == 2 else tuple(side // 2 for side in sides)
        padding = same if padding is None else padding
        self.conv = nn.Conv2d(num_inputs, num_outputs, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(num_outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same or half the size."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        convs: the convolutions by name.
        branches: names in a row; a tuple among them stands for several whose maps are joined.
        pool: of the last branch: "average" or "max" over 3x3 before its convolution `branch_pool`, or "shrink", the
            maximum with stride 2 and nothing after it.
    """

    def __init__(self, convs: dict[str, ConvNorm], branches: list[tuple], pool: str):
        super().__init__()
        for name, conv in convs.items():
            self.add_module(name, conv)
        self.branches, self.pool = branches, pool

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined maps."""
        return torch.cat([*(self.branch(x, names) for names in self.branches), self._pooled(x)], dim=1)

    def branch(self, x: Tensor, names: tuple) -> Tensor:
        """Return one branch's map."""
        for name in names:
            parts = name if isinstance(name, tuple) else (name,)
            x = torch.cat([getattr(self, part)(x) for part in parts], dim=1)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        """Return the map of the branch that pools."""
        if self.pool == "shrink":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            # TensorFlow's last block takes the maximum, where the paper has the mean.
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        # TensorFlow's mean leaves the padding out.
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _mixed_a(num_inputs: int, num_pooled: int) -> Mixed:
    """Block of the maps of 35x35."""
    convs = {
        "branch1x1": ConvNorm(num_inputs, 64),
        "branch5x5_1": ConvNorm(num_inputs, 48),
        "branch5x5_2": ConvNorm(48, 64, 5),
        "branch3x3dbl_1": ConvNorm(num_inputs, 64),
        "branch3x3dbl_2": ConvNorm(64, 96, 3),
        "branch3x3dbl_3": ConvNorm(96, 96, 3),
        "branch_pool": ConvNorm(num_inputs, num_pooled),
    }
    branches = [("branch1x1",), ("branch5x5_1", "branch5x5_2"), tuple(f"branch3x3dbl_{n}" for n in (1, 2, 3))]
    return Mixed(convs, branches, "average")


def _mixed_b() -> Mixed:
    """From 35x35 to 17x17."""
    convs = {
        "branch3x3": ConvNorm(288, 384, 3, stride=2),
        "branch3x3dbl_1": ConvNorm(288, 64),
        "branch3x3dbl_2": ConvNorm(64, 96, 3),
        "branch3x3dbl_3": ConvNorm(96, 96, 3, stride=2),
    }
    return Mixed(convs, [("branch3x3",), tuple(f"branch3x3dbl_{n}" for n in (1, 2, 3))], "shrink")


def _mixed_c(width: int) -> Mixed:
    """Block of the maps of 17x17."""
    convs = {
        "branch1x1": ConvNorm(768, 192),
        "branch7x7_1": ConvNorm(768, width),
        "branch7x7_2": ConvNorm(width, width, (1, 7)),
        "branch7x7_3": ConvNorm(width, 192, (7, 1)),
        "branch7x7dbl_1": ConvNorm(768, width),
        "branch7x7dbl_2": ConvNorm(width, width, (7, 1)),
        "branch7x7dbl_3": ConvNorm(width, width, (1, 7)),
        "branch7x7dbl_4": ConvNorm(width, width, (7, 1)),
        "branch7x7dbl_5": ConvNorm(width, 192, (1, 7)),
        "branch_pool": ConvNorm(768, 192),
    }
    singles = tuple(f"branch7x7_{n}" for n in (1, 2, 3))
    doubles = tuple(f"branch7x7dbl_{n}" for n in range(1, 6))
    return Mixed(convs, [("branch1x1",), singles, doubles], "average")


def _mixed_d() -> Mixed:
    """From 17x17 to 8x8."""
    convs = {
        "branch3x3_1": ConvNorm(768, 192),
        "branch3x3_2": ConvNorm(192, 320, 3, stride=2),
        "branch7x7x3_1": ConvNorm(768, 192),
        "branch7x7x3_2": ConvNorm(192, 192, (1, 7)),
        "branch7x7x3_3": ConvNorm(192, 192, (7, 1)),
        "branch7x7x3_4": ConvNorm(192, 192, 3, stride=2),
    }
    branches = [("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{n}" for n in (1, 2, 3, 4))]
    return Mixed(convs, branches, "shrink")


def _mixed_e(num_inputs: int, pool: str) -> Mixed:
    """Block of the maps of 8x8."""
    convs = {
        "branch1x1": ConvNorm(num_inputs, 320),
        "branch3x3_1": ConvNorm(num_inputs, 384),
        "branch3x3_2a": ConvNorm(384, 384, (1, 3)),
        "branch3x3_2b": ConvNorm(384, 384, (3, 1)),
        "branch3x3dbl_1": ConvNorm(num_inputs, 448),
        "branch3x3dbl_2": ConvNorm(448, 384, 3),
        "branch3x3dbl_3a": ConvNorm(384, 384, (1, 3)),
        "branch3x3dbl_3b": ConvNorm(384, 384, (3, 1)),
        "branch_pool": ConvNorm(num_inputs, 192),
    }
    doubles = ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b"))
    branches = [("branch1x1",), ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")), doubles]
    return Mixed(convs, branches, pool)


class Inception2015(nn.Module):
    """The whole network; its weights come from a file, see `nextblock.evaluation.features`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        self.Mixed_6a = _mixed_b()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _mixed_c(128), _mixed_c(160), _mixed_c(160)
        self.Mixed_6e = _mixed_c(192)
        self.Mixed_7a = _mixed_d()
        self.Mixed_7b, self.Mixed_7c = _mixed_e(1280, "average"), _mixed_e(2048, "max")
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionOutput:
        """Look at pictures.

        Args:
            x: (n, 3, 299, 299) in [-1, 1); other sides from 75 on work too.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        spatial = self.Mixed_6d.branch1x1(x)[:, :_NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        for block in (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        features = x.mean(dim=(2, 3))
        return InceptionOutput(features, (features @ self.fc.weight.T).softmax(dim=1), spatial)
