"""Statistics of how a codebook is used, as pure functions of a histogram.

Legend: B batch, K blocks, L_k tokens of block k, V codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Past this many blocks, a figure a block is no picture of anything.
MAX_LISTED_BLOCKS = 16


def code_counts(idx_BL: Tensor, block_lengths: tuple[int, ...], num_codes: int) -> Tensor:
    """Count how often each block uses each code; counts of several batches add up.

    Args:
        idx_BL: (B, L) integers in [0, num_codes), in block order.
        block_lengths: L_k of the K blocks.
        num_codes: V.

    Returns:
        (K, V) int64, on the device of the indices.

    Raises:
        ValueError: if an index on the CPU is out of range; on a GPU the device itself refuses it.
    """
    if idx_BL.device.type == "cpu":
        check_codes(idx_BL, block_lengths, num_codes)
    first_cells = _first_cells(block_lengths, num_codes, idx_BL.device)
    cells = (idx_BL.long() + first_cells).flatten()
    counts = torch.zeros(len(block_lengths) * num_codes, dtype=torch.int64, device=idx_BL.device)
    # Not bincount: on a GPU it reads the largest index back and makes the host wait.
    return counts.scatter_add_(0, cells, torch.ones_like(cells)).view(len(block_lengths), num_codes)


def check_codes(idx_BL: Tensor, block_lengths: tuple[int, ...], num_codes: int) -> None:
    """Refuse indices that are no codes.

    Args:
        idx_BL: (B, L) integers in block order; reading those of a GPU waits for it.
        block_lengths: L_k of the K blocks.
        num_codes: V.

    Raises:
        ValueError: naming the first block with an index outside 0 to V − 1.
    """
    if not idx_BL.numel() or 0 <= idx_BL.min() <= idx_BL.max() < num_codes:
        return
    for k, idx in enumerate(idx_BL.split(block_lengths, dim=1)):
        lowest, highest = idx.min().item(), idx.max().item()
        if lowest < 0 or highest >= num_codes:
            raise ValueError(f"idx_Bl[{k}] spans {lowest} to {highest}; expected 0 to {num_codes - 1}")


@lru_cache(maxsize=64)
def _first_cells(lengths: tuple[int, ...], num_codes: int, device: torch.device) -> Tensor:
    """Return where the row of each token's block begins in a flattened (K, V) histogram, (L,)."""
    # Kept: a copy from the host at every training step would wait for the device.
    return torch.repeat_interleave(torch.arange(len(lengths)) * num_codes, torch.tensor(lengths)).to(device)


def usage(counts: Tensor) -> Tensor:
    """Return the fraction of the codes that occur at all.

    Args:
        counts: (..., V) occurrences; `counts.sum(0)` pools the blocks of a (K, V) histogram.

    Returns:
        (...) float64 in [0, 1].
    """
    return (counts > 0).double().mean(dim=-1)


def num_dead_codes(counts: Tensor) -> Tensor:
    """Return the number of codes that never occur.

    Args:
        counts: (..., V) occurrences.

    Returns:
        (...) int64.
    """
    return (counts == 0).sum(dim=-1)


def perplexity(counts: Tensor) -> Tensor:
    """Return the exponential of the entropy of code use: as many equally used codes would carry as much.

    Args:
        counts: (..., V) occurrences.

    Returns:
        (...) float64 in [1, V]; NaN where nothing was counted.
    """
    probabilities = counts.double() / counts.double().sum(dim=-1, keepdim=True)
    return torch.exp(-torch.xlogy(probabilities, probabilities).sum(dim=-1))


_DESCRIBED = {"usage": usage, "perplexity": perplexity, "num_dead_codes": num_dead_codes}


def codebook_statistics(counts: Tensor) -> dict[str, Tensor]:
    """Describe code use over all blocks and block by block, without waiting for a GPU.

    Args:
        counts: (K, V) occurrences.

    Returns:
        `code_counts`, the counts themselves; `usage`, `perplexity` and `num_dead_codes` of all blocks pooled,
        scalars; `block_usage`, `block_perplexity` and `block_num_dead_codes`, (K,).
    """
    statistics = {"code_counts": counts}
    statistics |= {name: describe(counts.sum(dim=0)) for name, describe in _DESCRIBED.items()}
    statistics |= {f"block_{name}": describe(counts) for name, describe in _DESCRIBED.items()}
    return statistics


def codebook_curves(counts: Tensor) -> dict[str, Tensor]:
    """Describe code use by figures to log, without waiting for a GPU.

    Args:
        counts: (K, V) occurrences.

    Returns:
        `usage`, `perplexity` and `num_dead_codes` of all blocks pooled; of 2 to 16 blocks also `block_0/usage` and so
        on. Scalars.
    """
    if not 1 < len(counts) <= MAX_LISTED_BLOCKS:
        return {name: describe(counts.sum(dim=0)) for name, describe in _DESCRIBED.items()}
    # All rows at once: small operations for every block would cost a tiny model several percent.
    rows = torch.cat([counts.sum(dim=0, keepdim=True), counts])
    prefixes = ["", *(f"block_{k}/" for k in range(len(counts)))]
    return {
        prefix + name: value
        for name, describe in _DESCRIBED.items()
        for prefix, value in zip(prefixes, describe(rows).unbind(), strict=True)
    }


def codebook_summary(counts: Tensor, max_blocks: int = MAX_LISTED_BLOCKS) -> dict:
    """Give the statistics of code use JSON types, those of the blocks only where blocks are few.

    Args:
        counts: (K, V) occurrences.
        max_blocks: the largest K for which the blocks are listed one by one.

    Returns:
        `num_codes`, `num_tokens` and what `codebook_statistics` gives but the counts themselves.
    """
    statistics = codebook_statistics(counts)
    summary = {"num_codes": counts.shape[1], "num_tokens": int(counts.sum())}
    for name, value in statistics.items():
        is_block_list = value.ndim == 1 and name.startswith("block_")
        if value.ndim == 0 or (is_block_list and len(counts) <= max_blocks):
            summary[name] = value.tolist()
    return summary
