"""Token folders: their manifest, and the data set that the prior reads.

A folder holds `manifest.json` and `data/<split>-00000-of-00003.parquet` files, one row an image and view.
Legend: B batch, L all tokens, V codes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextblock.files.atomic import write_text_whole
from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.regular import read_json

from .blocks import BlockLayout
from .captions import draw_captions
from .code_digits import CodeDigits
from .keyed_random import keyed_uniform
from .text_columns import CAPTION, EMBEDS, caption_embeds, padded_embeds
from .token_shards import index_dtype, open_rows

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class TokenManifest:
    """What a folder of tokens holds and which tokenizer made it."""

    layout: dict
    """`BlockLayout.to_dict()`."""
    vocab_size: int
    """V."""
    embedding_dim: int
    """C, the code channels of the tokenizer."""
    tokenizer_sha256: str
    """`model_fingerprint` of the tokenizer."""
    image_size: list[int]
    """[H, W] in pixels."""
    class_names: list[str]
    """Names by label; empty for unconditional data."""
    data: dict
    """The image source."""
    transform: dict
    """How augmented views were made."""
    num_augmented_views: int
    """Augmented copies of each training image, besides the original."""
    seed: int
    """Key of the augmentation."""
    views: list[str] = field(default_factory=list)
    """What the numbers in the column `view` mean."""
    min_image_side: int = 1
    """Images with a shorter side under this many pixels were rejected."""
    rows_per_shard: int = 0
    """Rows of a full shard, those of rejected images included."""
    encoding: dict = field(default_factory=dict)
    """What else the bits of the result depend on: device, precision, batch size, threads."""
    tokenizer_config: dict = field(default_factory=dict)
    """The tokenizer's configuration."""
    splits: dict[str, dict] = field(default_factory=dict)
    """Split → {"num_images", "num_rejected", "num_views", "source_sha256", "shards"}, the last a list of
    {"file", "num_rows", "sha256"}."""
    condition: str = ""
    """What the images are conditioned on: "text" where they have captions, else "class" or "none"."""
    text_encoder: dict = field(default_factory=dict)
    """What made the stored features of captions: {"name", "sha256", "width", "max_length"}; empty where none are."""
    code_bases: list[int] = field(default_factory=list)
    """Bases of the digits of an index, lowest first (`data.code_digits`), where the codebook is a product of smaller
    ones; empty where it is none, and in folders of versions that knew of none."""
    format_version: int = FORMAT_VERSION
    """Version of this format."""

    def __post_init__(self):
        # Manifests of versions without captions do not say.
        self.condition = self.condition or ("class" if self.class_names else "none")

    @property
    def text_names(self) -> list[str]:
        """Return the names of the columns of captions."""
        return [CAPTION, *([EMBEDS] if self.text_encoder else [])] if self.condition == "text" else []

    @property
    def text_width(self) -> int | None:
        """Return the channels of stored features; None where none are."""
        return self.text_encoder.get("width")

    def as_job(self) -> dict:
        """Return what tells a job from others; what came with captions or digits leaves no trace in jobs without."""
        left_out = {*(() if self.text_names else _TEXT_FIELDS), *(() if self.code_bases else ["code_bases"])}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder of tokens; it comes last, so a folder without one is unfinished."""
        write_text_whole(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TokenManifest":
        """Read a folder's manifest.

        Raises:
            ValueError: if there is none, it is damaged or of another format, or its fields are not what they must be.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{folder} has no {MANIFEST_NAME}; expected a folder that `nextblock tokenize` finished")
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds {type(found).__name__}; expected the manifest of a folder of tokens")
        if found.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {found.get('format_version')}; expected {FORMAT_VERSION}")
        try:
            _check_condition(found)
            _check_fields(found, {each.name: each.type for each in fields(cls)}, _required(cls))
            for split, entry in found.get("splits", {}).items():
                _check_split(entry, f"splits[{split!r}]")
            BlockLayout.from_dict(found["layout"])
            _check_codes(found["vocab_size"], found.get("code_bases", []))
        except ValueError as error:
            raise ValueError(f"{path} is no manifest of a folder of tokens: {error}") from error
        return cls(**found)

    def check_tokenizer(self, model: torch.nn.Module, folder: Path) -> None:
        """Refuse a tokenizer that did not make these tokens.

        Raises:
            ValueError: naming what differs.
        """
        expected = {
            "layout": self.layout,
            "vocab_size": self.vocab_size,
            "image_size": self.image_size,
            "weights": self.tokenizer_sha256,
        }
        digits = model.quantizer.digits
        got = {
            "layout": model.layout.to_dict(),
            "vocab_size": model.config.vocab_size,
            "image_size": list(model.config.image_size),
            "weights": model_fingerprint(model),
        }
        if self.code_bases:
            expected["code_bases"], got["code_bases"] = self.code_bases, list(digits.bases if digits else [])
        for name, value in expected.items():
            if got[name] != value:
                raise ValueError(
                    f"the tokenizer has {name} {got[name]}; expected {value}, of the tokenizer that made {folder}"
                )


