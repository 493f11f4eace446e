"""Convolutional encoders and decoders: "simple" (strided convolutions) and "vqgan" (the latent-diffusion family).

VQGAN: Esser et al. 2021, arXiv:2012.09841. Legend: B batch, C latent channels, H×W pixels, h×w latent cells.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nextblock.training.precision import is_plain_on_cpu

MAX_NORM_GROUPS = 32
# A group of one channel loses its mean, and with it an image's colour and brightness.
MIN_GROUP_CHANNELS = 4


def num_norm_groups(num_channels: int, min_group_channels: int = MIN_GROUP_CHANNELS) -> int:
    """Return the largest power of two, at most 32, that cuts channels into equal groups of so many at least, or 1."""
    groups = math.gcd(MAX_NORM_GROUPS, num_channels)
    while groups > 1 and num_channels // groups < min_group_channels:
        groups //= 2
    return groups


def group_norm(num_channels: int, min_group_channels: int = MIN_GROUP_CHANNELS) -> nn.GroupNorm:
    """Normalise in as many groups as `num_norm_groups` says."""
    return nn.GroupNorm(num_norm_groups(num_channels, min_group_channels), num_channels, eps=1e-6)


def activate(x: Tensor) -> Tensor:
    """Apply SiLU to a fresh tensor, in place where no gradient needs what it was."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def as_channels_last(latents: Tensor) -> Tensor:
    """Return a decoder's input as its convolutions take it fastest, where no gradient is wanted."""
    is_fast = latents.device.type == "cpu" or latents.dtype != torch.float32
    if is_fast and not torch.is_grad_enabled():
        return latents.contiguous(memory_format=torch.channels_last)
    return latents


class ResidualBlock(GradientCheckpointingLayer):
    """norm1-SiLU-conv1-norm2-SiLU-dropout-conv2 around a skip connection.

    Args:
        in_channels, out_channels: widths; where they differ, a 1×1 convolution lies in the skip connection.
        dropout: probability.
        min_group_channels: fewest channels of a group in GroupNorm.
        has_bias: whether the convolutions add one.
        shortcut_of: what that 1×1 convolution is of, "input" or, as in MaskGIT, the "result" of the others; the input
            is then lost.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        min_group_channels: int = MIN_GROUP_CHANNELS,
        has_bias: bool = True,
        shortcut_of: Literal["input", "result"] = "input",
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels, min_group_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=has_bias)
        self.norm2 = group_norm(out_channels, min_group_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=has_bias)
        self.is_input_lost = shortcut_of == "result" and in_channels != out_channels
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(out_channels if self.is_input_lost else in_channels, out_channels, 1, bias=has_bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(activate(self.norm1(x)))
        h = self.conv2(self.dropout(activate(self.norm2(h))))
        if self.is_input_lost:
            return h + self.nin_shortcut(h)
        # In place, as convolutions do not need their output for a gradient.
        return h.add_(self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention over all cells of a map, with a skip connection."""

    def __init__(self, channels: int, min_group_channels: int = MIN_GROUP_CHANNELS):
        super().__init__()
        self.norm = group_norm(channels, min_group_channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, _ = x.shape
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=h))


