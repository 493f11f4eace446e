"""Token shards: what tokenization jobs write and the prior reads.

A folder holds `manifest.json` and `data/<split>-00000-of-00003.parquet` files, one row an image and view.
Legend: N rows, L all tokens, V codes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .blocks import BlockLayout

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


def tokenizer_fingerprint(model: torch.nn.Module) -> str:
    """Hash everything of a tokenizer that its tokens depend on.

    Args:
        model: the tokenizer; half-precision weights give another hash than float32 ones.

    Returns:
        A hexadecimal SHA-256 over architecture, names, dtypes, shapes and values.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_diff_dict().items() if not k.startswith(("_", "transformers"))}
    for irrelevant in ("architectures", "dtype"):
        config.pop(irrelevant, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def index_dtype(vocab_size: int) -> str:
    """Return the narrowest Parquet type for indices: "uint16", or "uint32" for more than 65 536 codes."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


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
    """`tokenizer_fingerprint` of the tokenizer."""
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
    splits: dict[str, dict] = field(default_factory=dict)
    """Split → {"num_images", "num_views", "shards": [{"file", "num_rows", "sha256"}]}."""
    format_version: int = FORMAT_VERSION
    """Version of this format."""

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder of tokens; it comes last, so a folder without one is unfinished."""
        from nextblock.training.checkpoint import write_atomically

        write_atomically(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> "TokenManifest":
        """Read a folder's manifest.

        Raises:
            ValueError: if there is none, or it is of another format.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(f"{folder} has no {MANIFEST_NAME}; expected a folder that tokenize_dataset finished")
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {fields.get('format_version')}; expected {FORMAT_VERSION}")
        return cls(**fields)

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
        got = {
            "layout": model.layout.to_dict(),
            "vocab_size": model.config.vocab_size,
            "image_size": list(model.config.image_size),
            "weights": tokenizer_fingerprint(model),
        }
        for name, value in expected.items():
            if got[name] != value:
                raise ValueError(
                    f"the tokenizer has {name} {got[name]}; expected {value}, of the tokenizer that made {folder}"
                )


class TokenDataset(Dataset):
    """The rows of one split, held in memory as one integer array.

    Args:
        folder: of tokens.
        split: name of the split.

    Raises:
        ValueError: if the split is not there or a shard does not fit the manifest.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        self.manifest = TokenManifest.load(folder)
        if split not in self.manifest.splits:
            raise ValueError(f"split is {split!r}; {folder} has the splits {list(self.manifest.splits)}")
        listed = self.manifest.splits[split]["shards"]
        shards = [_read_shard(folder / shard["file"], shard["num_rows"], shard["sha256"]) for shard in listed]
        self.idx = np.concatenate([idx for idx, _ in shards])
        self.class_labels = np.concatenate([labels for _, labels in shards])
        self.layout = BlockLayout.from_dict(self.manifest.layout)
        num_tokens, V = self.layout.num_tokens, self.manifest.vocab_size
        if self.idx.shape[1] != num_tokens or self.idx.max() >= V:
            raise ValueError(
                f"split {split!r} of {folder} has rows of {self.idx.shape[1]} tokens up to {self.idx.max()}; "
                f"expected {num_tokens} tokens under {V}"
            )

    def __len__(self) -> int:
        return len(self.idx)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Return one row as a batch of one; see `__getitems__`."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch of rows.

        Args:
            keys: row numbers, or (epoch, row number) pairs.

        Returns:
            `labels` (B, L), `class_labels` (B,) and `index` (B,), all int64.
        """
        rows = np.array([key[1] if isinstance(key, tuple) else key for key in keys])
        return {
            "labels": torch.from_numpy(self.idx[rows].astype(np.int64)),
            "class_labels": torch.from_numpy(self.class_labels[rows]),
            "index": torch.from_numpy(rows),
        }


def collate_tokens(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Pass on what `TokenDataset.__getitems__` has already put together."""
    return batch


def _read_shard(path: Path, num_rows: int, sha256: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard's indices (N, L) and labels (N,)."""
    import pyarrow.parquet as pq

    from nextblock.training.checkpoint import file_sha256

    if not path.is_file():
        raise ValueError(f"shard {path} is missing; its manifest lists it")
    if file_sha256(path) != sha256:
        raise ValueError(f"shard {path} has changed since it was written; expected the checksum of its manifest")
    table = pq.read_table(path, columns=["idx", "label"]).combine_chunks()
    if table.num_rows != num_rows:
        raise ValueError(f"shard {path} has {table.num_rows} rows; expected {num_rows} as in its manifest")
    flat = table["idx"].combine_chunks().flatten().to_numpy()
    return flat.reshape(num_rows, -1), table["label"].to_numpy().astype(np.int64)


def write_shard(
    path: Path,
    idx: np.ndarray,
    class_labels: np.ndarray,
    image_ids: Sequence[str],
    views: np.ndarray,
    class_names: Sequence[str],
    vocab_size: int,
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
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features, List, Value

    from nextblock.training.checkpoint import flush_to_disk

    dtype = index_dtype(vocab_size)
    features = Features(
        {
            "idx": List(Value(dtype)),
            "label": ClassLabel(names=list(class_names)) if class_names else Value("int64"),
            "image_id": Value("string"),
            "view": Value("int32"),
        }
    )
    N, L = idx.shape
    offsets = pa.array(np.arange(0, (N + 1) * L, L, dtype=np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(idx.astype(dtype).reshape(-1))),
        pa.array(class_labels.astype(np.int64)),
        pa.array(list(image_ids), pa.string()),
        pa.array(views.astype(np.int32)),
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema), temporary)
    flush_to_disk(temporary)
    temporary.replace(path)
