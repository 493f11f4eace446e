"""Feature maps as tiles: every latent cell is one token, a block is one rectangle of the grid (arXiv:1711.00937).

Legend: B batch, K blocks, L_k tokens of block k, L all tokens, C code channels, h×w latent cells.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout

from .gradients import by_index, index_term, passed_on, passes_by_index


class TileCodec(nn.Module):
    """Replace every feature vector of a map by one code; it satisfies `protocols.Codec`.

    Args:
        layout: the tiles; None takes maps of any size, each as a single tile, with no block methods.
    """

    def __init__(self, layout: BlockLayout | None):
        super().__init__()
        self.layout = layout

    def encode(self, features: Tensor, codebook) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a map; see `protocols.Codec`."""
        features = codebook.prepare(features)
        vectors = _rows(features)
        idx = codebook.assign(vectors)
        codes = codebook.lookup(idx).to(features.dtype)
        quantized = rearrange(codes, "b (h w) c -> b c h w", h=features.shape[2])
        loss = features.new_zeros(())
        for term in codebook.loss_terms(features, quantized, is_composed=False):
            loss = loss + term
        if self.training:
            codebook.record(vectors, idx)
        if passes_by_index(codebook):
            result = rearrange(by_index(codes, codebook.expected(vectors)), "b (h w) c -> b c h w", h=features.shape[2])
            return result, loss + index_term(features, result, codebook), self._in_block_order(idx)
        return passed_on(features, quantized, codebook), loss, self._in_block_order(idx)

    def indices(self, features: Tensor, codebook) -> Tensor:
        """Return the indices (B, L) of a map."""
        return self._in_block_order(codebook.assign(self.training_vectors(features, codebook)))

    def training_vectors(self, features: Tensor, codebook) -> Tensor:
        """Return the vectors (B, L, C) that codes are searched for, in raster order."""
        return _rows(codebook.prepare(features))

    def decode(self, idx_BL: Tensor, codebook) -> Tensor:
        """Return the quantized map (B, C, h, w)."""
        raster_idx = torch.empty_like(idx_BL).index_copy_(1, self.layout.tile_cells(idx_BL.device), idx_BL)
        return rearrange(codebook.lookup(raster_idx), "b (h w) c -> b c h w", h=self.layout.grid[0])

    def var_input(self, idx_BL: Tensor, codebook) -> Tensor:
        """Return the prior's input (B, L − L_1, C): at each tile after the first, the codes of the tile before."""
        return codebook.lookup(idx_BL[:, : self.layout.bounds[-1][0]])

    def start(self, num_images: int, dim: int, like: Tensor) -> Tensor:
        """Return the empty map (B, C, h, w) that `advance` fills tile by tile."""
        return like.new_zeros(num_images, dim, *self.layout.grid)

    def advance(
        self, canvas: Tensor, content: Tensor, k: int, codebook, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Put tile k's indices (B, L_k) onto the map, in place, and give its codes as the next tile's input.

        Places (B, n) put them where n other tokens of each image are.
        """
        codes = codebook.lookup(content)
        if places is not None:
            cells = self.layout.tile_cells(places.device)[places]
            canvas.view(*canvas.shape[:2], -1).scatter_(2, cells[:, None].expand(-1, codes.shape[2], -1), codes.mT)
            return canvas, None
        rows, columns = self.layout.tile_slices(k)
        canvas[:, :, rows, columns] = rearrange(codes, "b (h w) c -> b c h w", h=self.layout.shapes[k][0])
        return canvas, codes if k + 1 < self.layout.num_blocks else None

    def _in_block_order(self, raster_idx: Tensor) -> Tensor:
        """Order indices (B, h·w) of the raster by tiles."""
        if self.layout is None:
            return raster_idx
        return raster_idx[:, self.layout.tile_cells(raster_idx.device)]


def _rows(feature_map: Tensor) -> Tensor:
    """Return a map's vectors in raster order, (B, h·w, C)."""
    return rearrange(feature_map, "b c h w -> b (h w) c")
