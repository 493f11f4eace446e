"""Text features as a condition: what a text encoder gives of a caption, with a mask, and what stands for no text.

LlamaGen (arXiv:2406.06525) has a table for no text, seen under the caption's own mask; elsewhere features of the empty
text stand for it. Legend: B samples, T positions, E width of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nextblock.data.given import FLOAT_DTYPES, check_tensor
from nextblock.data.keyed_random import keyed_uniform
from nextblock.training.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """One text a sample, its valid positions at the right end; made by `TextConditions.of`.

    Args:
        text_embeds: (B, T, E) floating point, 0 where not valid.
        text_mask: (B, T) bool, the valid positions.
        is_null: (B,) bool, samples that are conditioned on nothing. Where there are no `null_embeds`, a model then sees
            a table of its own under the sample's mask.
        null_embeds: (T_0, E), T_0 ≤ T, features that stand for no text; None where the model has them.
        has_null: whether there is anything that stands for no text.
        is_whole: whether all positions of all samples are known to be valid.
        negative: of as many samples, what stands in for no text where these are guided; None leaves it at that.
    """

    text_embeds: Tensor
    text_mask: Tensor
    is_null: Tensor
    null_embeds: Tensor | None
    has_null: bool
    is_whole: bool
    negative: TextCondition | None = None

    def __len__(self) -> int:
        return len(self.text_mask)

    def __getitem__(self, rows: slice) -> TextCondition:
        return self._mapped(lambda tensor: tensor[rows])

    def null(self) -> TextCondition:
        """Return the same samples conditioned on no text, or on their negative ones."""
        if self.negative is not None:
            return self.negative
        return self._nulled(torch.ones_like(self.is_null))

    def joined(self, other: TextCondition) -> TextCondition:
        """Return these samples and another condition's after them; the shorter texts get positions on the left."""
        T = max(self.text_mask.shape[1], other.text_mask.shape[1])
        mine, others = self._widened(T), other._widened(T)
        return replace(
            mine,
            negative=None,
            text_embeds=torch.cat([mine.text_embeds, others.text_embeds]),
            text_mask=torch.cat([mine.text_mask, others.text_mask]),
            is_null=torch.cat([mine.is_null, others.is_null]),
            is_whole=mine.is_whole and others.is_whole,
        )

    def padded(self, num_rows: int) -> TextCondition:
        """Repeat the first sample at the end, up to `num_rows` rows."""
        missing = num_rows - len(self)
        return self._mapped(lambda tensor: torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]))

    def dropped(self, rate: float, *keys: int, samples: Tensor) -> TextCondition:
        """Condition a share of the samples on no text, which trains the unconditional half of guidance.

        Args:
            rate: share of texts dropped, in [0, 1].
            keys: integers such as (seed, step).
            samples: (B,) int64, the samples' numbers in the data set.

        Returns:
            The condition; this one where there is no null.
        """
        if not self.has_null:
            return self
        return self._nulled((keyed_uniform(*keys, samples=samples) < rate).to(self.is_null.device))

    def to(self, device: torch.device | str) -> TextCondition:
        """Return the condition on a device."""
        null = None if self.null_embeds is None else self.null_embeds.to(device)
        return replace(self._mapped(lambda tensor: tensor.to(device)), null_embeds=null)

    def repeated(self, num_times: int) -> TextCondition:
        """Return each sample so many times, one after the other."""
        return self._mapped(lambda tensor: tensor.repeat_interleave(num_times, dim=0))

    def _mapped(self, change) -> TextCondition:
        """Apply a function to all tensors that have a row a sample."""
        names = ("text_embeds", "text_mask", "is_null")
        negative = None if self.negative is None else self.negative._mapped(change)
        return replace(self, **{name: change(getattr(self, name)) for name in names}, negative=negative)

    def _widened(self, num_positions: int) -> TextCondition:
        """Put positions that are not valid on the left, up to a number of them."""
        missing = num_positions - self.text_mask.shape[1]
        if not missing:
            return self
        embeds, mask = F.pad(self.text_embeds, (0, 0, missing, 0)), F.pad(self.text_mask, (missing, 0))
        return replace(self, text_embeds=embeds, text_mask=mask, is_whole=False)

    def _nulled(self, is_nulled: Tensor) -> TextCondition:
        """Condition chosen samples (B,) on no text."""
        assert self.has_null, "asked for the null of a condition without one"
        chosen = replace(self, is_null=self.is_null | is_nulled)
        if self.null_embeds is None:
            return chosen
        T, T_0 = self.text_mask.shape[1], len(self.null_embeds)
        chosen = chosen._widened(max(T, T_0))
        left = chosen.text_mask.shape[1] - T_0
        null = F.pad(self.null_embeds.to(self.text_embeds.dtype), (0, 0, left, 0))
        is_valid = F.pad(torch.ones(T_0, dtype=torch.bool, device=null.device), (left, 0))
        embeds = torch.where(is_nulled[:, None, None], null, chosen.text_embeds)
        mask = torch.where(is_nulled[:, None], is_valid, chosen.text_mask)
        return replace(chosen, text_embeds=embeds, text_mask=mask, is_whole=False)


