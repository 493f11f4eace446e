"""The block layout: how an image's latent grid becomes an ordered list of token blocks.

Scales are VAR's token maps of growing size (Tian et al. 2024, arXiv:2404.02905); tiles cut one grid into equal
rectangles in raster order. Legend: B batch, K blocks, L_k tokens of block k, L all tokens, h×w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from .given import check_tensor

Shape = tuple[int, int]

MAX_TOKENS, MAX_SCALES = 1 << 20, 1 << 10
"""L of the largest layout, a grid of 1024×1024 cells, and K of the longest list of scales: more is a mistake."""


def as_shape(value, field: str) -> Shape:
    """Read one positive (height, width) pair, or one integer for a square.

    Args:
        value: an integer or a pair of integers, both ≥ 1.
        field: the name that an error message gives the value.

    Returns:
        The pair (height, width).

    Raises:
        ValueError: if the value is neither.
    """
    pair = (value, value) if isinstance(value, int) else value
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(n) is int for n in pair)
    if not is_pair or min(pair) < 1:
        raise ValueError(f"{field} is {value!r}; expected a positive integer or a (height, width) pair of them")
    return (pair[0], pair[1])


def _check_num_tokens(num_tokens: int, said: str) -> None:
    """Refuse a layout before it takes memory."""
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"{said}, {num_tokens} tokens; expected at most {MAX_TOKENS}")


@dataclass(frozen=True)
class BlockLayout:
    """An ordered list of token blocks over a latent grid.

    Build one with `BlockLayout.scales` or `BlockLayout.tiles`.

    Args:
        kind: "scales" (every block covers the whole grid at its own resolution) or "tiles" (every block is one
            rectangle of the grid).
        grid: (h, w) of the latent grid, in cells.
        shapes: (height, width) of each of the K blocks, in tokens.
    """

    kind: str
    grid: Shape
    shapes: tuple[Shape, ...]

    @classmethod
    def scales(cls, scales) -> BlockLayout:
        """Lay out K token maps of growing size, the last of which is the latent grid.

        Args:
            scales: K entries, each an integer (square) or a (height, width) pair; neither side may shrink.

        Raises:
            ValueError: if there is no scale, a scale is smaller than the one before it, or there are too many tokens.
        """
        if not isinstance(scales, (list, tuple)) or not scales:
            raise ValueError(f"scales is {scales!r}; expected a list of at least one size")
        if len(scales) > MAX_SCALES:
            raise ValueError(f"scales has {len(scales)} sizes; expected at most {MAX_SCALES}")
        shapes = tuple(as_shape(scale, f"scales[{k}]") for k, scale in enumerate(scales))
        for k in range(1, len(shapes)):
            if shapes[k][0] < shapes[k - 1][0] or shapes[k][1] < shapes[k - 1][1]:
                raise ValueError(
                    f"scales[{k}] is {shapes[k]}, smaller than scales[{k - 1}] = {shapes[k - 1]}; "
                    "expected sizes that grow"
                )
        _check_num_tokens(sum(map(prod, shapes)), f"scales ends with {shapes[-1]}")
        return cls("scales", shapes[-1], shapes)

    @classmethod
    def tiles(cls, tile, grid) -> BlockLayout:
        """Cut the latent grid into equal tiles, taken in raster order.

        Args:
            tile: (height, width) of a tile in cells, or an integer for a square one; must divide `grid`.
            grid: (h, w) of the latent grid in cells, or an integer for a square one.

        Raises:
            ValueError: if the tile does not divide the grid, or there are too many tokens.
        """
        tile, grid = as_shape(tile, "tile"), as_shape(grid, "grid")
        if grid[0] % tile[0] or grid[1] % tile[1]:
            raise ValueError(f"tile {tile} does not divide the latent grid {grid}; expected sides that divide it")
        _check_num_tokens(prod(grid), f"the latent grid is {grid}")
        return cls("tiles", grid, (tile,) * ((grid[0] // tile[0]) * (grid[1] // tile[1])))

    @classmethod
    def from_dict(cls, fields: dict) -> BlockLayout:
        """Read back what `to_dict` wrote.

        Raises:
            ValueError: if the fields do not describe a layout.
        """
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if kind == "scales" and set(fields) == {"kind", "scales"}:
            return cls.scales(fields["scales"])
        if kind == "tiles" and set(fields) == {"kind", "tile", "grid"}:
            return cls.tiles(fields["tile"], fields["grid"])
        raise ValueError(
            f"layout is {fields!r}; expected {{'kind': 'scales', 'scales': …}} "
            "or {'kind': 'tiles', 'tile': …, 'grid': …}"
        )

    def to_dict(self) -> dict:
        """Describe the layout with JSON types; `from_dict` reads it back."""
        if self.is_scales:
            return {"kind": "scales", "scales": [list(shape) for shape in self.shapes]}
        return {"kind": "tiles", "tile": list(self.shapes[0]), "grid": list(self.grid)}

    @property
    def is_scales(self) -> bool:
        """Whether blocks are resolutions of the whole grid, not parts of it."""
        return self.kind == "scales"

    @property
    def is_single_tokens(self) -> bool:
        """Whether every block is one cell of the grid."""
        return not self.is_scales and self.shapes[0] == (1, 1)

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.shapes)

    @cached_property
    def block_lengths(self) -> tuple[int, ...]:
        """L_k of each block."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def num_tokens(self) -> int:
        """L, the tokens of all blocks."""
        return sum(self.block_lengths)

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each block in the concatenated sequence."""
        ends = tuple(accumulate(self.block_lengths))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))

    def block_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the block number of each token, (L,) int64, made once for a device."""
        return self.made_once("block_ids", device, self._block_ids)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the position of each token in the sequence, (L,) int64 from 0, made once for a device."""
        return self.made_once("positions", device, lambda: torch.arange(self.num_tokens, device="cpu"))

    def block_causal_bias(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Return what attention adds to its scores, (L, L): 0 in a token's own block and all before it, else −inf.

        Made once for a device and dtype.
        """
        return self.made_once(dtype, device, lambda: self._block_causal_bias(dtype))

    def tile_cells(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the raster cell number of each token of a tile layout, (L,) int64, made once for a device."""
        assert not self.is_scales, "scales overlap: a token has no single cell"
        return self.made_once("tile_cells", device, self._tile_cells)

    @cached_property
    def _tensors(self) -> dict:
        """What `made_once` keeps."""
        return {}

    def made_once(self, name: Hashable, device: torch.device | str, make: Callable[[], Tensor]) -> Tensor:
        """Keep a tensor on every device it was asked for on: a copy at every step would wait for the device.

        Args:
            name: of the tensor, with all that it depends on besides the layout.
            device: where it is wanted.
            make: makes it on the CPU.
        """
        key = name, torch.device(device)
        if key not in self._tensors:
            # A first call may come in inference mode, whose tensors no later training step could use.
            with torch.inference_mode(False):
                self._tensors[key] = make().to(device)
        return self._tensors[key]

    def _block_ids(self) -> Tensor:
        lengths = torch.tensor(self.block_lengths, device="cpu")
        return torch.repeat_interleave(torch.arange(self.num_blocks, device="cpu"), lengths)

    def _block_causal_bias(self, dtype: torch.dtype) -> Tensor:
        ids = self._block_ids()
        is_hidden = ids[:, None] < ids[None, :]
        return torch.zeros(is_hidden.shape, dtype=dtype, device="cpu").masked_fill_(is_hidden, -torch.inf)

    def _tile_cells(self) -> Tensor:
        (h, w), (tile_h, tile_w) = self.grid, self.shapes[0]
        cells = torch.arange(h * w, device="cpu").view(h // tile_h, tile_h, w // tile_w, tile_w)
        return cells.permute(0, 2, 1, 3).reshape(-1)

    def split(self, tokens_BL: Tensor) -> list[Tensor]:
        """Split a sequence in block order, (B, L, …), into its K blocks.

        Raises:
            ValueError: if the second dimension is not L.
        """
        if tokens_BL.ndim < 2 or tokens_BL.shape[1] != self.num_tokens:
            raise ValueError(f"tokens have shape {tuple(tokens_BL.shape)}; expected (batch, {self.num_tokens}, …)")
        return list(tokens_BL.split(self.block_lengths, dim=1))

    def join(self, idx_Bl: list[Tensor]) -> Tensor:
        """Concatenate K blocks of shape (B, L_k) into one sequence (B, L) in block order.

        Raises:
            ValueError: if the number of blocks, a length, the batch or the dtype does not fit.
        """
        self.check_blocks(idx_Bl, self.num_blocks)
        return torch.cat(list(idx_Bl), dim=1)

    def check_blocks(self, idx_Bl: list[Tensor], num_blocks: int) -> None:
        """Refuse anything but the first `num_blocks` blocks of integer indices, each (B, L_k).

        Raises:
            ValueError: naming the block that does not fit.
        """
        if not isinstance(idx_Bl, (list, tuple)) or len(idx_Bl) != num_blocks:
            got = f"{len(idx_Bl)} blocks" if isinstance(idx_Bl, (list, tuple)) else type(idx_Bl).__name__
            raise ValueError(f"idx_Bl has {got}; expected a list of {num_blocks} index tensors")
        for k, idx in enumerate(idx_Bl):
            check_tensor(f"idx_Bl[{k}]", idx, f"a torch.int64 tensor (batch, {self.block_lengths[k]})")
            expected = (idx_Bl[0].shape[0] if idx_Bl[0].ndim else "batch", self.block_lengths[k])
            if tuple(idx.shape) != expected:
                raise ValueError(f"idx_Bl[{k}] has shape {tuple(idx.shape)}; expected {expected}")
            if idx.dtype != torch.int64:
                raise ValueError(f"idx_Bl[{k}] has dtype {idx.dtype}; expected torch.int64")

    def tile_slices(self, k: int) -> tuple[slice, slice]:
        """Return the rows and columns of the grid that tile k covers."""
        assert not self.is_scales, "a scale covers the whole grid"
        tile_h, tile_w = self.shapes[0]
        row, column = divmod(k, self.grid[1] // tile_w)
        return (
            slice(row * tile_h, (row + 1) * tile_h),
            slice(column * tile_w, (column + 1) * tile_w),
        )
