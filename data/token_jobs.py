"""The parts of a tokenization job: which rows a shard holds, and decoding them.

Row r of a split of N images is image r mod N in view r div N; shards are fixed ranges of rows, less rejected images.
Legend: B batch, HxW pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import ImageSource
from .token_shards import split_identifier
from .unreadable import UnreadableImageError
from .usable import source_fingerprint
from .views import ViewSet


class RowDataset(Dataset):
    """The rows of one split as whole batches of bytes.

    Args:
        source: N images.
        views: what the views are.
        num_views: how many of them this split has.
        image_size: (H, W).
        min_image_side: images with a shorter side are rejected.
        batch_size: B; a shorter batch is padded with black images.
    """

    def __init__(
        self,
        source: ImageSource,
        views: ViewSet,
        num_views: int,
        image_size: tuple[int, int],
        min_image_side: int,
        batch_size: int,
    ):
        self.source = source
        self.views = views
        self.num_views = num_views
        self.image_size = image_size
        self.min_image_side = min_image_side
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.source) * self.num_views

    def fingerprint(self) -> str:
        """Hash the names and labels of all images."""
        return source_fingerprint(self.source)

    def __getitems__(self, rows: list[int]) -> dict:
        """Decode a batch.

        Args:
            rows: up to B row numbers.

        Returns:
            `pixels` (B, H, W, 3) uint8; `rows`, those of the usable images; `places`, theirs in the batch; and
            `failures`, an error by row, which has a reason or None as its machine is at fault.
        """
        pixels = np.zeros((self.batch_size, *self.image_size, 3), np.uint8)
        kept, failures = [], {}
        for place, row in enumerate(rows):
            view, index = divmod(row, len(self.source))
            try:
                image = self.source.image(index)
                self._check_size(image.size, index)
            except UnreadableImageError as error:
                failures[row] = error
                continue
            pixels[place] = self.views.render(image, self.image_size, view, index)
            kept.append((row, place))
        return {
            "pixels": torch.from_numpy(pixels),
            "rows": [row for row, _ in kept],
            "places": [place for _, place in kept],
            "failures": failures,
        }

    def _check_size(self, size: tuple[int, int], index: int) -> None:
        """Refuse an image that is too small."""
        if min(size) < self.min_image_side:
            error = ValueError(f"{size[0]}×{size[1]} pixels; expected at least {self.min_image_side} on each side")
            refused = UnreadableImageError(f"the image {self.source.identifier(index)}", "", error)
            refused.reason = "too small"
            raise refused


def as_is(batch: dict) -> dict:
    """Pass on what `RowDataset.__getitems__` has already put together."""
    return batch


@dataclass(frozen=True)
class Shard:
    """A range of the rows of a split."""

    name: str
    rows: range

    @classmethod
    def plan(cls, split: str, num_rows: int, rows_per_shard: int) -> list[Shard]:
        """Cut a split into shards; all but the last have `rows_per_shard` rows."""
        starts = range(0, num_rows, rows_per_shard)
        names = [f"{split_identifier(split)}-{n:05d}-of-{len(starts):05d}.parquet" for n in range(len(starts))]
        ranges = [range(start, min(start + rows_per_shard, num_rows)) for start in starts]
        return [cls(name, rows) for name, rows in zip(names, ranges, strict=True)]

    def batches(self, batch_size: int) -> list[list[int]]:
        """The shard's rows in batches; the last may be shorter."""
        return [list(self.rows[start : start + batch_size]) for start in range(0, len(self.rows), batch_size)]
