"""Statistics of how a codebook is used, as pure functions of a histogram; of large codebooks it is a `SparseCounts`.

Legend: B batch, K blocks, L_k tokens of block k, V codes, D digits.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from nextblock.data.code_digits import CodeDigits

from .sparse_counts import SparseCounts

# Of more codes no table is made: a step's tokens are far fewer.
MAX_COUNTED_CODES = 1 << 16
# Past this many blocks, a figure a block is no picture of anything.
MAX_LISTED_BLOCKS = 16


def code_counts(idx_BL: Tensor, block_lengths: tuple[int, ...], num_codes: int) -> Tensor | SparseCounts:
    """Count how often each block uses each code; counts of several batches add up.

    Args:
        idx_BL: (B, L) integers in [0, num_codes), in block order.
        block_lengths: L_k of the K blocks.
        num_codes: V.

    Returns:
        (K, V) int64, on the device of the indices; `SparseCounts` of more than 65 536 codes.

    Raises:
        ValueError: if an index on the CPU is out of range; on a GPU the device itself refuses it.
    """
    if idx_BL.device.type == "cpu":
        check_codes(idx_BL, block_lengths, num_codes)
    if num_codes > MAX_COUNTED_CODES:
        codes = idx_BL.long().flatten()
        blocks = _first_cells(block_lengths, 1, idx_BL.device).expand(idx_BL.shape).flatten()
        return SparseCounts(blocks, codes, torch.ones_like(codes), (len(block_lengths), num_codes))
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


def usage(counts: Tensor | SparseCounts) -> Tensor:
    """Return the fraction of the codes that occur at all.

    Args:
        counts: (..., V) occurrences; `counts.sum(0)` pools the blocks of a (K, V) histogram.

    Returns:
        (...) float64 in [0, 1].
    """
    if isinstance(counts, SparseCounts):
        return counts.num_used().double() / counts.shape[-1]
    return (counts > 0).double().mean(dim=-1)


def num_dead_codes(counts: Tensor | SparseCounts) -> Tensor:
    """Return the number of codes that never occur.

    Args:
        counts: (..., V) occurrences.

    Returns:
        (...) int64.
    """
    if isinstance(counts, SparseCounts):
        return counts.shape[-1] - counts.num_used()
    return (counts == 0).sum(dim=-1)


def perplexity(counts: Tensor | SparseCounts) -> Tensor:
    """Return the exponential of the entropy of code use: as many equally used codes would carry as much.

    Args:
        counts: (..., V) occurrences.

    Returns:
        (...) float64 in [1, V]; NaN where nothing was counted.
    """
    if isinstance(counts, SparseCounts):
        return torch.exp(counts.entropy())
    probabilities = counts.double() / counts.double().sum(dim=-1, keepdim=True)
    return torch.exp(-torch.xlogy(probabilities, probabilities).sum(dim=-1))


def digit_entropies(counts: Tensor | SparseCounts, digits: CodeDigits) -> Tensor:
    """Return how evenly every digit of the codes used takes its values.

    Args:
        counts: (K, V) occurrences, or (V,) of pooled blocks.
        digits: how a code's number is written.

    Returns:
        (D,) float64 in [0, 1]: the entropy of each digit as a share of the logarithm of its base; NaN where nothing was
        counted.
    """
    if isinstance(counts, SparseCounts):
        codes, occurrences = counts.codes, counts.occurrences
    else:
        codes = torch.arange(counts.shape[-1], device=counts.device)
        occurrences = counts.reshape(-1, len(codes)).sum(0)
    cells = digits.split(codes) + _first_digit_cells(digits.bases, codes.device)
    totals = torch.zeros(sum(digits.bases), dtype=torch.float64, device=codes.device)
    totals.scatter_add_(0, cells.flatten(), occurrences.double()[:, None].expand(cells.shape).flatten())
    p = totals / occurrences.sum()
    entropies = torch.stack([part.sum() for part in torch.special.entr(p).split(digits.bases)])
    return entropies / _log_bases(digits.bases, codes.device)


@lru_cache(maxsize=64)
def _first_digit_cells(bases: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where each digit's values begin in one histogram of all digits, (D,)."""
    return torch.tensor([0, *accumulate(bases[:-1])]).to(device)


