"""The parts of a tokenization job: which rows a shard holds, decoding them and encoding them.

Row r of a split of N images is image r mod N in view r div N; shards are fixed ranges of rows, less rejected images.
Legend: B batch, L all tokens, HxW pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nextblock.data.images import ImageSource
from nextblock.data.token_shards import split_identifier, write_shard
from nextblock.data.unreadable import UnreadableImageError
from nextblock.data.views import ViewSet
from nextblock.training.part_jobs import Progress

from .modeling_vqvae import VQVAE


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
        digest = hashlib.sha256()
        for index in range(len(self.source)):
            digest.update(f"{self.source.identifier(index)}\t{self.source.label(index)}\n".encode())
        return digest.hexdigest()

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


class Encoder:
    """Turns batches of bytes into indices, bit for bit the same in every process.

    Args:
        model: in float32, on its device.
        is_autocast: whether convolutions run in bf16.
        is_channels_last: whether pictures lie in memory pixel by pixel.
        is_compiled: whether the encoder is compiled.
    """

    def __init__(self, model: VQVAE, is_autocast: bool, is_channels_last: bool, is_compiled: bool):
        self.device = model.device
        self.is_autocast = is_autocast
        self.memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        # A divisor on the device: a Python number would be multiplied by its rounded reciprocal there.
        self.half_range = torch.tensor(127.5, device=self.device)
        if is_compiled:
            model.encoder.compile()

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Encode (B, H, W, 3) uint8 to (B, L) int64."""
        return self.quantize(self.features(pixels))

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode (B, H, W, 3) uint8 to what the quantizer receives."""
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        pixel_values = pixels.to(torch.float32, memory_format=self.memory_format) / self.half_range - 1
        with torch.autocast(self.device.type, torch.bfloat16) if self.is_autocast else nullcontext():
            return self.model.encode(pixel_values)

    @torch.no_grad()
    def quantize(self, features: torch.Tensor) -> np.ndarray:
        """Find the indices (B, L) of features."""
        return self.model.quantizer.indices(features).cpu().numpy()


def write_shards(
    folder: Path,
    shards: list[Shard],
    dataset: RowDataset,
    encoder: Encoder,
    progress: Progress,
    *,
    num_workers: int,
    skips_errors: bool,
) -> None:
    """Decode, encode and write some shards of a split; one is written while the next is encoded.

    Args:
        folder: where they go.
        shards: those of this process.
        dataset: the split.
        encoder: the tokenizer.
        progress: told of every batch.
        num_workers: processes that decode; 0 decodes here.
        skips_errors: leave unusable images out; otherwise stop at the first.

    Raises:
        ValueError: at an unusable image that is not left out.
    """
    batches = [batch for shard in shards for batch in shard.batches(dataset.batch_size)]
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=as_is,
            pin_memory=encoder.device.type == "cuda",
        )
    )
    writing: Future | None = None
    with ThreadPoolExecutor(1) as executor:
        for shard in shards:
            rows, idx, rejected = _encode_shard(loader, shard, dataset, encoder, progress, skips_errors)
            if writing is not None:
                writing.result()
            writing = executor.submit(write_rows, folder / shard.name, rows, idx, rejected, dataset, encoder.model)
        if writing is not None:
            writing.result()


def _encode_shard(
    loader: Iterator[dict],
    shard: Shard,
    dataset: RowDataset,
    encoder: Encoder,
    progress: Progress,
    skips_errors: bool,
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Return the usable rows (N,) of a shard, their indices (N, L), and what was rejected."""
    rows, rejected = [], []
    parts = [np.empty((0, encoder.model.layout.num_tokens), np.int64)]
    for numbers in shard.batches(dataset.batch_size):
        batch = next(loader)
        for row, error in batch["failures"].items():
            if error.reason is None or not skips_errors:
                hint = "" if error.reason is None else f" ({error.reason}; on_error=skip leaves such images out)"
                raise ValueError(f"{error}{hint}")
            image_id = dataset.source.identifier(row % len(dataset.source))
            rejected.append({"row": row, "image_id": image_id, "reason": error.reason, "detail": error.detail})
        if batch["rows"]:
            parts.append(encoder(batch["pixels"])[batch["places"]])
            rows += batch["rows"]
        progress.add(len(numbers))
    return np.array(rows, np.int64), np.concatenate(parts), rejected


def write_rows(
    path: Path, rows: np.ndarray, idx: np.ndarray, rejected: list[dict], dataset: RowDataset, model: VQVAE
) -> None:
    """Write a shard with labels, names and views of its rows.

    Args:
        path: its file.
        rows: (N,) row numbers of the split.
        idx: (N, L) their indices.
        rejected: what keeps other rows out.
        dataset: the split.
        model: the tokenizer.
    """
    source = dataset.source
    views, images = np.divmod(rows, len(source))
    images = images.tolist()
    labels = np.array([source.label(index) for index in images], np.int64)
    image_ids = [source.identifier(index) for index in images]
    write_shard(path, idx, labels, image_ids, views, source.class_names, model.config.vocab_size, rejected)
