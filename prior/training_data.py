"""What a prior learns from: the shards of a tokenization job, or images that the tokenizer encodes at every step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, ImageSource, collate
from nextblock.data.tokens import TokenDataset, TokenManifest, collate_tokens

from .text_encoder import TextEncoder
from .text_training import check_stored_texts, collate_texts


@dataclass(kw_only=True)
class PriorData:
    """Rows to train on and rows held out."""

    train: Dataset
    """Takes lists of (epoch, index) keys."""
    heldout: Dataset | None
    """Takes lists of indices; None where nothing is held out."""
    collate: Callable[[list], dict[str, Tensor]]
    """Makes a batch with `class_labels`, `index`, and either `labels` (indices) or `pixel_values`; of captions also
    `text_mask` and either `text_embeds` or `text_ids`."""
    class_names: list[str]
    """Names by label; empty for unconditional data."""

    def first_rows(self, num_rows: int, *, are_held_out: bool = False) -> dict[str, Tensor]:
        """Return a batch of the first training rows, at most `num_rows`, or of those held out where there are some."""
        rows = self.heldout if are_held_out and self.heldout is not None else self.train
        return self.collate(rows.__getitems__([(0, index) for index in range(min(num_rows, len(rows)))]))


def token_data(
    folder: str,
    tokenizer: PreTrainedModel,
    samples_views: bool = False,
    seed: int = 0,
    encoder: TextEncoder | None = None,
) -> PriorData:
    """Open token shards.

    Args:
        folder: of the shards.
        tokenizer: in float32; must be the one that made them.
        samples_views: whether a training row is an image in a view drawn anew in every epoch, and not one view.
        seed: key of the views and captions drawn.
        encoder: reads captions; None leaves them alone.

    Raises:
        ValueError: if the shards are damaged, another tokenizer made them, or there are no captions that the encoder
            reads, or has read.
    """
    manifest = TokenManifest.load(Path(folder))
    manifest.check_tokenizer(tokenizer, Path(folder))
    if encoder is not None:
        check_stored_texts(manifest, encoder)
    heldout, options = manifest.data["eval_split"], {"view_seed": seed, "reads_texts": encoder is not None}
    return PriorData(
        train=TokenDataset(folder, manifest.data["split"], samples_views=samples_views, **options),
        heldout=None if heldout is None else TokenDataset(folder, heldout, **options),
        collate=collate_tokens if encoder is None else partial(collate_texts, collate_tokens, encoder),
        class_names=manifest.class_names,
    )


def image_data(
    config: ImageDataConfig,
    transform: TransformConfig,
    seed: int,
    image_size: tuple[int, int],
    open_images: Callable[[str], ImageSource],
    encoder: TextEncoder | None = None,
) -> PriorData:
    """Open images.

    Args:
        config: where they are.
        transform: how training images are varied, anew in every epoch; held-out images are not.
        seed: key of the augmentation.
        image_size: (H, W) of the tokenizer.
        open_images: opens a split, see `nextblock.training.usable_images.open_training_images`.
        encoder: reads captions; None leaves them alone.

    Raises:
        ValueError: if the images are missing or unusable, or have no captions to read.
    """
    if encoder is not None and config.caption_column is None:
        raise ValueError("text.encoder is given, and data.caption_column is null; expected where the captions are")
    source, heldout, options = open_images(config.split), None, {"gives_captions": encoder is not None}
    if config.eval_split is not None:
        heldout = ImageDataset(open_images(config.eval_split), image_size, TransformConfig(), seed, **options)
    return PriorData(
        train=ImageDataset(source, image_size, transform, seed, **options),
        heldout=heldout,
        collate=collate if encoder is None else partial(collate_texts, collate, encoder),
        class_names=source.class_names,
    )
