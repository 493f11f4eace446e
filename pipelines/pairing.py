"""Whether a pipeline's tokenizer is the one whose tokens its prior has learned: priors keep its fingerprint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from nextblock.data.given import check_offers
from nextblock.files.fingerprints import model_fingerprint
from nextblock.prior.family import check_prior, check_quantizer

logger = logging.getLogger(__name__)


TOKENIZER_PARTS = ("quantizer", "layout", "config", "img_to_idx", "decode")


def check_components(
    tokenizer: PreTrainedModel, prior: PreTrainedModel, card, is_required, condition_parts: Sequence[str], expected: str
) -> None:
    """Refuse what is no tokenizer or no prior, such as one in the other's place, or two that do not fit.

    Args:
        tokenizer, prior, card: of the pipeline.
        is_required: `requires_own_tokenizer` of the pipeline.
        condition_parts: what conditions of the kind that the pipeline gives offer.
        expected: the kind, for the message.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """
    check_offers("tokenizer", tokenizer, TOKENIZER_PARTS, "a VQVAE")
    check_prior(prior)
    check_offers("prior.conditions", prior.conditions, condition_parts, expected)
    check_quantizer(prior, tokenizer.quantizer)
    if not isinstance(card, Mapping | None):
        raise ValueError(f"card is {card!r:.80}; expected a dict, or None")
    if not isinstance(is_required, bool):
        raise ValueError(f"requires_own_tokenizer is {is_required!r:.80}; expected True or False")


def check_pair(prior: PreTrainedModel, tokenizer: PreTrainedModel, is_required: bool) -> None:
    """Warn of a tokenizer that is not the one that made the tokens of a prior, or refuse it.

    There is no warning where it cannot be known: the prior, of an older version say, knows no fingerprint, or the
    tokenizer has been rounded to half precision. It takes about half a second for 100 million parameters.

    Args:
        prior: its configuration may have a `tokenizer_fingerprint`.
        tokenizer: that is to decode its tokens.
        is_required: whether another tokenizer, or a prior that knows none, is an error.

    Raises:
        ValueError: naming both fingerprints, or saying that the prior knows none.
    """
    expected = getattr(prior.config, "tokenizer_fingerprint", None)
    if expected is None and is_required:
        raise ValueError("requires_own_tokenizer is True; expected False: the prior's tokenizer_fingerprint is None")
    if expected is None or not _is_in_float32(tokenizer):
        return
    found = model_fingerprint(tokenizer)
    if found == expected or _is_rounded(tokenizer):
        return
    message = (
        f"the tokenizer of this pipeline has the fingerprint {found}; expected {expected}, of the tokenizer whose "
        "tokens the prior has learned: pictures may be of anything"
    )
    if is_required:
        raise ValueError(f"requires_own_tokenizer is true: {message}")
    logger.warning(message)


def check_stored_pair(pipe: DiffusionPipeline, folder: str | Path, options: Mapping) -> None:
    """Compare as `check_pair` does where a tokenizer was loaded in half precision: by its weights as they are stored.

    Args:
        pipe: that has just been loaded.
        folder: where from.
        options: of the loading, `requires_own_tokenizer` among them.

    Raises:
        ValueError: as `check_pair`.
    """
    prior, tokenizer = pipe.prior, pipe.tokenizer
    is_given = options.get("tokenizer") is not None
    if is_given or getattr(prior.config, "tokenizer_fingerprint", None) is None or _is_in_float32(tokenizer):
        return
    place, variant = Path(folder) / "tokenizer", options.get("variant")
    stored = type(tokenizer).from_pretrained(place, dtype=torch.float32, variant=variant, use_safetensors=True)
    check_pair(prior, stored, options.get("requires_own_tokenizer", False))


def _is_in_float32(model: PreTrainedModel) -> bool:
    """Tell whether a model's numbers are at hand, and as they are when it is fingerprinted."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return all(tensor.dtype == torch.float32 and not tensor.is_meta for tensor in tensors)


def _is_rounded(model: PreTrainedModel) -> bool:
    """Tell whether all numbers of a model that half precision does not spare are such as half precision has."""
    spared = tuple(f"{name}." for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    rounded = [
        tensor
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(spared)
    ]
    return any(
        all(torch.equal(tensor, tensor.to(dtype).float()) for tensor in rounded)
        for dtype in (torch.bfloat16, torch.float16)
    )
