"""Parquet shards of tokens: written whole or not at all, and opened as arrays.

Legend: N rows, L all tokens, V codes.
"""

import fcntl
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from nextblock.files.atomic import file_sha256, write_whole
from nextblock.files.regular import check_regular

from .blocks import BlockLayout
from .code_digits import MAX_CODES
from .text_columns import EMBEDS, check_texts, text_arrays, text_features

if TYPE_CHECKING:
    import datasets

    from .tokens import TokenManifest

logger = logging.getLogger(__name__)

_REJECTED_KEY = b"nextblock.rejected"
# What a shard may claim to hold: so many bytes, or so many for each byte of the file. Runs of one value, of which
# Parquet keeps the length alone, are all that packs tightly.
_SMALL_BYTES, _MAX_EXPANSION = 1 << 28, 1000


class ShardRows(NamedTuple):
    """Some rows of a shard."""

    idx: np.ndarray
    """(N, L) uint16 or uint32."""
    class_labels: np.ndarray
    """(N,) int64."""
    views: np.ndarray
    """(N,) int32."""
    texts: dict
    """Columns of captions by name, see `text_columns`; none where they were not asked for."""


def index_dtype(vocab_size: int) -> str:
    """Return the narrowest Parquet type for indices: "uint16", or "uint32" for more than 65 536 codes.

    Args:
        vocab_size: V.

    Raises:
        ValueError: for more than 2^32 codes, whose indices would need uint64.
    """
    if vocab_size > MAX_CODES:
        raise ValueError(f"vocab_size is {vocab_size}; expected at most {MAX_CODES}: uint64 indices are not stored")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def split_identifier(split: str) -> str:
    """Return a split's name as file names and the hub take it: letters, digits and underscores."""
    name = re.sub(r"\W", "_", split, flags=re.ASCII)
    # To `datasets` this one is no split but all of them.
    return "all_" if name == "all" else name


def write_shard(
    path: Path,
    idx: np.ndarray,
    class_labels: np.ndarray,
    image_ids: Sequence[str],
    views: np.ndarray,
    class_names: Sequence[str],
    vocab_size: int,
    rejected: Sequence[dict] = (),
    captions: Sequence[Sequence[str]] | None = None,
    embeds: Sequence[Sequence[np.ndarray]] | None = None,
) -> None:
    """Write one Parquet shard under a temporary name, flush it, and rename it into place.

    Args:
        path: final name.
        idx: (N, L) integers in block order.
        class_labels: (N,) integers.
        image_ids: N identifiers.
        views: (N,) 0 for the original, v for the v-th augmented copy.
        class_names: names by label; empty for unconditional data.
        vocab_size: V.
        rejected: what keeps the shard's other images out, kept in its footer.
        captions: of each row one text or more; None for images without.
        embeds: for each caption its features (T, E) float16; None stores none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features, List, Value

    dtype = index_dtype(vocab_size)
    features = Features(
        {
            "idx": List(Value(dtype)),
            "label": ClassLabel(names=list(class_names)) if class_names else Value("int64"),
            "image_id": Value("string"),
            "view": Value("int32"),
            **({} if captions is None else text_features(has_embeds=embeds is not None)),
        }
    )
    N, L = idx.shape
    columns = [
        pa.ListArray.from_arrays(
            pa.array(np.arange(N + 1, dtype=np.int32) * L), pa.array(idx.astype(dtype).reshape(-1))
        ),
        pa.array(class_labels.astype(np.int64)),
        pa.array(list(image_ids), pa.string()),
        pa.array(views.astype(np.int32)),
        *([] if captions is None else text_arrays(captions, embeds)),
    ]
    schema = features.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), _REJECTED_KEY: json.dumps(list(rejected)).encode()})
    table = pa.Table.from_arrays(columns, schema=schema)
    write_whole(path, partial(pq.write_table, table), partial(_check_rows, num_rows=N))


def _check_rows(path: Path, num_rows: int) -> None:
    """Refuse a shard that cannot be read back with all its rows."""
    found, _ = read_footer(path)
    if found != num_rows:
        raise ValueError(f"{path} has {found} rows; expected {num_rows}")


def damage_of_shard(path: Path, num_rows: int) -> str | None:
    """Say what is wrong with a shard by its footer, or None where it is whole.

    Args:
        path: the file.
        num_rows: the rows that it has, those that were rejected included.
    """
    try:
        found, rejected = read_footer(path)
    except ValueError as error:
        return str(error)
    if found + len(rejected) == num_rows:
        return None
    return f"shard {path} has {found} rows and {len(rejected)} rejects; expected {num_rows}"


def read_footer(path: Path) -> tuple[int, list[dict]]:
    """Return a shard's number of rows and the images that were rejected from it.

    Raises:
        ValueError: if it is no Parquet file, or has no list of rejected images where there must be one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_regular(path)
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"shard {path} cannot be read: {error}") from error
    text = (footer.metadata or {}).get(_REJECTED_KEY, b"[]")
    try:
        rejected = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"shard {path} has a list of rejected images that is damaged: {error}") from error
    if not isinstance(rejected, list) or not all(isinstance(entry, dict) for entry in rejected):
        raise ValueError(f"shard {path} has {text[:80]!r} for its rejected images; expected a list of objects")
    return footer.num_rows, rejected


