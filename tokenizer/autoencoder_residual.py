"""Encoders and decoders of residual blocks alone, without attention: MaskGIT's VQGAN and Open-MAGVIT2's.

MaskGIT: Chang et al. 2022, arXiv:2202.04200; Open-MAGVIT2: Luo et al. 2024, arXiv:2409.04410. Legend: B batch, C latent
channels, H×W pixels, h×w latent cells.
"""

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from .autoencoder import ResidualBlock, Upsample, activate, as_channels_last, group_norm, num_norm_groups

Kind = Literal["maskgit", "magvit2"]


class DepthToSpace(nn.Module):
    """Double both sides: a 3×3 convolution to four times the channels, laid out as (row, column, channel)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "b (r s c) h w -> b c (h r) (w s)", r=2, s=2)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift follow the spread and the mean of the channels of the map that is decoded."""

    epsilon = 1e-6

    def __init__(self, z_channels: int, channels: int, min_group_channels: int):
        super().__init__()
        groups = num_norm_groups(channels, min_group_channels)
        self.norm = nn.GroupNorm(groups, channels, eps=self.epsilon, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        cells = latents.flatten(2)
        scale = self.gamma((cells.var(2) + self.epsilon).sqrt())
        shift = self.beta(cells.mean(2))
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class _Level(nn.Module):
    """The residual blocks of one resolution."""

    def __init__(self, kind: Kind, width_in: int, width: int, num_res_blocks: int, *rest):
        super().__init__()
        self.block = _blocks(kind, [width_in] + [width] * num_res_blocks, *rest)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class ResidualEncoder(nn.Module):
    """Image to latent map, one halving between neighbouring levels.

    "maskgit" sees pixels as [0, 1], which its zero padding makes black, and halves by the mean of 2×2; "magvit2" halves
    by a strided convolution.

    Args:
        kind: "maskgit" or "magvit2".
        num_channels: image channels.
        base_width: channels at full resolution before the multipliers.
        width_multipliers: one factor a level, finest first; the map is 2^(levels − 1) times smaller than the image.
        num_res_blocks: residual blocks a level, and between encoder and decoder.
        z_channels: C of the latent map.
        dropout: probability inside residual blocks.
        min_group_channels: fewest channels of a group in GroupNorm.
    """

    def __init__(
        self,
        kind: Kind,
        num_channels: int,
        base_width: int,
        width_multipliers: list[int],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int,
    ):
        super().__init__()
        self.kind = kind
        widths = [base_width * m for m in width_multipliers]
        rest = dropout, min_group_channels
        self.conv_in = nn.Conv2d(num_channels, base_width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip([base_width, *widths[:-1]], widths, strict=True)):
            level = _Level(kind, width_in, width, num_res_blocks, *rest)
            if i < len(widths) - 1:
                is_mean = kind == "maskgit"
                level.downsample = nn.AvgPool2d(2) if is_mean else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid = _blocks(kind, [widths[-1]] * (num_res_blocks + 1), *rest)
        self.norm_out = group_norm(widths[-1], min_group_channels)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv_in((pixel_values + 1) / 2 if self.kind == "maskgit" else pixel_values)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(activate(self.norm_out(x)))


class ResidualDecoder(nn.Module):
    """Latent map to image; `up[0]` is the finest level, as in the published checkpoints. Arguments as the encoder's.

    "magvit2" normalises what enters a level by the latent map, which must have two cells or more, and doubles sides by
    depth to space.
    """

    def __init__(
        self,
        kind: Kind,
        num_channels: int,
        base_width: int,
        width_multipliers: list[int],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
        min_group_channels: int,
    ):
        super().__init__()
        self.kind = kind
        widths = [base_width * m for m in width_multipliers]
        widths_in = [*widths[1:], widths[-1]]
        rest = dropout, min_group_channels
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _blocks(kind, [widths[-1]] * (num_res_blocks + 1), *rest)
        self.up = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip(widths_in, widths, strict=True)):
            level = _Level(kind, width_in, width, num_res_blocks, *rest)
            if i > 0:
                level.upsample = Upsample(width) if kind == "maskgit" else DepthToSpace(width)
            self.up.append(level)
        if kind == "magvit2":
            self.adaptive = nn.ModuleList(
                AdaptiveGroupNorm(z_channels, width_in, min_group_channels) for width_in in widths_in
            )
        self.norm_out = group_norm(widths[0], min_group_channels)
        self.conv_out = nn.Conv2d(widths[0], num_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(as_channels_last(latents))
        for block in self.mid:
            x = block(x)
        for i, level in reversed(list(enumerate(self.up))):
            if self.kind == "magvit2":
                x = self.adaptive[i](x, latents)
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        image = self.conv_out(activate(self.norm_out(x)))
        return 2 * image - 1 if self.kind == "maskgit" else image


def _blocks(kind: Kind, widths: list[int], dropout: float, min_group_channels: int) -> nn.ModuleList:
    """Return residual blocks from each width to the next."""
    options = {"has_bias": False, "shortcut_of": "result" if kind == "maskgit" else "input"}
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.ModuleList(ResidualBlock(a, b, dropout, min_group_channels, **options) for a, b in pairs)