# Fields that came with captions.
_TEXT_FIELDS = ("condition", "text_encoder")
_ENCODER_KINDS = {"name": str, "sha256": str, "width": int, "max_length": int}
# What a split and a shard of a manifest must say; the first version wrote no more.
_SPLIT_KINDS = {"num_images": int, "num_views": int, "shards": list[dict]}
_SHARD_KINDS = {"file": str, "num_rows": int, "sha256": str}
# The only whole number that may be negative.
_SIGNED = "seed"


def _check_condition(found: dict) -> None:
    """Refuse a condition that there is not, or a text encoder that is not described."""
    if found.get("condition", "none") not in ("class", "text", "none"):
        raise ValueError(f"condition is {found['condition']!r:.80}; expected 'class', 'text' or 'none'")
    encoder = found.get("text_encoder")
    if isinstance(encoder, dict) and encoder:
        _check_fields(encoder, _ENCODER_KINDS, set(_ENCODER_KINDS), "text_encoder")
        if not encoder["width"] or found.get("condition") != "text":
            raise ValueError(f"text_encoder is {encoder!r:.80}; expected a width of at least 1, and condition 'text'")


def _required(manifest_class: type) -> set[str]:
    """Return the names of the fields that every manifest has."""
    return {each.name for each in fields(manifest_class) if each.default is each.default_factory is MISSING}


def _check_fields(found: dict, kinds: Mapping[str, Any], required: set[str], where: str = "") -> None:
    """Refuse fields that are missing, unknown or of another kind."""
    for what, names in (("misses", required - found.keys()), ("has", found.keys() - kinds.keys())):
        if names:
            raise ValueError(f"{where or 'it'} {what} {', '.join(sorted(names))}; expected {', '.join(kinds)}")
    for name, value in found.items():
        if not _is_a(kinds[name], value, name == _SIGNED):
            kind = kinds[name] if get_origin(kinds[name]) else kinds[name].__name__
            expected = "a whole number of at least 0" if kinds[name] is int and name != _SIGNED else f"a {kind}"
            raise ValueError(f"{f'{where}.{name}' if where else name} is {value!r:.80}; expected {expected}")


