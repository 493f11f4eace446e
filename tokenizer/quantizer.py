"""Vector quantization of a feature map, read out as tiles (VQ-VAE, arXiv:1711.00937; normalised codes as in LlamaGen).

Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, h×w latent cells.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout

from .codebook import Codebook, full_precision


class VectorQuantizer(nn.Module):
    """Replace every feature vector of a map by its nearest code.

    Args:
        num_embeddings: V.
        embedding_dim: C.
        beta: weight of the commitment loss.
        epsilon: smoothing of the moving-average counts and smallest norm in a normalisation.
        layout: the tiles that the block methods speak of; without one only `forward` and `get_codebook` work.
        ema_decay: None trains codes by gradient, a decay in (0, 1) by moving average.
        normalize_codes: compare L2-normalised features with L2-normalised codes, and return the normalised code.
        revival_threshold: share of the mean use under which a code is moved onto a feature; 0 never.
        init_scale: codes start uniform in ±init_scale; None means 1/V.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        *,
        layout: BlockLayout | None = None,
        ema_decay: float | None = None,
        normalize_codes: bool = False,
        revival_threshold: float = 0.0,
        init_scale: float | None = None,
    ):
        super().__init__()
        self.beta = beta
        self.epsilon = epsilon
        self.layout = layout
        self.normalize_codes = normalize_codes
        self.codebook = Codebook(
            num_embeddings,
            embedding_dim,
            epsilon=epsilon,
            ema_decay=ema_decay,
            is_normalized=normalize_codes,
            revival_threshold=revival_threshold,
            init_scale=init_scale,
        )

    @property
    def num_codes(self) -> int:
        """V."""
        return self.codebook.weight.shape[0]

    @property
    def dim(self) -> int:
        """C."""
        return self.codebook.weight.shape[1]

    def lookup(self, idx: Tensor) -> Tensor:
        """Return code vectors as the decoder receives them, (…) → (…, C)."""
        return self._lookup(idx)

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors, as the decoder receives them."""
        return self._normalized(self.codebook.weight)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a feature map.

        Args:
            features: (B, C, h, w).

        Returns:
            The quantized map (B, C, h, w), which passes gradients straight through to `features`; the scalar loss:
            codebook MSE + beta · commitment MSE (the commitment alone where codes are a moving average); and the flat
            indices (B·h·w,) in raster order.
        """
        B, C, h, w = features.shape
        with torch.autocast(features.device.type, enabled=False):
            features = self._normalized(full_precision(features, self.codebook.weight), dim=1)
            vectors = rearrange(features, "b c h w -> b (h w) c")
            idx = self.codebook.search(vectors.flatten(0, 1))
            quantized = self._normalized(self.codebook.lookup(idx)).to(features.dtype)
            quantized = rearrange(quantized, "(b h w) c -> b c h w", h=h, w=w)
            loss = self.beta * F.mse_loss(features, quantized.detach())
            if self.codebook.ema_decay is None:
                loss = loss + F.mse_loss(quantized, features.detach())
            if self.training:
                self.codebook.record(vectors, idx.view(B, h * w))
            return features + (quantized - features).detach(), loss, idx

    def split_indices(self, flat_idx: Tensor, batch_size: int) -> list[Tensor]:
        """Order the flat indices of `forward` into the layout's K tiles, each (B, L_k)."""
        idx_map = flat_idx.view(batch_size, -1)
        return self.layout.split(idx_map[:, self.layout.tile_cells(idx_map.device)])

    def training_features(self, features: Tensor) -> Tensor:
        """Return the vectors (B, h·w, C) that codes are initialised from."""
        features = self._normalized(full_precision(features, self.codebook.weight), dim=1)
        return rearrange(features, "b c h w -> b (h w) c")

    def features_to_idxBl(self, features: Tensor) -> list[Tensor]:
        """Return the indices of a feature map (B, C, h, w) as K tiles (B, L_k)."""
        with torch.autocast(features.device.type, enabled=False):
            vectors = self.training_features(features)
            return self.split_indices(self.codebook.search(vectors.flatten(0, 1)), len(vectors))

    def idxBl_to_features(self, idx_Bl: list[Tensor]) -> Tensor:
        """Return the quantized map (B, C, h, w) that K tiles of indices stand for."""
        idx = torch.cat(list(idx_Bl), dim=1)
        raster_idx = torch.empty_like(idx).index_copy_(1, self.layout.tile_cells(idx.device), idx)
        h, _ = self.layout.grid
        return rearrange(self._lookup(raster_idx), "b (h w) c -> b c h w", h=h)

    def idxBl_to_var_input(self, idx_Bl: list[Tensor]) -> Tensor:
        """Return the prior's input (B, L − L_1, C): at each tile after the first, the codes of the tile before."""
        if len(idx_Bl) == 1:
            return self.codebook.weight.new_empty(idx_Bl[0].shape[0], 0, self.codebook.weight.shape[1])
        return self._lookup(torch.cat(list(idx_Bl[:-1]), dim=1))

    def start(self, batch_size: int) -> Tensor:
        """Return the empty map (B, C, h, w) that `advance` fills block by block."""
        weight = self.codebook.weight
        return weight.new_zeros(batch_size, weight.shape[1], *self.layout.grid)

    def advance(self, canvas: Tensor, idx: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Put block k onto the map and give the prior's input for the block after it.

        Args:
            canvas: (B, C, h, w) after the blocks before k; written in place.
            idx: (B, L_k) of block k.
            k: block number, from 0.

        Returns:
            The map, and the input (B, L_{k+1}, C) of block k+1, or None after the last block.
        """
        codes = self._lookup(idx)
        rows, columns = self.layout.tile_slices(k)
        tile_h, _ = self.layout.shapes[k]
        canvas[:, :, rows, columns] = rearrange(codes, "b (h w) c -> b c h w", h=tile_h)
        return canvas, codes if k + 1 < self.layout.num_blocks else None

    def _lookup(self, idx: Tensor) -> Tensor:
        """Return code vectors as the decoder receives them, (…) → (…, C)."""
        return self._normalized(self.codebook.lookup(idx))

    def _normalized(self, vectors: Tensor, dim: int = -1) -> Tensor:
        """Normalise where codes are normalised."""
        return F.normalize(vectors, dim=dim, eps=self.epsilon) if self.normalize_codes else vectors
