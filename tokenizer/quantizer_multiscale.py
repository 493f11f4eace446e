"""Residual quantization over K scales with shared 3×3 φ convolutions (VAR, arXiv:2404.02905, algorithms 1 and 2).

Legend: B batch, K scales, L_k tokens of scale k, L all tokens, V codes, C code channels, h×w latent cells.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout

from .codebook import Codebook, full_precision, moved_unhalved


def phi_of_scale(num_scales: int, num_phi: int) -> list[int]:
    """Choose the φ convolution of each scale: the one whose tick is nearest to k/(K−1).

    Args:
        num_scales: K.
        num_phi: number of convolutions.

    Returns:
        K convolution numbers. Ties are real and float64 rounding decides them, as in the published models.
    """
    if num_scales == 1:
        return [0]
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return [int(np.argmin(np.abs(ticks - k / (num_scales - 1)))) for k in range(num_scales)]


class MultiScaleQuantizer(nn.Module):
    """Quantize a feature map scale by scale, each scale coding what the scales before it left over.

    Args:
        num_embeddings: V.
        embedding_dim: C.
        beta: weight of the commitment loss.
        epsilon: smoothing of the moving-average counts and smallest norm in a normalisation.
        layout: the scales; the last is the map's own size.
        num_phi: number of φ convolutions, shared by neighbouring scales; 0 for none.
        phi_ratio: r in φ(h) = (1−r)·h + r·conv3×3(h).
        ema_decay: None trains codes by gradient, a decay in (0, 1) by moving average.
        normalize_codes: search by cosine; the code vector itself and the residual stay as they are.
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
        layout: BlockLayout,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        ema_decay: float | None = None,
        normalize_codes: bool = False,
        revival_threshold: float = 0.0,
        init_scale: float | None = None,
    ):
        super().__init__()
        self.beta = beta
        self.layout = layout
        self.phi_ratio = phi_ratio
        self.codebook = Codebook(
            num_embeddings,
            embedding_dim,
            epsilon=epsilon,
            ema_decay=ema_decay,
            is_normalized=normalize_codes,
            revival_threshold=revival_threshold,
            init_scale=init_scale,
        )
        self.phi = nn.ModuleList(
            nn.Conv2d(embedding_dim, embedding_dim, 3, padding=1, dtype=torch.float32) for _ in range(num_phi)
        )
        self.phi_of_scale = phi_of_scale(layout.num_blocks, num_phi) if num_phi else None
        for i, phi in enumerate(self.phi):
            # With fewer scales than convolutions some serve no scale, and DDP waits for every gradient it is promised.
            phi.requires_grad_(i in self.phi_of_scale)

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
        return self.codebook.lookup(idx)

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors."""
        return self.codebook.weight

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a feature map over all scales.

        Args:
            features: (B, C, h, w).

        Returns:
            The quantized map (B, C, h, w), which passes gradients straight through to `features`; the scalar loss: the
            mean over scales of beta · mse(f̂.detach, f) + mse(f̂, f.detach); and the flat indices (B·L,), scale by scale.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features, self.codebook.weight)
            target = features.detach()
            rest, f_hat, loss = target, torch.zeros_like(target), target.new_zeros(())
            residuals, indices = [], []
            for k in range(self.layout.num_blocks):
                vectors = self._scale_vectors(rest, k)
                idx = self._search(vectors)
                contribution = self._scale_map(idx, k)
                f_hat, rest = f_hat + contribution, rest - contribution.detach()
                loss = loss + self.beta * F.mse_loss(f_hat.detach(), features) + F.mse_loss(f_hat, target)
                residuals.append(vectors)
                indices.append(idx)
            idx_BL = torch.cat(indices, dim=1)
            if self.training:
                self.codebook.record(torch.cat(residuals, dim=1), idx_BL)
            quantized = features + (f_hat - features).detach()
            return quantized, loss / self.layout.num_blocks, idx_BL.flatten()

    def split_indices(self, flat_idx: Tensor, batch_size: int) -> list[Tensor]:
        """Split the flat indices of `forward` into K scales, each (B, L_k)."""
        return self.layout.split(flat_idx.view(batch_size, -1))

    def training_features(self, features: Tensor) -> Tensor:
        """Return the vectors (B, L, C) that codes are initialised from, as if every scale were coded without loss."""
        rest = full_precision(features, self.codebook.weight)
        vectors = []
        for k in range(self.layout.num_blocks):
            vectors.append(self._scale_vectors(rest, k))
            rest = rest - self._to_grid(vectors[-1], k)
        return torch.cat(vectors, dim=1)

    @torch.no_grad()
    def features_to_idxBl(self, features: Tensor) -> list[Tensor]:
        """Return the indices of a feature map (B, C, h, w) as K scales (B, L_k)."""
        with torch.autocast(features.device.type, enabled=False):
            rest = full_precision(features, self.codebook.weight)
            idx_Bl = []
            for k in range(self.layout.num_blocks):
                idx_Bl.append(self._search(self._scale_vectors(rest, k)))
                rest = rest - self._scale_map(idx_Bl[-1], k)
            return idx_Bl

    def idxBl_to_features(self, idx_Bl: list[Tensor]) -> Tensor:
        """Return the quantized map (B, C, h, w) that K scales of indices stand for."""
        canvas = self.start(idx_Bl[0].shape[0])
        for k, idx in enumerate(idx_Bl):
            canvas = self._accumulate(canvas, idx, k)
        return canvas

    def idxBl_to_var_input(self, idx_Bl: list[Tensor]) -> Tensor:
        """Return the prior's input (B, L − L_1, C): at each scale after the first, the map so far at its size."""
        canvas = self.start(idx_Bl[0].shape[0])
        inputs = [canvas.new_empty(len(canvas), 0, canvas.shape[1])]
        for k, idx in enumerate(idx_Bl[:-1]):
            canvas, next_input = self.advance(canvas, idx, k)
            inputs.append(next_input)
        return torch.cat(inputs, dim=1)

    def start(self, batch_size: int) -> Tensor:
        """Return the empty map (B, C, h, w) that `advance` adds to scale by scale."""
        weight = self.codebook.weight
        return weight.new_zeros(batch_size, weight.shape[1], *self.layout.grid)

    def advance(self, canvas: Tensor, idx: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Add block k to the map and give the prior's input for the block after it.

        Args:
            canvas: (B, C, h, w) after the blocks before k.
            idx: (B, L_k) of block k, or vectors (B, L_k, C) in place of single codes.
            k: block number, from 0.

        Returns:
            The map, and the input (B, L_{k+1}, C) of block k+1, or None after the last block.
        """
        canvas = self._accumulate(canvas, idx, k)
        return canvas, self._scale_vectors(canvas, k + 1) if k + 1 < self.layout.num_blocks else None

    def _accumulate(self, canvas: Tensor, idx: Tensor, k: int) -> Tensor:
        """Add scale k's contribution in float32, whatever autocast is in force."""
        with torch.autocast(canvas.device.type, enabled=False):
            return canvas + self._scale_map(idx, k)

    def _search(self, vectors: Tensor) -> Tensor:
        """Return the codes of (B, L_k, C) vectors, (B, L_k)."""
        return self.codebook.search(vectors.flatten(0, 1)).view(vectors.shape[:2])

    def _scale_vectors(self, feature_map: Tensor, k: int) -> Tensor:
        """Area-downsample a map (B, C, h, w) to scale k and flatten it, (B, L_k, C)."""
        shape = self.layout.shapes[k]
        if shape != tuple(feature_map.shape[-2:]):
            feature_map = F.interpolate(feature_map, size=shape, mode="area")
        return rearrange(feature_map, "b c h w -> b (h w) c")

    def _scale_map(self, idx: Tensor, k: int) -> Tensor:
        """Return φ_k of scale k's code vectors at the full grid, (B, C, h, w)."""
        h = self._to_grid(idx if idx.is_floating_point() else self.codebook.lookup(idx), k)
        if self.phi_of_scale is None:
            return h
        phi = self.phi[self.phi_of_scale[k]]
        return (1 - self.phi_ratio) * h + self.phi_ratio * phi(h)

    def _to_grid(self, vectors: Tensor, k: int) -> Tensor:
        """Lay out (B, L_k, C) vectors as a map and bicubic-upsample it to the full grid, (B, C, h, w)."""
        scale_h, scale_w = self.layout.shapes[k]
        feature_map = rearrange(vectors, "b (h w) c -> b c h w", h=scale_h, w=scale_w).contiguous()
        if (scale_h, scale_w) == self.layout.grid:
            return feature_map
        return F.interpolate(feature_map, size=self.layout.grid, mode="bicubic")

    def _apply(self, fn, recurse=True):
        """Move with the model, but refuse its half types: residuals are differences of close numbers."""
        return super()._apply(lambda tensor: moved_unhalved(fn, tensor), recurse)