def _is_a(kind: Any, value: Any, is_signed: bool = False) -> bool:
    """Tell whether a value read from JSON is of a kind, a count where that is int."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is int:
        return type(value) is int and (is_signed or value >= 0)
    if not isinstance(value, origin):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return not inner or all(_is_a(inner[-1], entry) for entry in entries)


def _check_codes(vocab_size: int, code_bases: list[int]) -> None:
    """Refuse more codes than shards can hold, and digits that do not make them."""
    index_dtype(vocab_size)
    if code_bases and CodeDigits(code_bases).num_codes != vocab_size:
        raise ValueError(f"code_bases is {code_bases}; expected bases that make {vocab_size} codes")


def _check_split(entry: dict, where: str) -> None:
    """Refuse a split that does not say what its readers need, or shards outside its folder."""
    optional = {"num_rejected": int, "source_sha256": str}
    _check_fields(entry, {**_SPLIT_KINDS, **optional}, set(_SPLIT_KINDS), where)
    if entry["num_views"] < 1:
        raise ValueError(f"{where}.num_views is {entry['num_views']}; expected at least 1")
    for number, shard in enumerate(entry["shards"]):
        _check_fields(shard, _SHARD_KINDS, set(_SHARD_KINDS), f"{where}.shards[{number}]")
        file = PurePosixPath(shard["file"])
        if file.is_absolute() or ".." in file.parts or "\0" in shard["file"]:
            raise ValueError(f"{where}.shards[{number}].file is {shard['file']!r}; expected a file in the folder")


class TokenDataset(Dataset):
    """The rows of one split, or one view of each image an epoch, memory-mapped where they are many.

    Args:
        folder: of tokens.
        split: name of the split.
        samples_views: give every image once an epoch, in a view drawn from (view_seed, epoch, image); otherwise every
            view of every image is a row of its own.
        view_seed: key of that draw, and of that of captions.
        reads_texts: whether a batch has captions, or the stored features of them.
        max_memory: a split of up to so many bytes is read into memory; a larger one is unpacked once into the cache
            folder of `datasets` (HF_DATASETS_CACHE), by one process while the others of the machine wait, and mapped
            from there by all.

    Raises:
        ValueError: if the split is not there or a shard does not fit the manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        samples_views: bool = False,
        view_seed: int = 0,
        reads_texts: bool = False,
        max_memory: int = 1 << 28,
    ):
        self._arguments = (folder, split, samples_views, view_seed, reads_texts, max_memory)
        folder = Path(folder)
        self.manifest = TokenManifest.load(folder)
        if split not in self.manifest.splits:
            raise ValueError(f"split is {split!r}; {folder} has the splits {list(self.manifest.splits)}")
        self.layout = BlockLayout.from_dict(self.manifest.layout)
        self.samples_views = samples_views
        self.view_seed = view_seed
        if reads_texts and self.manifest.condition != "text":
            raise ValueError(f"reads_texts is True; expected False for {folder}, whose images have no captions")
        self.reads_texts = reads_texts
        parts = open_rows(folder, self.manifest, split, max_memory, self.manifest.text_names if reads_texts else ())
        self._idx, self._texts = [part.idx for part in parts], [part.texts for part in parts]
        self.class_labels, views = (np.concatenate([part[column] for part in parts]) for column in (1, 2))
        self._starts = np.cumsum([0, *(len(part) for part in self._idx)])
        self.num_views = self.manifest.splits[split]["num_views"]
        if self.num_views > max(len(views), 1):
            raise ValueError(f"split {split!r} of {folder} has {len(views)} rows of {self.num_views} views")
        images_per_view = len(views) // self.num_views
        if samples_views and not np.array_equal(views, np.repeat(np.arange(self.num_views), images_per_view)):
            raise ValueError(f"split {split!r} of {folder} does not hold {self.num_views} views of every image in turn")
        self._length = images_per_view if samples_views else len(views)

    def __len__(self) -> int:
        return self._length

    def __reduce__(self):
        folder, split, samples_views, view_seed, reads_texts, max_memory = self._arguments
        options = {"samples_views": samples_views, "view_seed": view_seed, "max_memory": max_memory}
        options["reads_texts"] = reads_texts
        return partial(TokenDataset, **options), (folder, split)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Return one row as a batch of one; see `__getitems__`."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch of rows.

        Args:
            keys: numbers of rows, or of images where views are sampled; or (epoch, number) pairs.

        Returns:
            `labels` (B, L), `class_labels` (B,) and `index` (B,), all int64; `index` is what the keys say. Of captions,
            one an image drawn anew in every epoch: `text_embeds` (B, T, E) float16 and `text_mask` (B, T) bool, or
            where no features are stored `caption`, B texts.
        """
        index = np.array([key[1] if isinstance(key, tuple) else key for key in keys], np.int64)
        if not len(index) or not -self._length <= index.min() <= index.max() < self._length:
            raise IndexError(f"rows {index} are not all in 0..{self._length - 1}")
        index %= self._length
        rows = index
        epochs = np.array([key[0] if isinstance(key, tuple) else 0 for key in keys])
        if self.samples_views:
            rows = index + self._length * self._draw_views(epochs, index)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[parts]
        labels = np.empty((len(rows), self.layout.num_tokens), np.int64)
        for n, (part, place) in enumerate(zip(parts.tolist(), places.tolist(), strict=True)):
            labels[n] = self._idx[part][place]
        batch = {
            "labels": torch.from_numpy(labels),
            "class_labels": torch.from_numpy(self.class_labels[rows]),
            "index": torch.from_numpy(index),
        }
        if self.reads_texts:
            batch |= self._draw_texts(parts.tolist(), places.tolist(), epochs, index)
        return batch

    def _draw_texts(self, parts: list[int], places: list[int], epochs: np.ndarray, index: np.ndarray) -> dict:
        """Return one caption a row, or its features."""
        captions = [self._texts[part][CAPTION][place].as_py() for part, place in zip(parts, places, strict=True)]
        numbers = draw_captions([len(texts) for texts in captions], self.view_seed, epochs, index)
        if not self.manifest.text_encoder:
            return {"caption": [texts[number] for texts, number in zip(captions, numbers, strict=True)]}
        width = self.manifest.text_width
        drawn = [
            caption_embeds(self._texts[part], place, number, width)
            for part, place, number in zip(parts, places, numbers, strict=True)
        ]
        embeds, mask = padded_embeds(drawn)
        return {"text_embeds": torch.from_numpy(embeds), "text_mask": torch.from_numpy(mask)}

    def _draw_views(self, epochs: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return a view for each image, (B,) int64."""
        views = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs).tolist():
            is_here = epochs == epoch
            draws = keyed_uniform(self.view_seed, epoch, samples=torch.from_numpy(index[is_here]))
            views[is_here] = (draws.numpy() * self.num_views).astype(np.int64)
        return views


def collate_tokens(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass on what `TokenDataset.__getitems__` has already put together."""
    return batch
