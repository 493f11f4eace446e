"""Fields of a model's configuration, saved by anybody: unknown ones, numbers outside their range, and code."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

# No model of this size has been trained; what asks for more is a mistake.
MAX_PARAMETERS = 10**12

# What transformers, diffusers and peft write or pass besides the fields of the base class.
_OF_LIBRARIES = {
    "adapters",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


def refuse_unknown_fields(config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> None:
    """Refuse names that neither a configuration nor transformers knows, and values of theirs that they stumble over.

    Args:
        config_class: whose `__init__` names its fields.
        given: the fields besides these; those that begin with an underscore are a library's.

    Raises:
        ValueError: naming all that are unknown; or one that names code of another repository, no dtype, or no options.
    """
    refuse_code(given)
    for name in ("dtype", "torch_dtype"):
        value = given.get(name)
        if isinstance(value, str) and not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
            raise ValueError(f"{name} is {value!r}; expected the name of a torch.dtype")
    options = given.get("quantization_config")
    if isinstance(options, str | int | float | list):
        raise ValueError(f"quantization_config is {options!r}; expected options by name")
    base = PreTrainedConfig().to_dict().keys() | _OF_LIBRARIES
    unknown = sorted(name for name in given if name not in base and not name.startswith("_"))
    if unknown:
        own = [name for name, p in inspect.signature(config_class).parameters.items() if p.kind != p.VAR_KEYWORD]
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}; expected some of {own}")


def refuse_code(given: Mapping[str, Any]) -> None:
    """Refuse a configuration, or one inside it, by which transformers would fetch code of another repository.

    Args:
        given: fields by name.

    Raises:
        ValueError: naming the field and its value.
    """
    for name in ("_attn_implementation", "attn_implementation", "experts_implementation"):
        if "/" in str(given.get(name)):
            raise ValueError(f"{name} is {given[name]!r}; expected none of a repository, whose code would be run")
    for inner in given.values():
        if isinstance(inner, Mapping):
            refuse_code(inner)


def check_counts(config: PreTrainedConfig, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Refuse fields that are no integers, or outside their bounds.

    Args:
        config: whose fields they are.
        bounds: lowest and highest value by name.

    Raises:
        ValueError: naming field, value and bounds.
    """
    for field, (lowest, highest) in bounds.items():
        value = getattr(config, field)
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"{field} is {value!r}; expected an integer from {lowest} to {highest}")


def check_number(config: PreTrainedConfig, field: str, is_valid: Callable[[float], bool], expected: str) -> None:
    """Refuse a field that is no finite number, or not a valid one.

    Args:
        config: whose field it is.
        field: its name.
        is_valid: tells of a finite number.
        expected: what `is_valid` asks for, in words.

    Raises:
        ValueError: naming field, value and what was expected.
    """
    value = getattr(config, field)
    if type(value) not in (int, float) or not math.isfinite(value) or not is_valid(value):
        raise ValueError(f"{field} is {value!r}; expected {expected}")


def check_flags(config: PreTrainedConfig, *fields: str) -> None:
    """Refuse fields that are neither true nor false.

    Raises:
        ValueError: naming field and value.
    """
    for field in fields:
        if type(getattr(config, field)) is not bool:
            raise ValueError(f"{field} is {getattr(config, field)!r}; expected true or false")


def check_num_parameters(num_parameters: int, of_what: str) -> None:
    """Refuse a model that is larger than any.

    Args:
        num_parameters: about how many the model has.
        of_what: the fields that make it large, with their values.

    Raises:
        ValueError: naming fields and size.
    """
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{of_what} make a model of about {num_parameters:.0e} parameters; expected at most 1e12")