def read_shard(path: Path, num_rows: int, sha256: str, text_names: Sequence[str] = ()) -> ShardRows:
    """Read one shard.

    Args:
        path: the file.
        num_rows: N, as its manifest says.
        sha256: its checksum there.
        text_names: columns of captions to read too.

    Raises:
        ValueError: if the file is missing, has changed, or holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"shard {path} is missing; its manifest lists it")
    if file_sha256(path) != sha256:
        raise ValueError(f"shard {path} has changed since it was written; expected the checksum of its manifest")
    _check_claims(path, num_rows)
    try:
        _check_columns(path, pq.read_schema(path), text_names)
        table = pq.read_table(path, columns=["idx", "label", "view", *text_names]).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"shard {path} cannot be read: {error}") from error
    column = table["idx"].combine_chunks()
    num_nulls = column.null_count + column.flatten().null_count + table["label"].null_count + table["view"].null_count
    if num_nulls:
        raise ValueError(f"shard {path} has {num_nulls} values that are null; expected integers")
    lengths = np.unique(np.diff(column.offsets.to_numpy()))
    if len(lengths) > 1:
        raise ValueError(f"shard {path} has rows of {lengths.min()} to {lengths.max()} tokens; expected equal lengths")
    idx = column.flatten().to_numpy().reshape(num_rows, lengths[0] if len(lengths) else 0)
    texts = {name: table[name].combine_chunks() for name in text_names}
    return ShardRows(idx, table["label"].to_numpy().astype(np.int64), table["view"].to_numpy(), texts)


def _check_claims(path: Path, num_rows: int) -> None:
    """Refuse a shard whose footer claims other rows than its manifest, or more of them than its bytes can mean."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
    except pa.ArrowException as error:
        raise ValueError(f"shard {path} cannot be read: {error}") from error
    if footer.num_rows != num_rows:
        raise ValueError(f"shard {path} has {footer.num_rows} rows; expected {num_rows} as in its manifest")
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    num_values = sum(group.column(n).num_values for group in groups for n in range(group.num_columns))
    most = max(_SMALL_BYTES, _MAX_EXPANSION * path.stat().st_size) // 8
    if num_values > most:
        raise ValueError(f"shard {path} claims {num_values} values; expected {most} at most in a file of its size")


def _check_columns(path: Path, schema, text_names: Sequence[str]) -> None:
    """Refuse columns that are missing or hold no integers."""
    import pyarrow.types as kinds

    missing = [name for name in text_names if name not in schema.names]
    if missing:
        raise ValueError(f"shard {path} has the columns {schema.names}; expected {missing} too, as its manifest says")
    for name in ("idx", "label", "view"):
        if name not in schema.names:
            raise ValueError(f"shard {path} has the columns {schema.names}; expected idx, label and view")
        kind = schema.field(name).type
        is_fit = kinds.is_list(kind) and kinds.is_integer(kind.value_type) if name == "idx" else kinds.is_integer(kind)
        if not is_fit:
            expected = "lists of integers" if name == "idx" else "integers"
            raise ValueError(f"shard {path}: column {name} holds {kind}; expected {expected}")


