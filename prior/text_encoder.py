"""A frozen text model of transformers (T5's encoder, CLIP's text model, BERT and its kin) and the features it gives.

Legend: B texts, T positions of the longest text, E feature channels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nextblock.files.config_fields import refuse_code
from nextblock.files.fingerprints import model_fingerprint

# Sampled and stored alike: features that were computed and ones that were stored are the same numbers.
FEATURE_DTYPE = torch.float16
# As LlamaGen reads captions.
DEFAULT_LENGTH = 120


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text model with its tokenizer.

    Args:
        model: frozen, in a precision of its own.
        tokenizer: of the model.
        max_length: tokens of a text that are read; the rest is cut off.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __post_init__(self):
        longest = _num_positions(self.model, self.tokenizer)
        # Beside the marks that begin and end a text there is room for a token of it.
        least = self.tokenizer.num_special_tokens_to_add() + 1
        if not least <= self.max_length <= longest:
            expected = f"{least} to {longest}, the positions of this text encoder"
            raise ValueError(f"text_max_length is {self.max_length}; expected {expected}")

    @property
    def width(self) -> int:
        """E."""
        return self.model.config.hidden_size

    def token_ids(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts.

        Args:
            texts: B.

        Returns:
            `text_ids` (B, T) int64 and `text_mask` (B, T) bool, padded on the right.
        """
        return tokenize_texts(self.tokenizer, texts, self.max_length)

    def overlong(self, text: str) -> str:
        """Return what is cut off from a text; nothing from most."""
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[self.max_length - self.tokenizer.num_special_tokens_to_add() :])

    @torch.no_grad()
    def features(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            text_ids: (B, T) int64.
            text_mask: (B, T) bool.

        Returns:
            (B, T, E) in FEATURE_DTYPE, on the model's device; those of padding mean nothing.
        """
        device = self.model.device
        output = self.model(input_ids=text_ids.to(device), attention_mask=text_mask.to(device, torch.int64))
        return output.last_hidden_state.to(FEATURE_DTYPE)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            texts: B.

        Returns:
            Features (B, T, E) and mask (B, T) bool, on the model's device.

        Raises:
            ValueError: if a text has no token, or features are beyond FEATURE_DTYPE, or not finite.
        """
        tokens = self.token_ids(texts)
        is_empty = ~tokens["text_mask"].any(dim=1)
        if is_empty.any():
            text = texts[int(is_empty.int().argmax())]
            raise ValueError(f"the text encoder's tokenizer gives no token for {text!r:.80}; expected one at least")
        features = self.features(**tokens)
        mask = tokens["text_mask"].to(features.device)
        if not (features.isfinite() | ~mask[..., None]).all():
            raise ValueError(f"the text encoder gives features beyond {FEATURE_DTYPE} for {list(texts)!r:.200}")
        return features, mask

    def encode_each(self, texts: Sequence[str], batch_size: int = 64) -> list[np.ndarray]:
        """Encode texts of any number, a text once however often it occurs.

        Args:
            texts: any number.
            batch_size: texts encoded at a time, of about equal length.

        Returns:
            For each text its features (T, E) float16 without padding.
        """
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        by_text = {}
        for start in range(0, len(unique), batch_size):
            some = unique[start : start + batch_size]
            features, mask = self.encode(some)
            lengths = mask.sum(1).tolist()
            by_text |= {text: row[:n] for text, row, n in zip(some, features.cpu().numpy(), lengths, strict=True)}
        return [by_text[text] for text in texts]

    def fingerprint(self) -> str:
        """Hash all that features depend on: weights, tokenizer and length."""
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        spelled = repr(sorted(self.tokenizer.get_vocab().items())) if tokenizer is None else _spelled(tokenizer)
        parts = (model_fingerprint(self.model), spelled, str(self.max_length))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _spelled(tokenizer) -> str:
    """Write a fast tokenizer down without how it cut and filled up its last texts, which it remembers."""
    fresh = type(tokenizer).from_str(tokenizer.to_str())
    fresh.no_truncation()
    fresh.no_padding()
    return fresh.to_str()


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Tokenize texts, the tokens beyond a length cut off; see `TextEncoder.token_ids`."""
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, padding_side="right", return_tensors="pt"
    )
    return {"text_ids": tokens.input_ids, "text_mask": tokens.attention_mask.bool()}


@torch.no_grad()
def load_text_encoder(source: str, max_length: int | None, **options) -> TextEncoder:
    """Load a text model and its tokenizer.

    Args:
        source: a folder, or a repository of the hub.
        max_length: tokens of a text that are read; None for DEFAULT_LENGTH, or all that the model has positions for.
        options: of `from_pretrained`.

    Returns:
        The encoder, in the precision of its weights.

    Raises:
        ValueError: if its model encodes no text, its tokenizer lacks what it needs, or `max_length` is more than its
            positions.
    """
    options["trust_remote_code"] = False
    refuse_code(PreTrainedConfig.get_config_dict(source, **options)[0])
    config = AutoConfig.from_pretrained(source, **options)
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        model_class = AutoModelForTextEncoding
    else:
        model_class = CLIPTextModel if config.model_type == "clip" else AutoModel
    model, info = model_class.from_pretrained(source, dtype="auto", output_loading_info=True, **options)
    model = model.eval().requires_grad_(False)
    is_of_text = hasattr(model.config, "hidden_size") and getattr(model, "main_input_name", None) == "input_ids"
    # What the others of two stacks give is their decoder's.
    if not is_of_text or (model.config.is_encoder_decoder and model_class is AutoModel):
        raise ValueError(f"{source!r} is a {type(model).__name__}; expected a model that encodes text")
    # Features are not the pooler's, which models for other tasks come without.
    drawn = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if drawn:
        lacking = f"lacks {len(drawn)} tensors of a {type(model).__name__}: {drawn[:8]}"
        raise ValueError(f"the file of {source!r} {lacking}; expected the weights of a trained model")
    for name in info["missing_keys"]:
        # Drawn at random, it would make another fingerprint of every load.
        model.get_parameter(name).zero_()
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {source!r} has no pad_token; expected one, by which texts are filled up")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{source!r} has no vocabulary of its tokenizer; expected its files beside the model's")
    if max_length is None:
        max_length = min(DEFAULT_LENGTH, _num_positions(model, tokenizer))
    return TextEncoder(model=model, tokenizer=tokenizer, max_length=max_length)


def _num_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens of a text that a model and its tokenizer are made for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa's table has rows that no position takes.
    return min([tokenizer.model_max_length, *([positions] if isinstance(positions, int) else [])])