class Downsample(nn.Module):
    """Halve both sides: zero-pad right and bottom by one, then a stride-2 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3×3 convolution.

    On a CPU in float32, where no gradient is wanted, both are one transposed convolution, with rows and columns of the
    kernel that would meet the same pixel added up: 16 products a channel in place of 36, the same but for rounding.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # What an adapter put in the convolution's place is called as it is.
        if type(self.conv) is nn.Conv2d and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            weight = self.conv.weight
            if is_plain_on_cpu(x, weight, torch.float32):
                kernel = _doubling_kernel(_doubling_kernel(weight, 2), 3).transpose(0, 1)
                return F.conv_transpose2d(x, kernel.contiguous(), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _doubling_kernel(kernel: Tensor, dim: int) -> Tensor:
    """Make the four taps of a transposed convolution of stride 2 of three taps that follow a doubling."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([third, second + third, first + second, first], dim)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, widths: list[int], has_attention: bool, dropout: float, min_group_channels: int):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout, min_group_channels) for a, b in pairs)
        self.attn = nn.ModuleList(SpatialAttention(b, min_group_channels) for _, b in pairs if has_attention)

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, min_group_channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout, min_group_channels)
        self.attn_1 = SpatialAttention(channels, min_group_channels)
        self.block_2 = ResidualBlock(channels, channels, dropout, min_group_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VQGANEncoder(nn.Module):
    """Image to latent map, one halving between neighbouring levels.

    Args:
        num_channels: image channels.
        base_width: channels at full resolution before the multipliers.
        width_multipliers: one factor a level, finest first; the map is 2^(levels − 1) times smaller than the image.
        num_res_blocks: residual blocks a level.
        z_channels: C of the latent map.
        dropout: probability inside residual blocks.
        min_group_channels: fewest channels of a group in GroupNorm.
        attention_levels: levels whose residual blocks are each followed by attention, 0 the finest; None means the
            lowest resolution alone.
    """

    def __init__(
        self,
        num_channels: int,
        base_width: int,
        width_multipliers: list[int],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int = MIN_GROUP_CHANNELS,
        attention_levels: Collection[int] | None = None,
    ):
        super().__init__()
        widths = [base_width * m for m in width_multipliers]
        last = len(widths) - 1
        attended = (last,) if attention_levels is None else attention_levels
        self.conv_in = nn.Conv2d(num_channels, base_width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip([base_width, *widths[:-1]], widths, strict=True)):
            level = Level([width_in] + [width] * num_res_blocks, i in attended, dropout, min_group_channels)
            if i < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout, min_group_channels)
        self.norm_out = group_norm(widths[-1], min_group_channels)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv_in(pixel_values)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(activate(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """Latent map to image; `up[0]` is the finest level, as in the published checkpoints. Arguments as the encoder's."""

    def __init__(
        self,
        num_channels: int,
        base_width: int,
        width_multipliers: list[int],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int = MIN_GROUP_CHANNELS,
        attention_levels: Collection[int] | None = None,
    ):
        super().__init__()
        widths = [base_width * m for m in width_multipliers]
        last = len(widths) - 1
        attended = (last,) if attention_levels is None else attention_levels
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, min_group_channels)
        self.up = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level([width_in] + [width] * (num_res_blocks + 1), i in attended, dropout, min_group_channels)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], min_group_channels)
        self.conv_out = nn.Conv2d(widths[0], num_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(as_channels_last(latents)))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(activate(self.norm_out(x)))


class SimpleEncoder(nn.Sequential):
    """Two stride-2 4×4 convolutions; with residual blocks after each, GroupNorm and SiLU replace the plain ReLU.

    Args:
        num_channels: image channels.
        base_width: hidden channels.
        num_res_blocks: residual blocks after each convolution; 0 gives Conv-ReLU-Conv.
        z_channels: C of the latent map, four times smaller than the image.
        dropout: probability inside residual blocks.
        min_group_channels: fewest channels of a group in GroupNorm.
    """

    def __init__(
        self,
        num_channels: int,
        base_width: int,
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int = MIN_GROUP_CHANNELS,
    ):
        halve = {"kernel_size": 4, "stride": 2, "padding": 1}
        if num_res_blocks == 0:
            super().__init__(
                nn.Conv2d(num_channels, base_width, **halve), nn.ReLU(), nn.Conv2d(base_width, z_channels, **halve)
            )
            return
        block = base_width, base_width, dropout, min_group_channels
        super().__init__(
            nn.Conv2d(num_channels, base_width, **halve),
            *(ResidualBlock(*block) for _ in range(num_res_blocks)),
            nn.Conv2d(base_width, base_width, **halve),
            *(ResidualBlock(*block) for _ in range(num_res_blocks)),
            group_norm(base_width, min_group_channels),
            nn.SiLU(),
            nn.Conv2d(base_width, z_channels, 1),
        )


class SimpleDecoder(nn.Sequential):
    """Mirror of `SimpleEncoder` with transposed convolutions. Arguments as the encoder's."""

    def __init__(
        self,
        num_channels: int,
        base_width: int,
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int = MIN_GROUP_CHANNELS,
    ):
        double = {"kernel_size": 4, "stride": 2, "padding": 1}
        if num_res_blocks == 0:
            super().__init__(
                nn.ConvTranspose2d(z_channels, base_width, **double),
                nn.ReLU(),
                nn.ConvTranspose2d(base_width, num_channels, **double),
            )
            return
        block = base_width, base_width, dropout, min_group_channels
        super().__init__(
            nn.Conv2d(z_channels, base_width, 1),
            *(ResidualBlock(*block) for _ in range(num_res_blocks)),
            nn.ConvTranspose2d(base_width, base_width, **double),
            *(ResidualBlock(*block) for _ in range(num_res_blocks)),
            group_norm(base_width, min_group_channels),
            nn.SiLU(),
            nn.ConvTranspose2d(base_width, num_channels, **double),
        )

    def forward(self, x: Tensor) -> Tensor:
        # Dynamo passes over the forward pass of `nn.Sequential` itself.
        for module in self:
            x = module(x)
        return x
