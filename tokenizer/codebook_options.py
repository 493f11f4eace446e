"""Which options of a tokenizer's configuration go with which codebook."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig

from nextblock.data.code_digits import MAX_CODES, CodeDigits

_MAX_BITS = MAX_CODES.bit_length() - 1
# What each option must be where it means nothing, and the codebooks that it means something for.
_NEUTRAL = {
    "fsq_levels": (None, ("fsq",)),
    "codebook_digits": (None, ("learned", "fsq", "lfq", "bsq")),
    "codebook_gradient": ("straight_through", ("learned", "simvq")),
    "beta": (0.25, ("learned", "simvq", "lfq", "bsq")),
    "codebook_update": ("gradient", ("learned",)),
    "codebook_ema_decay": (0.99, ("learned",)),
    "codebook_init": ("uniform", ("learned",)),
    "codebook_init_scale": (None, ("learned",)),
    "codebook_metric": ("euclidean", ("learned",)),
    "has_unit_codes": (False, ("learned",)),
    "revival_threshold": (0, ("learned",)),
}


def check_codebook(config: PreTrainedConfig) -> None:
    """Refuse options that the codebook has no use for, and sizes that are not its own.

    Args:
        config: a `VQVAEConfig` whose fields are each of their kind and within their range.

    Raises:
        ValueError: naming field, value and what was expected.
    """
    for field, (neutral, kinds) in _NEUTRAL.items():
        value = getattr(config, field)
        if value != neutral and config.codebook not in kinds:
            raise ValueError(f"{field} is {value!r}; expected {neutral!r} with codebook {config.codebook!r}")
    _check_index_gradient(config)
    if config.codebook in ("learned", "simvq", "gumbel"):
        if config.codebook_digits is not None:
            _check_product(config)
        return
    field, channels = _channels(config)
    for name, expected in {"embedding_dim": channels.num_digits, "vocab_size": channels.num_codes}.items():
        if getattr(config, name) != expected:
            raise ValueError(
                f"{name} is {getattr(config, name)}; expected {expected} with codebook {config.codebook!r} and "
                f"{field} {getattr(config, field)}"
            )
    if config.codebook_digits is not None:
        with _named("codebook_digits"):
            channels.sizes_of(_list(config.codebook_digits))


def _check_index_gradient(config: PreTrainedConfig) -> None:
    """Refuse what a gradient by index has no use for: codes that learn otherwise, similarities that are all alike."""
    if config.codebook_gradient != "index":
        return
    for field, expected in {"codebook_update": "gradient", "has_unit_codes": False}.items():
        if getattr(config, field) != expected:
            raise ValueError(
                f"{field} is {getattr(config, field)!r}; expected {expected!r} with codebook_gradient 'index'"
            )
    if config.codebook_metric == "cosine":
        raise ValueError("codebook_metric is 'cosine'; expected another one with codebook_gradient 'index'")


def _check_product(config: PreTrainedConfig) -> None:
    """Refuse tables whose codes do not make up V, or whose channels do not make up C."""
    with _named("codebook_digits"):
        tables = CodeDigits(_list(config.codebook_digits))
    given = f"with codebook_digits {config.codebook_digits}"
    if config.vocab_size != tables.num_codes:
        raise ValueError(f"vocab_size is {config.vocab_size}; expected {tables.num_codes}, their product, {given}")
    if config.embedding_dim % tables.num_digits:
        raise ValueError(
            f"embedding_dim is {config.embedding_dim}; expected a multiple of {tables.num_digits} {given}"
        )


def _channels(config: PreTrainedConfig) -> tuple[str, CodeDigits]:
    """Return the levels of a rule's channels, and the field that they follow from."""
    if config.codebook == "fsq":
        with _named("fsq_levels"):
            return "fsq_levels", CodeDigits(_list(config.fsq_levels))
    if config.embedding_dim > _MAX_BITS:
        raise ValueError(
            f"embedding_dim is {config.embedding_dim}; expected at most {_MAX_BITS} with codebook {config.codebook!r}, "
            "a bit each"
        )
    return "embedding_dim", CodeDigits((2,) * config.embedding_dim)


def _list(values) -> list:
    """Return a list as it is, and refuse anything else."""
    if not isinstance(values, list):
        raise ValueError(f"got {values!r:.80}; expected a list of whole numbers of at least 2")
    return values


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Let an error about digits' bases name the field that they were given by."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
