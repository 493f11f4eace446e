"""Runs images through a tokenizer and back, and keeps what its evaluation needs.

Legend: N images, K blocks, V codes, HxW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextblock.data.pixels import to_uint8

from .codebook import code_counts, codebook_summary
from .metrics import mean_squared_errors, psnr_from_error
from .sparse_counts import SparseCounts


@dataclass(frozen=True)
class Reconstructions:
    """What N images became.

    Args:
        squared_errors: (N,) float64, mean squared error of each image at pixel values in [-1, 1].
        code_counts: (K, V) int64, how often each block used each code; `SparseCounts` of large codebooks.
        class_labels: (N,) int64.
        originals: (n, H, W, 3) uint8, the first n ≤ N images.
        reconstructions: (n, H, W, 3) uint8, what they became.
    """

    squared_errors: Tensor
    code_counts: Tensor | SparseCounts
    class_labels: np.ndarray
    originals: np.ndarray
    reconstructions: np.ndarray

    def figures(self) -> dict[str, float]:
        """Return PSNR in decibels (mean over images; of the mean error), usage and perplexity of codes."""
        codebook = codebook_summary(self.code_counts)
        return {
            "reconstruction_psnr": psnr_from_error(self.squared_errors).mean().item(),
            "reconstruction_psnr_of_mean_error": psnr_from_error(self.squared_errors.mean()).item(),
            "code_usage": codebook["usage"],
            "code_perplexity": codebook["perplexity"],
        }


def merged(parts: Sequence[Reconstructions], numbers: Sequence[np.ndarray]) -> Reconstructions:
    """Put together what several processes have reconstructed.

    Args:
        parts: of each process, all with as many pictures kept at most.
        numbers: of each process, the numbers of its images, in its order; together 0 to N - 1.

    Returns:
        What one process would have, in the order of the numbers.
    """
    order = np.argsort(np.concatenate(numbers))
    num_kept = max(len(part.originals) for part in parts)
    kept = [own[: len(part.originals)] for own, part in zip(numbers, parts, strict=True)]
    # The first of all images are among the first of every process.
    shown = np.argsort(np.concatenate(kept))[:num_kept]
    return Reconstructions(
        squared_errors=torch.cat([part.squared_errors for part in parts])[order],
        code_counts=sum(part.code_counts for part in parts),
        class_labels=np.concatenate([part.class_labels for part in parts])[order],
        originals=np.concatenate([part.originals for part in parts])[shown],
        reconstructions=np.concatenate([part.reconstructions for part in parts])[shown],
    )


@torch.inference_mode()
def reconstruct(
    tokenizer,
    batches: Iterable[Mapping[str, Tensor]],
    num_codes: int,
    num_kept: int | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Reconstructions:
    """Encode and decode every image of a data set.

    Args:
        tokenizer: a model with `layout`, `img_to_idx` and `idx_to_img`, in evaluation mode.
        batches: mappings with `pixel_values` (B, 3, H, W) in [-1, 1] and `class_labels` (B,).
        num_codes: V.
        num_kept: how many pictures to keep; None keeps all.
        observe: receives every batch's reconstructions and originals, (B, 3, H, W) in [-1, 1].

    Returns:
        Errors and code counts of all images, pictures of the first `num_kept`.

    Raises:
        ValueError: if there is no image.
    """
    errors, counts, labels, originals, reconstructions = [], 0, [], [], []
    num_left = float("inf") if num_kept is None else num_kept
    for batch in batches:
        pixel_values = batch["pixel_values"].to(tokenizer.device)
        idx_BL = tokenizer.img_to_idx(pixel_values)
        decoded = tokenizer.idx_to_img(idx_BL)
        if observe is not None:
            observe(decoded, pixel_values)
        errors.append(mean_squared_errors(decoded, pixel_values).cpu())
        counts = counts + code_counts(idx_BL, tokenizer.layout.block_lengths, num_codes).cpu()
        labels.append(batch["class_labels"].numpy())
        if num_left > 0:
            kept = slice(int(min(num_left, len(pixel_values))))
            originals.append(to_uint8(pixel_values[kept]))
            reconstructions.append(to_uint8(decoded[kept]))
            num_left -= len(originals[-1])
    if not errors:
        raise ValueError("the data set is empty; expected at least one image to reconstruct")
    return Reconstructions(
        squared_errors=torch.cat(errors),
        code_counts=counts,
        class_labels=np.concatenate(labels),
        originals=np.concatenate(originals),
        reconstructions=np.concatenate(reconstructions),
    )