@dataclass(frozen=True, kw_only=True)
class TextConditions:
    """The texts that a prior takes: features `text_embeds` and their mask `text_mask`.

    Args:
        text_dim: E.
        max_positions: the most valid positions of a text.
        has_null: whether there is something that stands for no text.
        null_embeds: (T_0, E), the features that stand for it; None where the model has a table of them.
    """

    text_dim: int
    max_positions: int
    has_null: bool = True
    null_embeds: Tensor | None = None

    def of(self, given: TextCondition | Mapping[str, Tensor] | tuple, *, reads_range: bool = True) -> TextCondition:
        """Read text features.

        Args:
            given: `text_embeds` (B, T, E) floating point and `text_mask` (B, T), bool or 0 and 1, by name or as a pair;
                the valid positions are those of a mask of 1, wherever they lie, all without a mask. Or a condition.
            reads_range: False does not look at the mask's values, for which a GPU would have to be waited for.

        Returns:
            The condition, with no more positions than the longest text has, where the mask is read.

        Raises:
            ValueError: naming what is of another shape or kind, too long, or a text without a valid position.
        """
        if isinstance(given, TextCondition):
            if given.text_embeds.shape[2] != self.text_dim:
                raise ValueError(f"text_embeds has width {given.text_embeds.shape[2]}; expected {self.text_dim}")
            return given
        embeds, mask = self._checked(*_pair(given), reads_range=reads_range)
        # Valid ones to the right, in their order: what a row does not see lies before what it sees.
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        is_whole = False
        if reads_range:
            num_valid = mask.sum(1)
            longest = int(num_valid.max())
            embeds, mask, is_whole = embeds[:, -longest:], mask[:, -longest:], bool((num_valid == longest).all())
        # What lies at other positions is never seen, NaN neither.
        return TextCondition(
            # Autocast to one half type takes no tensors of the other, as which features are stored.
            text_embeds=full_precision(embeds.masked_fill(~mask[..., None], 0)),
            text_mask=mask,
            is_null=torch.zeros(len(mask), dtype=torch.bool, device=mask.device),
            null_embeds=None if self.null_embeds is None else self.null_embeds.to(mask.device),
            has_null=self.has_null,
            is_whole=is_whole,
        )

    def from_batch(self, batch: Mapping[str, Tensor]) -> TextCondition:
        """Take the condition from a batch's `text_embeds` and `text_mask`."""
        return self.of(batch, reads_range=batch["text_embeds"].device.type == "cpu")

    def example(self) -> TextCondition:
        """Return a condition of one text of a single position."""
        return self.of({"text_embeds": torch.zeros(1, 1, self.text_dim), "text_mask": None})

    def _checked(self, embeds: Any, mask: Any, reads_range: bool) -> tuple[Tensor, Tensor]:
        """Refuse what are no features and mask; return the mask as booleans."""
        expected = f"a floating-point tensor (batch, positions, {self.text_dim})"
        check_tensor("text_embeds", embeds, expected)
        is_shaped = embeds.ndim == 3 and embeds.shape[2] == self.text_dim and 0 not in embeds.shape
        if not is_shaped or embeds.dtype not in FLOAT_DTYPES:
            raise ValueError(f"text_embeds is {embeds.dtype} {tuple(embeds.shape)}; expected {expected}")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        expected = f"booleans, or integers 0 and 1, of shape {tuple(embeds.shape[:2])}"
        check_tensor("text_mask", mask, expected)
        if mask.shape != embeds.shape[:2] or mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise ValueError(f"text_mask is {mask.dtype} {tuple(mask.shape)}; expected {expected}")
        mask = mask.to(embeds.device)
        if reads_range:
            self._check_values(embeds, mask)
        elif embeds.shape[1] > self.max_positions:
            raise ValueError(f"text_embeds has {embeds.shape[1]} positions; expected at most {self.max_positions}")
        return embeds, mask.bool()

    def _check_values(self, embeds: Tensor, mask: Tensor) -> None:
        """Refuse masks of other numbers than 0 and 1, texts without a valid position or with too many, and NaN."""
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"text_mask holds {int(mask.min())} to {int(mask.max())}; expected 0 and 1")
        counts = mask.sum(1)
        if not 1 <= int(counts.min()) <= int(counts.max()) <= self.max_positions:
            raise ValueError(
                f"text_mask has {counts.tolist()} valid positions; expected 1 to {self.max_positions} in every text"
            )
        if not embeds[mask.bool()].isfinite().all():
            raise ValueError("text_embeds holds NaN or infinite values at valid positions; expected finite ones")


def _pair(given: Any) -> tuple[Any, Any]:
    """Return features and mask of what a caller gives."""
    if isinstance(given, Mapping) and "text_embeds" in given:
        return given["text_embeds"], given.get("text_mask")
    if isinstance(given, tuple) and len(given) == 2:
        return given
    raise ValueError(f"the condition is {type(given).__name__}; expected text_embeds and text_mask")
