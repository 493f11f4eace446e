"""A histogram of code use for codebooks so large that most codes never occur: entries in place of a (K, V) table.

Legend: K blocks, V codes, N entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCounts:
    """What `code_counts` gives where V is large; it adds up and is pooled as a (K, V) tensor would be.

    Nothing of it waits for a GPU but `compacted`.

    Args:
        blocks: (N,) int64, the block of each entry.
        codes: (N,) int64, its code; the same one may come again.
        occurrences: (N,) int64, how often the entry counts.
        shape: (K, V), or (V,) once blocks are pooled.
    """

    blocks: Tensor
    codes: Tensor
    occurrences: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other: SparseCounts) -> SparseCounts:
        fields = ("blocks", "codes", "occurrences")
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in fields})

    def __radd__(self, zero: int) -> SparseCounts:
        return self if zero == 0 else NotImplemented

    def cpu(self) -> SparseCounts:
        """Return the same on the CPU."""
        return replace(self, blocks=self.blocks.cpu(), codes=self.codes.cpu(), occurrences=self.occurrences.cpu())

    def sum(self, dim: int | None = None, keepdim: bool = False) -> SparseCounts | Tensor:
        """Return the counts of all blocks pooled (`dim` 0), or the number of tokens."""
        if dim is None:
            return self.occurrences.sum()
        V = self.shape[-1]
        return replace(self, blocks=torch.zeros_like(self.blocks), shape=(1, V) if keepdim else (V,))

    def compacted(self) -> SparseCounts:
        """Return the same with one entry a block and code; waits for the device."""
        V = self.shape[-1]
        cells, entry = (self.blocks * V + self.codes).unique(return_inverse=True)
        occurrences = torch.zeros_like(cells).index_add_(0, entry, self.occurrences)
        return replace(self, blocks=cells // V, codes=cells % V, occurrences=occurrences)

    def num_used(self) -> Tensor:
        """Return how many codes occur at all, (K,) int64, or () of pooled blocks."""
        row, weight, cell_total, _ = self._sorted()
        return self._by_row(row, weight / cell_total).round().long()

    def entropy(self) -> Tensor:
        """Return the entropy of code use in nats, (K,) float64, or () of pooled blocks; NaN where there is none."""
        row, weight, cell_total, row_total = self._sorted()
        share = row_total.gather(0, row)
        entropy = -self._by_row(row, weight / share * (cell_total / share).log())
        return torch.where(self._by_row(row, weight) > 0, entropy, torch.nan)

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return of each entry its row, occurrences and those of its block and code, and the totals of rows (K,)."""
        cells, order = (self.blocks * self.shape[-1] + self.codes).sort()
        weight = self.occurrences[order].double()
        before = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
        # Not unique: how many there are of them, a GPU would have to be asked.
        start, end = torch.searchsorted(cells, cells), torch.searchsorted(cells, cells, right=True)
        row = self.blocks[order]
        row_total = weight.new_zeros(self._num_rows).scatter_add_(0, row, weight)
        return row, weight, before[end] - before[start], row_total

    def _by_row(self, row: Tensor, values: Tensor) -> Tensor:
        """Add values up by row, (K,), or () of pooled blocks."""
        sums = values.new_zeros(self._num_rows).scatter_add_(0, row, values)
        return sums if len(self.shape) == 2 else sums[0]

    @property
    def _num_rows(self) -> int:
        """K, or 1 of pooled blocks."""
        return self.shape[0] if len(self.shape) == 2 else 1
