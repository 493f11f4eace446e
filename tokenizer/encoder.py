"""Encoding the rows of a tokenization job and writing its shards.

Legend: B batch, N rows, L all tokens, HxW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from nextblock.data.pixels import to_pixel_values
from nextblock.data.token_jobs import RowDataset, Shard, as_is
from nextblock.data.token_shards import write_shard
from nextblock.data.workers import batches_of, start_worker
from nextblock.training.precision import without_tf32

from .modeling_vqvae import VQVAE


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
        if is_compiled:
            model.encoder.compile()

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Encode (B, H, W, 3) uint8 to (B, L) int64."""
        return self.quantize(self.features(pixels))

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode (B, H, W, 3) uint8 to what the quantizer receives."""
        pixel_values = to_pixel_values(pixels.to(self.device, non_blocking=True), self.memory_format)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.is_autocast else nullcontext()
        with without_tf32(self.device), autocast:
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
    on_rows: Callable[[int], None],
    *,
    num_workers: int,
    skips_errors: bool,
    embed: Callable[[list[str]], list[np.ndarray]] | None = None,
) -> None:
    """Decode, encode and write some shards of a split; one is written while the next is encoded.

    Args:
        folder: where they go.
        shards: those of this process.
        dataset: the split.
        encoder: the tokenizer.
        on_rows: told how many rows every batch has.
        num_workers: processes that decode; 0 decodes here.
        skips_errors: leave unusable images out; otherwise stop at the first.
        embed: gives for each of some texts its features (T, E) float16, to be stored; None stores none.

    Raises:
        ValueError: at an unusable image that is not left out.
    """
    batches = [batch for shard in shards for batch in shard.batches(dataset.batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        collate_fn=as_is,
        pin_memory=encoder.device.type == "cuda",
    )
    writing: Future | None = None
    with ThreadPoolExecutor(1) as executor, batches_of(loader) as decoded:
        for shard in shards:
            rows, idx, rejected = _encode_shard(decoded, shard, dataset, encoder, on_rows, skips_errors)
            texts = _texts_of(rows, dataset, embed)
            if writing is not None:
                writing.result()
            model = encoder.model
            writing = executor.submit(write_rows, folder / shard.name, rows, idx, rejected, dataset, model, *texts)
        if writing is not None:
            writing.result()


def _encode_shard(
    decoded: Iterator[dict],
    shard: Shard,
    dataset: RowDataset,
    encoder: Encoder,
    on_rows: Callable[[int], None],
    skips_errors: bool,
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Return the usable rows (N,) of a shard, their indices (N, L), and what was rejected."""
    rows, rejected = [], []
    parts = [np.empty((0, encoder.model.layout.num_tokens), np.int64)]
    for numbers in shard.batches(dataset.batch_size):
        batch = next(decoded)
        for row, error in batch["failures"].items():
            if error.reason is None or not skips_errors:
                hint = "" if error.reason is None else f" ({error.reason}; on_error=skip leaves such images out)"
                raise ValueError(f"{error}{hint}")
            image_id = dataset.source.identifier(row % len(dataset.source))
            rejected.append({"row": row, "image_id": image_id, "reason": error.reason, "detail": error.detail})
        if batch["rows"]:
            parts.append(encoder(batch["pixels"])[batch["places"]])
            rows += batch["rows"]
        on_rows(len(numbers))
    return np.array(rows, np.int64), np.concatenate(parts), rejected


def _texts_of(
    rows: np.ndarray, dataset: RowDataset, embed: Callable[[list[str]], list[np.ndarray]] | None
) -> tuple[list[Sequence[str]] | None, list[list[np.ndarray]] | None]:
    """Return the captions of rows, and the features of each; None where there are none."""
    if dataset.source.captions is None:
        return None, None
    captions = [dataset.source.captions[index] for index in (rows % len(dataset.source)).tolist()]
    if embed is None:
        return captions, None
    features = iter(embed([text for texts in captions for text in texts]))
    return captions, [list(islice(features, len(texts))) for texts in captions]


def write_rows(
    path: Path,
    rows: np.ndarray,
    idx: np.ndarray,
    rejected: list[dict],
    dataset: RowDataset,
    model: VQVAE,
    captions: list[Sequence[str]] | None = None,
    embeds: list[list[np.ndarray]] | None = None,
) -> None:
    """Write a shard with labels, names and views of its rows.

    Args:
        path: its file.
        rows: (N,) row numbers of the split.
        idx: (N, L) their indices.
        rejected: what keeps other rows out.
        dataset: the split.
        model: the tokenizer.
        captions: of each row, one text or more.
        embeds: of each caption, its features (T, E) float16.
    """
    source = dataset.source
    views, images = np.divmod(rows, len(source))
    images = images.tolist()
    labels = np.array([source.label(index) for index in images], np.int64)
    image_ids = [source.identifier(index) for index in images]
    names, vocab_size = source.class_names, model.config.vocab_size
    write_shard(path, idx, labels, image_ids, views, names, vocab_size, rejected, captions, embeds)
