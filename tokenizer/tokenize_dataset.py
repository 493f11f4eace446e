"""Turn images into token shards.

accelerate launch -m nextblock.tokenizer.tokenize_dataset --config tokenizer/tokenize-digits --tokenizer DIR …
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, ImageSource, collate, load_source
from nextblock.data.tokens import MANIFEST_NAME, TokenManifest, tokenizer_fingerprint, write_shard
from nextblock.training.checkpoint import file_sha256
from nextblock.training.config import parse_run_config
from nextblock.training.processes import connect_processes

from .modeling_vqvae import VQVAE


@dataclass(kw_only=True)
class TokenizeConfig:
    """Encode the training and held-out images of a data set into Parquet shards of indices."""

    tokenizer: str
    """Folder of the tokenizer."""
    output_dir: str
    """Folder of the shards and their manifest."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Where images come from; the held-out split is encoded too."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How the augmented views of training images are made; the original is always a plain center crop."""
    num_augmented_views: int = 0
    """Augmented copies of each training image, besides the original."""
    rows_per_shard: int = 65536
    """Rows of a full shard."""
    batch_size: int = 128
    """Images encoded at a time by each process."""
    num_workers: int = 0
    """Processes that decode images, for each encoding process; 0 decodes in the encoding process."""
    seed: int = 0
    """Key of the augmentation."""
    cpu: bool = False
    """Encode on the CPU even where there is a GPU."""

    def __post_init__(self):
        for name in ("rows_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("num_augmented_views", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.num_augmented_views and not self.transform.is_random:
            raise ValueError(
                f"num_augmented_views is {self.num_augmented_views} but transform changes nothing at random; "
                "expected 0 views, or a transform"
            )


class ViewDataset(Dataset):
    """The rows of a split, view by view: row r is image r mod N in view r div N; view 0 is the plain center crop.

    Args:
        originals: the images without augmentation, N of them.
        augmented: the same images with augmentation; view v is its epoch v.
        num_views: views of each image.
    """

    def __init__(self, originals: ImageDataset, augmented: ImageDataset, num_views: int):
        self.originals = originals
        self.augmented = augmented
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.originals) * self.num_views

    def __getitem__(self, row: int) -> dict:
        view, index = divmod(row, len(self.originals))
        return self.augmented[(view, index)] if view else self.originals[index]


def tokenize(config: TokenizeConfig) -> None:
    """Encode a data set, each process its own shards, and write the manifest once all are there.

    Args:
        config: the job.

    Raises:
        ValueError: if the output folder holds a finished job, or the configuration or data does not fit.
    """
    state = connect_processes(config.cpu)
    folder = Path(config.output_dir)
    if (folder / MANIFEST_NAME).exists():
        raise ValueError(f"output_dir {folder} already holds tokens; expected a new folder")
    model = VQVAE.from_pretrained(config.tokenizer, dtype=torch.float32).to(state.device).eval()
    train_source = load_source(config.data, config.data.split)
    sources = {config.data.split: train_source}
    if config.data.eval_split is not None:
        sources[config.data.eval_split] = load_source(config.data, config.data.eval_split)
    if state.is_main_process:
        (folder / "data").mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    manifest = TokenManifest(
        layout=model.layout.to_dict(),
        vocab_size=model.config.vocab_size,
        embedding_dim=model.config.embedding_dim,
        tokenizer_sha256=tokenizer_fingerprint(model),
        image_size=list(model.config.image_size),
        class_names=train_source.class_names,
        data=asdict(config.data),
        transform=asdict(config.transform),
        num_augmented_views=config.num_augmented_views,
        seed=config.seed,
    )
    for split, source in sources.items():
        num_views = 1 + config.num_augmented_views if split == config.data.split else 1
        files = _encode_split(config, state, model, source, split, num_views)
        state.wait_for_everyone()
        manifest.splits[split] = {
            "num_images": len(source),
            "num_views": num_views,
            "shards": [
                {"file": str(path.relative_to(folder)), "num_rows": num_rows, "sha256": file_sha256(path)}
                for path, num_rows in files
            ],
        }
    if state.is_main_process:
        manifest.save(folder)
        totals = {split: sum(s["num_rows"] for s in entry["shards"]) for split, entry in manifest.splits.items()}
        print(f"{folder}: " + ", ".join(f"{n} rows of {split}" for split, n in totals.items()))
    state.wait_for_everyone()


def _encode_split(
    config: TokenizeConfig, state: PartialState, model: VQVAE, source: ImageSource, split: str, num_views: int
) -> list[tuple[Path, int]]:
    """Write this process's shards of a split and return the names and rows of all processes' shards."""
    image_size = model.config.image_size
    views = ViewDataset(
        ImageDataset(source, image_size, TransformConfig(), config.seed),
        ImageDataset(source, image_size, config.transform, config.seed),
        num_views,
    )
    starts = range(0, len(views), config.rows_per_shard)
    files = []
    for shard, start in enumerate(starts):
        rows = range(start, min(start + config.rows_per_shard, len(views)))
        name = f"{split}-{shard:05d}-of-{len(starts):05d}.parquet"
        files.append((Path(config.output_dir) / "data" / name, len(rows)))
        if shard % state.num_processes == state.process_index:
            idx, class_labels = _encode_rows(config, state, model, views, rows, name)
            row_views, row_images = np.divmod(np.array(rows), len(source))
            write_shard(
                files[-1][0],
                idx,
                class_labels,
                [source.identifier(int(index)) for index in row_images],
                row_views,
                source.class_names,
                model.config.vocab_size,
            )
    return files


def _encode_rows(
    config: TokenizeConfig, state: PartialState, model: VQVAE, views: ViewDataset, rows: range, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (N, L) and labels (N,) of a range of rows."""
    loader = DataLoader(
        Subset(views, rows),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=state.device.type == "cuda",
    )
    idx, class_labels = [], []
    for batch in tqdm(loader, desc=name, disable=not state.is_local_main_process, mininterval=1.0):
        idx_Bl = model.img_to_idxBl(batch["pixel_values"].to(state.device, non_blocking=True))
        idx.append(model.layout.join(idx_Bl).cpu().numpy())
        class_labels.append(batch["class_labels"].numpy())
    return np.concatenate(idx), np.concatenate(class_labels)


def main() -> None:
    """Read the command line and encode."""
    tokenize(parse_run_config(TokenizeConfig, prog="python -m nextblock.tokenizer.tokenize_dataset"))


if __name__ == "__main__":
    main()