@lru_cache(maxsize=64)
def _log_bases(bases: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the logarithms of digits' bases, (D,) float64."""
    return torch.tensor(bases, dtype=torch.float64).log().to(device)


_DESCRIBED = {"usage": usage, "perplexity": perplexity, "num_dead_codes": num_dead_codes}


def codebook_statistics(counts: Tensor | SparseCounts, digits: CodeDigits | None = None) -> dict:
    """Describe code use over all blocks and block by block, without waiting for a GPU.

    Args:
        counts: (K, V) occurrences.
        digits: of a product codebook.

    Returns:
        `code_counts`, the counts themselves; `usage`, `perplexity` and `num_dead_codes` of all blocks pooled,
        scalars; `block_usage`, `block_perplexity` and `block_num_dead_codes`, (K,); with digits `digit_entropy` (D,).
    """
    statistics = {"code_counts": counts}
    statistics |= {name: describe(counts.sum(dim=0)) for name, describe in _DESCRIBED.items()}
    statistics |= {f"block_{name}": describe(counts) for name, describe in _DESCRIBED.items()}
    return statistics if digits is None else statistics | {"digit_entropy": digit_entropies(counts, digits)}


def codebook_curves(counts: Tensor | SparseCounts, digits: CodeDigits | None = None) -> dict[str, Tensor]:
    """Describe code use by figures to log, without waiting for a GPU.

    Args:
        counts: (K, V) occurrences.
        digits: of a product codebook.

    Returns:
        `usage`, `perplexity` and `num_dead_codes` of all blocks pooled; of 2 to 16 blocks also `block_0/usage` and so
        on; with digits `digit_entropy`, the mean over digits, and `lowest_digit_entropy`. Scalars.
    """
    pooled, curves = counts.sum(dim=0), {}
    if digits is not None:
        entropies = digit_entropies(pooled, digits)
        curves = {"digit_entropy": entropies.mean(), "lowest_digit_entropy": entropies.amin()}
    if not 1 < len(counts) <= MAX_LISTED_BLOCKS:
        return {name: describe(pooled) for name, describe in _DESCRIBED.items()} | curves
    prefixes = ["", *(f"block_{k}/" for k in range(len(counts)))]
    # All rows at once: small operations for every block would cost a tiny model several percent.
    rows = None if isinstance(counts, SparseCounts) else torch.cat([pooled[None], counts])
    for name, describe in _DESCRIBED.items():
        values = torch.cat([describe(pooled)[None], describe(counts)]) if rows is None else describe(rows)
        curves |= {prefix + name: value for prefix, value in zip(prefixes, values.unbind(), strict=True)}
    return curves


def codebook_summary(
    counts: Tensor | SparseCounts, max_blocks: int = MAX_LISTED_BLOCKS, digits: CodeDigits | None = None
) -> dict:
    """Give the statistics of code use JSON types, those of the blocks only where blocks are few.

    Args:
        counts: (K, V) occurrences.
        max_blocks: the largest K for which the blocks are listed one by one.
        digits: of a product codebook.

    Returns:
        `num_codes`, `num_tokens` and what `codebook_statistics` gives but the counts themselves.
    """
    statistics = codebook_statistics(counts, digits)
    summary = {"num_codes": counts.shape[1], "num_tokens": int(counts.sum())}
    for name, value in statistics.items():
        is_listed = name.startswith("block_") and len(counts) <= max_blocks or name == "digit_entropy"
        if name != "code_counts" and (value.ndim == 0 or is_listed):
            summary[name] = value.tolist()
    return summary