def open_rows(
    folder: Path, manifest: "TokenManifest", split: str, max_memory: int, text_names: Sequence[str] = ()
) -> list[ShardRows]:
    """Open all rows of a split.

    Args:
        folder: of tokens.
        manifest: that of the folder.
        split: one of its splits.
        max_memory: largest size in bytes that is read into memory rather than mapped.
        text_names: columns of captions to open too.

    Returns:
        The rows in parts.

    Raises:
        ValueError: if a shard is missing, has changed or does not fit the manifest.
    """
    shards = [shard for shard in manifest.splits[split]["shards"] if shard["num_rows"]]
    num_tokens = BlockLayout.from_dict(manifest.layout).num_tokens
    size = sum(shard["num_rows"] for shard in shards) * num_tokens * np.dtype(index_dtype(manifest.vocab_size)).itemsize
    if EMBEDS in text_names:
        # Features do not pack: their share of a file is about their size.
        size += sum((folder / shard["file"]).stat().st_size for shard in shards if (folder / shard["file"]).is_file())
    if size <= max_memory:
        parts = list(_checked_shards(folder, manifest, split, shards, num_tokens, text_names))
    else:
        parts = _mapped_shards(folder, manifest, split, shards, num_tokens, text_names)
    labels = np.concatenate([part.class_labels for part in parts])
    num_classes = len(manifest.class_names)
    if len(labels) and not 0 <= labels.min() <= labels.max() < max(num_classes, 1):
        raise ValueError(
            f"split {split!r} of {folder} has labels from {labels.min()} to {labels.max()}; expected "
            f"0 to {max(num_classes - 1, 0)}, as its manifest has {num_classes} class_names"
        )
    return parts


def _checked_shards(
    folder: Path,
    manifest: "TokenManifest",
    split: str,
    shards: list[dict],
    num_tokens: int,
    text_names: Sequence[str],
) -> Iterator[ShardRows]:
    """Read shards one after the other and refuse indices that are no codes."""
    for shard in shards:
        path = folder / shard["file"]
        rows = read_shard(path, shard["num_rows"], shard["sha256"], text_names)
        if rows.texts:
            check_texts(path, rows.texts, manifest.text_width)
        lowest, highest = (rows.idx.min(), rows.idx.max()) if rows.idx.size else (0, 0)
        if rows.idx.shape[1] != num_tokens or lowest < 0 or highest >= manifest.vocab_size:
            raise ValueError(
                f"split {split!r} of {folder} has rows of {rows.idx.shape[1]} tokens from {lowest} to {highest}; "
                f"expected {num_tokens} tokens from 0 to {manifest.vocab_size - 1}"
            )
        yield rows


def _mapped_shards(
    folder: Path,
    manifest: "TokenManifest",
    split: str,
    shards: list[dict],
    num_tokens: int,
    text_names: Sequence[str],
) -> list[ShardRows]:
    """Map checked shards into memory, unpacked to one Arrow file of the cache: by one process, once for all."""
    import datasets

    features = datasets.Features(
        {
            "idx": datasets.List(datasets.Value(index_dtype(manifest.vocab_size)), length=num_tokens),
            "label": datasets.Value("int64"),
            "view": datasets.Value("int32"),
        }
    )
    if text_names:
        features.update(text_features(has_embeds=EMBEDS in text_names))
    name = "-".join([_state_of(folder, shards), *text_names])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "nextblock-tokens" / f"{name}.arrow"
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _turn(cache.with_suffix(".lock")):
            # The processes that waited for their turn find it done, unless the one before them was killed.
            if not cache.is_file():
                logger.info(f"unpacking split {split!r} of {folder} to {cache}, once for all processes")
                rows = _checked_shards(folder, manifest, split, shards, num_tokens, text_names)
                write_whole(cache, partial(_unpack, rows, features))
    table = datasets.Dataset.from_file(str(cache)).data.table
    return [
        ShardRows(
            batch.column(0).flatten().to_numpy(zero_copy_only=True).reshape(batch.num_rows, num_tokens),
            batch.column(1).to_numpy(zero_copy_only=True),
            batch.column(2).to_numpy(zero_copy_only=True),
            {name: batch.column(name) for name in text_names},
        )
        for batch in table.to_batches()
    ]


def _unpack(shards: Iterator[ShardRows], features: "datasets.Features", file: BinaryIO) -> None:
    """Write shards one after the other to a file that can be mapped."""
    import pyarrow as pa

    schema = features.arrow_schema
    with pa.ipc.new_stream(file, schema) as writer:
        for rows in shards:
            idx = pa.FixedSizeListArray.from_arrays(pa.array(rows.idx.reshape(-1)), rows.idx.shape[1])
            columns = [idx, pa.array(rows.class_labels), pa.array(rows.views), *rows.texts.values()]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait until no other process or thread is in here with the same file; it ends with its process."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _state_of(folder: Path, shards: list[dict]) -> str:
    """Hash what tells the shards' content apart: checksums, and sizes and times so that a changed file is noticed."""
    digest = hashlib.sha256()
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; its manifest lists it")
        status = path.stat()
        digest.update(f"{shard['sha256']} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
