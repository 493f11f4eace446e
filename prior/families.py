"""The families of priors that a training chooses from, and each one's options."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from functools import reduce
from operator import or_
from typing import Any, Literal

from transformers import PreTrainedConfig

from nextblock.files.stored_model import StoredModel
from nextblock.training.run_config import given_options, options_dataclass

from .modeling_block_prior import BlockPrior
from .modeling_gpt_prior import GPTPrior
from .modeling_llama_prior import LlamaPrior
from .modeling_rar_prior import RARPrior

FAMILIES: dict[str, type[StoredModel]] = {
    "block": BlockPrior,
    "llama": LlamaPrior,
    "rar": RARPrior,
    "gpt": GPTPrior,
}
# What tokens and captions decide is no option of a run.
_OF_THE_DATA = ("layout", "vocab_size", "embedding_dim", "num_classes", "class_names", "tokenizer_fingerprint")
_OF_THE_DATA += ("code_bases", "text_dim", "max_text_positions", "num_empty_positions")
_ABOUT = (
    'kind of prior, which has the other options: "block" predicts blocks of tokens at once (VAR); one token at a time '
    'do "llama" (LlamaGen), "gpt" (taming-transformers) and "rar" (RAR, in any order)'
)


def _options(family: str) -> type:
    """Make the dataclass of a family's options."""
    config_class = FAMILIES[family].config_class
    names = inspect.signature(config_class).parameters
    kind = "family", Literal[tuple(FAMILIES)], family, _ABOUT
    return options_dataclass(config_class, exclude=[name for name in _OF_THE_DATA if name in names], kind=kind)


OPTIONS = {family: _options(family) for family in FAMILIES}
BlockPriorOptions = OPTIONS["block"]
PriorOptions = reduce(or_, OPTIONS.values())
"""Of any family: a command line chooses by `family`."""


def check_family(options: PriorOptions) -> None:
    """Refuse options of one family that say they are another's.

    Raises:
        ValueError: naming both.
    """
    if type(options) is not OPTIONS.get(options.family):
        raise ValueError(f"model.family is {options.family!r}; expected that of {type(options).__name__}")


def family_config(options: PriorOptions, **tokens: Any) -> PreTrainedConfig:
    """Make the configuration of a prior.

    Args:
        options: of its family.
        tokens: what the tokens decide by name: `layout`, `vocab_size`, … and what of it no family but another needs.

    Raises:
        ValueError: if the options do not go together.
    """
    check_family(options)
    config_class = FAMILIES[options.family].config_class
    names = inspect.signature(config_class).parameters
    _check_texts(options.family, names, tokens)
    own = {name: value for name, value in asdict(options).items() if name != "family"}
    return config_class(**{name: value for name, value in tokens.items() if name in names}, **own)


def _check_texts(family: str, names: Collection[str], tokens: Mapping[str, Any]) -> None:
    """Refuse to condition a family on texts that it does not take, or to say nothing in a way that it does not."""
    if tokens.get("text_dim") is not None and "text_dim" not in names:
        expected = "one that takes texts, such as 'block'"
        raise ValueError(f"model.family is {family!r} with text.encoder; expected {expected}")
    if tokens.get("num_empty_positions") and "num_empty_positions" not in names:
        raise ValueError(f"text.null is 'empty'; expected 'learned' for model.family {family!r}")


def of_stored_family(options: PriorOptions, model_types: Collection[str]) -> PriorOptions:
    """Choose the family of a prior that a training starts from, unless one was given.

    Args:
        options: as given.
        model_types: of the models that there are to start from.

    Returns:
        The options, of the family that there is, if no family was given and it has all options that were.
    """
    given = given_options(options)
    stored = [f for f, model_class in FAMILIES.items() if model_class.config_class.model_type in model_types]
    if "family" in given or not stored:
        return options
    options_class = OPTIONS[stored[0]]
    if given.keys() - {field.name for field in fields(options_class)}:
        return options
    chosen = options_class(**given)
    chosen.given = frozenset(given)
    return chosen
