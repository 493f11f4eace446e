"""What a shard of tokens holds of its images' captions: the texts, and where a job stores them their features.

Legend: N rows, M captions of a row, T positions of a caption, E feature channels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

CAPTION, EMBEDS = "caption", "text_embeds"


def text_features(*, has_embeds: bool) -> dict:
    """Return the columns' types as `datasets` has them.

    Args:
        has_embeds: whether features are stored too.
    """
    from datasets import List, Value

    columns = {CAPTION: List(Value("string"))}
    return columns | {EMBEDS: List(List(Value("float16")))} if has_embeds else columns


def text_arrays(
    captions: Sequence[Sequence[str]], embeds: Sequence[Sequence[np.ndarray]] | None
) -> list["pa.ListArray"]:
    """Make the columns.

    Args:
        captions: M texts for each of N rows.
        embeds: for each of them its features (T, E) float16; None stores none.

    Returns:
        The arrays in the order of `text_features`.
    """
    import pyarrow as pa

    arrays = [pa.array([list(texts) for texts in captions], pa.list_(pa.string()))]
    if embeds is not None:
        by_caption = [features for row in embeds for features in row]
        values = np.concatenate([np.zeros(0, np.float16), *(features.reshape(-1) for features in by_caption)])
        ends = np.cumsum([0, *(features.size for features in by_caption)], dtype=np.int32)
        inner = pa.ListArray.from_arrays(pa.array(ends), pa.array(values, pa.float16()))
        arrays.append(pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, embeds)], dtype=np.int32)), inner))
    return arrays


def check_texts(path: Path, texts: dict[str, "pa.ListArray"], width: int | None) -> None:
    """Refuse columns that are no captions, or features that do not belong to them.

    Args:
        path: of the shard.
        texts: its columns by name.
        width: E; None where no features are stored.

    Raises:
        ValueError: naming the shard and the column.
    """
    import pyarrow.types as kinds

    captions = texts[CAPTION]
    kind = captions.type
    is_text = kinds.is_list(kind) and (kinds.is_string(kind.value_type) or kinds.is_large_string(kind.value_type))
    if not is_text or captions.null_count or captions.flatten().null_count:
        raise ValueError(f"shard {path}: column {CAPTION} holds {kind}; expected lists of texts, and no nulls")
    counts = np.diff(captions.offsets.to_numpy())
    if len(counts) and not counts.min():
        raise ValueError(f"shard {path} has rows without a caption; expected at least one in every row")
    if width is None:
        return
    embeds = texts[EMBEDS]
    kind = embeds.type
    is_nested = kinds.is_list(kind) and kinds.is_list(kind.value_type)
    if not is_nested or not kinds.is_float16(kind.value_type.value_type) or embeds.flatten().null_count:
        raise ValueError(f"shard {path}: column {EMBEDS} holds {kind}; expected lists of lists of float16, no nulls")
    sizes = np.diff(embeds.flatten().offsets.to_numpy())
    is_each = np.array_equal(counts, np.diff(embeds.offsets.to_numpy()))
    if not is_each or np.any(sizes % width) or np.any(sizes < width):
        expected = f"features of {width} channels for each caption, as the manifest says of its text encoder"
        raise ValueError(f"shard {path}: column {EMBEDS} holds others; expected {expected}")


def caption_embeds(texts: dict[str, "pa.ListArray"], row: int, number: int, width: int) -> np.ndarray:
    """Return the features of a caption.

    Args:
        texts: the columns of some rows.
        row: which of them.
        number: which of its captions.
        width: E.

    Returns:
        (T, E) float16.
    """
    return texts[EMBEDS][row].values[number].values.to_numpy(zero_copy_only=True).reshape(-1, width)


def padded_embeds(features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad features of several lengths on the right.

    Args:
        features: B arrays (T, E).

    Returns:
        (B, T, E) of the longest T, zeros behind shorter ones, and (B, T) whether a position is one of the text.
    """
    lengths = np.array([len(each) for each in features])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.zeros((*mask.shape, features[0].shape[1]), features[0].dtype)
    for row, each in zip(padded, features, strict=True):
        row[: len(each)] = each
    return padded, mask
