"""Rotary embedding of the cells of a grid: half of a head's pairs turn by the row, half by the column.

RoFormer (arXiv:2104.09864), in two dimensions as in LlamaGen (arXiv:2406.06525). Legend: L tokens, P positions before
the first token, d head width.
"""

import torch
from torch import Tensor

from nextblock.data.blocks import BlockLayout


def grid_rotation(
    layout: BlockLayout, num_prefix: int, head_width: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return cosines and sines of all positions, made once a device.

    Prefix positions have cosine and sine 0, as published: their queries and keys become the zero vector, so every
    position that sees them weighs them alike.

    Args:
        layout: tiles; each token turns by the row and the column of its own cell.
        num_prefix: P.
        head_width: d, a multiple of 4.
        base: of the frequencies base^(−2i/(d/2)), i < d/4.
        device: where they are wanted.
        dtype: float32 or float64.

    Returns:
        (2, P + L, d/2): cosines, sines; pairs that turn by the row come first.
    """

    def make() -> Tensor:
        half = head_width // 2
        exponents = torch.arange(0, half, 2, device="cpu")[: half // 2].to(dtype) / half
        frequencies = 1.0 / base**exponents
        cells, width = layout.tile_cells("cpu"), layout.grid[1]
        angles = torch.cat([torch.outer(at.to(dtype), frequencies) for at in (cells // width, cells % width)], dim=1)
        turned = torch.stack([angles.cos(), angles.sin()])
        return torch.cat([turned.new_zeros(2, num_prefix, half), turned], dim=1)

    return layout.made_once(("rotation", num_prefix, head_width, base, dtype), device, make)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn adjacent pairs of every head, in float32 at least.

    Args:
        x: (B, heads, l, d).
        rotation: (2, l, d/2) cosines and sines.

    Returns:
        (B, heads, l, d) in the dtype of x.
    """
    cos, sin = rotation.unbind(0)
    even, odd = x.to(rotation.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
