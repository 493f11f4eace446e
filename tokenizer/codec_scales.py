"""Feature maps as residuals over K scales with shared 3×3 φ convolutions (VAR, arXiv:2404.02905, algorithms 1 and 2).

Legend: B batch, K scales, L_k tokens of scale k, L all tokens, C code channels, h×w latent cells.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout
from nextblock.data.keyed_random import keyed_uniform

from .gradients import by_index, index_term, passed_on, passes_by_index


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


def drawn_num_scales(rate: float, num_scales: int, *keys: int, samples: Tensor) -> Tensor:
    """Draw how many of its scales each image is decoded from in a step of training: quantizer dropout.

    SoundStream (Zeghidour et al. 2021, arXiv:2107.03312) drops a residual quantizer's last stages so.

    Args:
        rate: share of images that lose scales, in [0, 1].
        num_scales: K, at least 2.
        keys: integers such as (seed, step).
        samples: (B,) int64, the images' numbers in the data set.

    Returns:
        (B,) int64: K, or evenly from 1 to K − 1.
    """
    is_shortened = keyed_uniform(*keys, 0, samples=samples) < rate
    drawn = 1 + (keyed_uniform(*keys, 1, samples=samples) * (num_scales - 1)).long()
    return torch.where(is_shortened, drawn, num_scales)


class ScaleCodec(nn.Module):
    """Code a map scale by scale, each scale what those before it left over; it satisfies `protocols.Codec`.

    Args:
        layout: the scales; the last is the map's own size.
        dim: C.
        num_phi: number of φ convolutions, shared by neighbouring scales; 0 for none.
        phi_ratio: r in φ(h) = (1−r)·h + r·conv3×3(h).
    """

    def __init__(self, layout: BlockLayout, dim: int, num_phi: int = 4, phi_ratio: float = 0.5):
        super().__init__()
        self.layout = layout
        self.phi_ratio = phi_ratio
        self.phi = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, dtype=torch.float32) for _ in range(num_phi))
        self.phi_of_scale = phi_of_scale(layout.num_blocks, num_phi) if num_phi else None
        for i, phi in enumerate(self.phi):
            # With fewer scales than convolutions some serve no scale, and DDP waits for every gradient it is promised.
            phi.requires_grad_(i in self.phi_of_scale)

    def encode(
        self, features: Tensor, codebook, num_scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a map; see `protocols.Codec`. The loss is the mean of the scales' terms on the maps so far.

        Args:
            features: (B, C, h, w).
            codebook: of the codes.
            num_scales: (B,) int64 in [1, K]: the quantized map of an image holds so many scales and none after them.
                Its indices are those of all scales, and so is what the codebook records.
        """
        features = codebook.prepare(features)
        is_by_index = passes_by_index(codebook)
        rest = features if is_by_index else features.detach()
        f_hat, loss = torch.zeros_like(rest), rest.new_zeros(())
        result, residuals, indices = f_hat, [], []
        for k in range(self.layout.num_blocks):
            vectors = self._scale_vectors(rest, k)
            idx = codebook.assign(vectors)
            codes = codebook.lookup(idx)
            contribution = self._contribution(codes, k)
            f_hat, rest = f_hat + _kept(contribution, num_scales, k), rest - contribution.detach()
            for term in codebook.loss_terms(features, f_hat, is_composed=True):
                loss = loss + term
            if is_by_index:
                soft = self._contribution(by_index(codes, codebook.expected(vectors)), k)
                result = result + _kept(soft, num_scales, k)
                loss = loss + index_term(features, result, codebook)
            residuals.append(vectors)
            indices.append(idx)
        idx_BL = torch.cat(indices, dim=1)
        if self.training:
            codebook.record(torch.cat(residuals, dim=1), idx_BL)
        if not is_by_index:
            result = passed_on(features, f_hat, codebook)
        return result, loss / self.layout.num_blocks, idx_BL

    def indices(self, features: Tensor, codebook) -> Tensor:
        """Return the indices (B, L) of a map."""
        rest, indices = codebook.prepare(features), []
        for k in range(self.layout.num_blocks):
            indices.append(codebook.assign(self._scale_vectors(rest, k)))
            rest = rest - self._contribution(codebook.lookup(indices[-1]), k)
        return torch.cat(indices, dim=1)

    def training_vectors(self, features: Tensor, codebook) -> Tensor:
        """Return the vectors (B, L, C) that codes start from, as if every scale were coded without loss."""
        rest, vectors = codebook.prepare(features), []
        for k in range(self.layout.num_blocks):
            vectors.append(self._scale_vectors(rest, k))
            rest = rest - self._to_grid(vectors[-1], k)
        return torch.cat(vectors, dim=1)

    def decode(self, idx_BL: Tensor, codebook) -> Tensor:
        """Return the quantized map (B, C, h, w)."""
        canvas = self.start(len(idx_BL), codebook.dim, codebook.lookup(idx_BL[:, :0]))
        for k, (start, end) in enumerate(self.layout.bounds):
            # Scale by scale, as `advance` does it: rounding depends on how vectors lie in memory.
            canvas = canvas + self._contribution(codebook.lookup(idx_BL[:, start:end]), k)
        return canvas

    def var_input(self, idx_BL: Tensor, codebook) -> Tensor:
        """Return the prior's input (B, L − L_1, C): at each scale after the first, the map so far at its size."""
        nothing = codebook.lookup(idx_BL[:, :0])
        canvas, inputs = self.start(len(idx_BL), codebook.dim, nothing), [nothing]
        for k, (start, end) in enumerate(self.layout.bounds[:-1]):
            canvas, next_input = self.advance(canvas, idx_BL[:, start:end], k, codebook)
            inputs.append(next_input)
        return torch.cat(inputs, dim=1)

    def start(self, num_images: int, dim: int, like: Tensor) -> Tensor:
        """Return the empty map (B, C, h, w) that `advance` adds to scale by scale."""
        return like.new_zeros(num_images, dim, *self.layout.grid)

    def advance(self, canvas: Tensor, content: Tensor, k: int, codebook) -> tuple[Tensor, Tensor | None]:
        """Add scale k, indices (B, L_k) or vectors (B, L_k, C), to the map and give the next scale's input."""
        canvas = canvas + self._contribution(content if content.is_floating_point() else codebook.lookup(content), k)
        return canvas, self._scale_vectors(canvas, k + 1) if k + 1 < self.layout.num_blocks else None

    def _scale_vectors(self, feature_map: Tensor, k: int) -> Tensor:
        """Area-downsample a map (B, C, h, w) to scale k and flatten it, (B, L_k, C)."""
        shape = self.layout.shapes[k]
        if shape != tuple(feature_map.shape[-2:]):
            feature_map = F.interpolate(feature_map, size=shape, mode="area")
        return rearrange(feature_map, "b c h w -> b (h w) c")

    def _contribution(self, vectors: Tensor, k: int) -> Tensor:
        """Return φ_k of scale k's code vectors (B, L_k, C) at the full grid, (B, C, h, w)."""
        h = self._to_grid(vectors, k)
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


def _kept(contribution: Tensor, num_scales: Tensor | None, k: int) -> Tensor:
    """Return what scale k (B, C, h, w) adds to the map: nothing to images that end before it."""
    if num_scales is None:
        return contribution
    return torch.where((num_scales > k)[:, None, None, None], contribution, torch.zeros_like(contribution))
