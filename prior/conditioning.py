"""What a prior is conditioned on: conditions as callers give them, and the context that a family makes of one.

Class labels (LlamaGen, arXiv:2406.06525, and VAR, arXiv:2404.02905), text features or nothing; classifier-free guidance
(arXiv:2207.12598) needs a condition's null. Legend: B samples, R rows, P prefix positions, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from nextblock.data.given import check_tensor
from nextblock.data.keyed_random import keyed_uniform


class Condition(Protocol):
    """What a batch of B samples is conditioned on."""

    has_null: bool
    """Whether there is a condition that says nothing; without one there is no guidance."""

    def __len__(self) -> int:
        """Return B."""

    def __getitem__(self, rows: slice) -> Condition:
        """Return the condition of some of the samples."""

    def null(self) -> Condition:
        """Return the same samples conditioned on nothing; only where `has_null`."""

    def joined(self, other: Condition) -> Condition:
        """Return these samples and another condition's after them."""

    def padded(self, num_rows: int) -> Condition:
        """Repeat the first sample at the end, up to `num_rows` rows."""

    def dropped(self, rate: float, *keys: int, samples: Tensor) -> Condition:
        """Condition a share of the samples on nothing, chosen by integer keys and the samples' numbers (B,) alone."""

    def to(self, device: torch.device | str) -> Condition:
        """Return the condition on a device."""


class Conditions(Protocol):
    """The conditions that a prior takes."""

    has_null: bool
    """Whether they have a null: what `Condition.has_null` of each of them is."""

    def of(self, condition) -> Condition:
        """Read what a caller gives in a condition's place, or a condition itself; refuse what the prior cannot take."""

    def from_batch(self, batch: Mapping[str, Tensor]) -> Condition:
        """Take the condition from a batch of training samples."""

    def example(self) -> Condition:
        """Return a condition of one sample, to try a prior by."""


@dataclass(frozen=True)
class ClassCondition:
    """One class a sample.

    Args:
        class_labels: (B,) int64.
        null_class: the label that stands for "no class"; None where there is none.
    """

    class_labels: Tensor
    null_class: int | None

    @property
    def has_null(self) -> bool:
        """Whether there is a label for "no class"."""
        return self.null_class is not None

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, rows: slice) -> ClassCondition:
        return replace(self, class_labels=self.class_labels[rows])

    def null(self) -> ClassCondition:
        """Return the same samples without a class."""
        assert self.has_null, "asked for the null of a condition without one"
        return replace(self, class_labels=torch.full_like(self.class_labels, self.null_class))

    def joined(self, other: ClassCondition) -> ClassCondition:
        """Return these samples and another condition's after them."""
        return replace(self, class_labels=torch.cat([self.class_labels, other.class_labels]))

    def padded(self, num_rows: int) -> ClassCondition:
        """Repeat the first sample at the end, up to `num_rows` rows."""
        labels = self.class_labels
        return replace(self, class_labels=torch.cat([labels, labels[:1].expand(num_rows - len(labels))]))

    def dropped(self, rate: float, *keys: int, samples: Tensor) -> ClassCondition:
        """Replace a share of the labels by the null class, which trains the unconditional half of guidance.

        Args:
            rate: share of labels dropped, in [0, 1].
            keys: integers such as (seed, step).
            samples: (B,) int64, the samples' numbers in the data set.

        Returns:
            The condition; this one where there is no null.
        """
        if not self.has_null:
            return self
        is_dropped = keyed_uniform(*keys, samples=samples) < rate
        labels = torch.where(is_dropped.to(self.class_labels.device), self.null_class, self.class_labels)
        return replace(self, class_labels=labels)

    def to(self, device: torch.device | str) -> ClassCondition:
        """Return the condition on a device."""
        return replace(self, class_labels=self.class_labels.to(device))


@dataclass(frozen=True)
class ClassConditions:
    """The classes that a prior knows, and after them the null class; or none at all.

    Args:
        num_classes: classes; 0 for an unconditional prior, which takes label 0 alone.
        class_names: one name a class, or None.
        has_null_class: whether the prior knows a null class beside its classes, where it has any.
    """

    num_classes: int
    class_names: list[str] | None = None
    has_null_class: bool = True

    @property
    def has_null(self) -> bool:
        """Whether there is a null class: an unconditional prior has nothing that could be left out."""
        return self.num_classes > 0 and self.has_null_class

    def of(self, class_labels: Tensor | ClassCondition, *, reads_range: bool = True) -> ClassCondition:
        """Read class labels.

        Args:
            class_labels: (B,) int64 in [0, num_classes], or a condition of such labels.
            reads_range: False does not look at the labels' values, for which a GPU would have to be waited for.

        Returns:
            The condition.

        Raises:
            ValueError: if labels have another shape, dtype or, where it is read, range.
        """
        if isinstance(class_labels, ClassCondition):
            class_labels = class_labels.class_labels
        check_tensor("class_labels", class_labels, "a torch.int64 tensor (batch,)")
        if class_labels.ndim != 1 or class_labels.dtype != torch.int64:
            raise ValueError(
                f"class_labels is {class_labels.dtype} {tuple(class_labels.shape)}; expected torch.int64 (batch,)"
            )
        null, is_read = self.num_classes, reads_range and class_labels.numel() > 0
        last = null if self.has_null or null == 0 else null - 1
        if is_read and not 0 <= class_labels.min().item() <= class_labels.max().item() <= last:
            expected = f"0 to {last}" + (f" ({null}: no class)" if last == null else "")
            raise ValueError(f"class_labels is {class_labels.tolist()}; expected {expected}")
        return ClassCondition(class_labels, null if self.has_null else None)

    def from_batch(self, batch: Mapping[str, Tensor]) -> ClassCondition:
        """Take the condition from a batch's `class_labels`."""
        return ClassCondition(batch["class_labels"], self.num_classes if self.has_null else None)

    def example(self) -> ClassCondition:
        """Return a condition of the first class."""
        return self.from_batch({"class_labels": torch.zeros(1, dtype=torch.int64)})


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a family computes of a condition once a request, for all blocks.

    Args:
        vector: (R, D), or one a position, (R, T, D); None where the prefix says all.
        prefix: (R, P, D) positions before the first token; None without any.
        prefix_mask: (R, P) whether a row attends to a position of the prefix; None attends to all.
        modulations: for each layer, then for the head, a tuple of tensors whose first dimension is R.
        orders: (R, L) int64 in which tokens are predicted; None is block order.
    """

    vector: Tensor | None = None
    prefix: Tensor | None = None
    prefix_mask: Tensor | None = None
    modulations: tuple[tuple[Tensor, ...], ...] = ()
    orders: Tensor | None = None

    def __len__(self) -> int:
        """Return R."""
        return len(self.prefix if self.vector is None else self.vector)

    def first(self, num_rows: int) -> Context:
        """Return the context of the first rows."""
        if num_rows == len(self):
            return self
        return Context(**{field.name: _first(getattr(self, field.name), num_rows) for field in fields(self)})


def _first(value: Tensor | tuple | None, num_rows: int):
    """Slice the first dimension of all tensors."""
    if isinstance(value, tuple):
        return tuple(_first(each, num_rows) for each in value)
    return None if value is None else value[:num_rows]
