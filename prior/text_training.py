"""Captions in the training of a prior: which encoder reads them, batches with its features, what stands for no text.

Legend: B batch, T text positions, E feature channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nextblock.data.tokens import TokenManifest
from nextblock.files.stored_model import StoredModel

from .text_encoder import TextEncoder


@dataclass(kw_only=True)
class TextConfig:
    """What of captions a prior is conditioned on."""

    encoder: str | None = None
    """Folder or hub repository of a text model of transformers, which encodes the captions; it is saved with the
    pipeline. null conditions on classes, if there are any."""
    max_length: int | None = None
    """Tokens of a caption that are read; the rest is cut off. null takes as many as the stored features have read;
    where none are stored 120, or all that the encoder has positions for."""
    null: Literal["learned", "empty"] = "learned"
    """What stands for no text, which guidance needs: a "learned" row of features (of a Llama prior a table that stays
    as it was drawn), or those of the "empty" text."""

    def __post_init__(self):
        if self.null not in ("learned", "empty"):
            raise ValueError(f"text.null is {self.null!r}; expected 'learned' or 'empty'")
        if self.encoder is None and (self.max_length, self.null) != (None, "learned"):
            raise ValueError(f"text is {self}; expected the defaults without text.encoder")


def text_length(config: TextConfig, tokens: str | None) -> int | None:
    """Return how many tokens of a caption a run reads; None leaves it to the encoder.

    Args:
        config: of the run.
        tokens: folder of tokens, which may have stored features; or None.
    """
    if config.max_length is not None:
        return config.max_length
    stored = {} if tokens is None else TokenManifest.load(Path(tokens)).text_encoder
    return stored.get("max_length")


class TextBatches:
    """Gives batches the features of their captions.

    Args:
        encoder: the text model, which is moved to the device.
        device: where batches are.
    """

    def __init__(self, encoder: TextEncoder, device: torch.device):
        self.encoder = encoder
        encoder.model.to(device)

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a batch with `text_embeds` (B, T, E), those that were stored, or made of its `text_ids`."""
        if "text_embeds" in batch:
            return batch
        return {**batch, "text_embeds": self.encoder.features(batch["text_ids"], batch["text_mask"])}


def collate_texts(collate: Callable, encoder: TextEncoder, items: list | dict) -> dict[str, Tensor]:
    """Make a batch whose captions are token ids.

    Args:
        collate: makes the rest of the batch.
        encoder: whose tokenizer reads the captions.
        items: of a data set that gives a `caption` each; or a batch with B of them.

    Returns:
        The batch with `text_ids` and `text_mask` (B, T), or with stored features as it came.
    """
    captions = [item["caption"] for item in items] if isinstance(items, list) else items.get("caption")
    batch = {name: value for name, value in collate(items).items() if name != "caption"}
    return batch if captions is None else batch | encoder.token_ids(captions)


def check_stored_texts(manifest: TokenManifest, encoder: TextEncoder) -> None:
    """Refuse tokens without captions, and features that another encoder made.

    Raises:
        ValueError: naming what differs.
    """
    if manifest.condition != "text":
        raise ValueError(
            f"text.encoder is given, and the tokens' condition is {manifest.condition!r}; expected tokens of captioned "
            "images (data.caption_column of `nextblock tokenize`)"
        )
    stored = manifest.text_encoder
    if stored and stored["sha256"] != encoder.fingerprint():
        raise ValueError(
            f"text.encoder is another than {stored['name']!r} (text_max_length {stored['max_length']}), whose features "
            f"are stored with the tokens; expected that one with text.max_length {stored['max_length']}"
        )


def text_sizes(encoder: TextEncoder, config: TextConfig) -> dict[str, int]:
    """Return the fields of a prior's configuration that an encoder decides.

    Raises:
        ValueError: if the empty text is to stand for no text, and has no token.
    """
    num_empty = 0
    if config.null == "empty":
        num_empty = encoder.token_ids([""])["text_ids"].shape[1]
        if not num_empty:
            raise ValueError("text.null is 'empty', and this tokenizer gives no token for it; expected 'learned'")
    sizes = {"text_dim": encoder.width, "max_text_positions": encoder.max_length}
    return sizes | {"num_empty_positions": num_empty}


@torch.no_grad()
def set_empty_text(model: StoredModel, encoder: TextEncoder) -> None:
    """Give a prior the features of the empty text, where they stand for no text."""
    if getattr(model.config, "num_empty_positions", 0):
        model.text_emb.empty_embeds.copy_(encoder.encode([""])[0][0])
