"""What a prior learns from: the shards of a tokenization job, or images that the tokenizer encodes at every step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, ImageSource, collate
from nextblock.data.tokens import TokenDataset, TokenManifest, collate_tokens


@dataclass(kw_only=True)
class PriorData:
    """Rows to train on and rows held out."""

    train: Dataset
    """Takes lists of (epoch, index) keys."""
    heldout: Dataset | None
    """Takes lists of indices; None where nothing is held out."""
    collate: Callable[[list], dict[str, Tensor]]
    """Makes a batch with `class_labels`, `index`, and either `labels` (indices) or `pixel_values`."""
    class_names: list[str]
    """Names by label; empty for unconditional data."""

    def first_rows(self, num_rows: int) -> dict[str, Tensor]:
        """Return a batch of the first training rows, at most `num_rows`."""
        keys = [(0, index) for index in range(min(num_rows, len(self.train)))]
        return self.collate(self.train.__getitems__(keys))


def token_data(folder: str, tokenizer: PreTrainedModel, samples_views: bool = False, seed: int = 0) -> PriorData:
    """Open token shards.

    Args:
        folder: of the shards.
        tokenizer: in float32; must be the one that made them.
        samples_views: whether a training row is an image in a view drawn anew in every epoch, and not one view.
        seed: key of the views drawn.

    Raises:
        ValueError: if the shards are damaged, or another tokenizer made them.
    """
    manifest = TokenManifest.load(Path(folder))
    manifest.check_tokenizer(tokenizer, Path(folder))
    heldout = manifest.data["eval_split"]
    return PriorData(
        train=TokenDataset(folder, manifest.data["split"], samples_views=samples_views, view_seed=seed),
        heldout=None if heldout is None else TokenDataset(folder, heldout),
        collate=collate_tokens,
        class_names=manifest.class_names,
    )


def image_data(
    config: ImageDataConfig,
    transform: TransformConfig,
    seed: int,
    image_size: tuple[int, int],
    open_images: Callable[[str], ImageSource],
) -> PriorData:
    """Open images.

    Args:
        config: where they are.
        transform: how training images are varied, anew in every epoch; held-out images are not.
        seed: key of the augmentation.
        image_size: (H, W) of the tokenizer.
        open_images: opens a split, see `nextblock.training.usable_images.open_training_images`.

    Raises:
        ValueError: if the images are missing or unusable.
    """
    source, heldout = open_images(config.split), None
    if config.eval_split is not None:
        heldout = ImageDataset(open_images(config.eval_split), image_size, TransformConfig(), seed)
    return PriorData(
        train=ImageDataset(source, image_size, transform, seed),
        heldout=heldout,
        collate=collate,
        class_names=source.class_names,
    )
