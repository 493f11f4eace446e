"""Fields that the configurations of all families of priors over single tokens share, and what is refused of them.

Legend: V codes, D width.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import MAX_CODES
from nextblock.files.config_fields import check_counts, check_num_parameters

from .head_plan import configured_plan
from .heads import num_head_parameters

# More of these than any prior has.
MAX_WIDTH, MAX_LAYERS, MAX_CLASSES = 1 << 17, 1024, 1 << 24


def set_fields(config: PreTrainedConfig, given: Mapping[str, Any]) -> None:
    """Set all parameters of a configuration's `__init__` as its fields, tuples as the lists that they are read back as.

    Args:
        config: whose fields they are.
        given: `locals()` at the beginning of `__init__`.
    """
    for name, value in given.items():
        if name not in ("self", "kwargs", "__class__"):
            setattr(config, name, list(value) if isinstance(value, tuple) else value)


def stored_layout(layout: dict | None) -> dict:
    """Return a layout of single tokens as a configuration holds it; None stands for 8×8 cells.

    Raises:
        ValueError: if the fields do not describe a layout, or blocks are of more than a token.
    """
    read = BlockLayout.tiles(1, 8) if layout is None else BlockLayout.from_dict(layout)
    if read.is_scales or read.num_blocks != read.num_tokens:
        raise ValueError(f"layout is {read.to_dict()}; expected tiles of one cell: the tokens come one by one")
    return read.to_dict()


def check_sizes(config: PreTrainedConfig, layer_parameters: int) -> None:
    """Refuse sizes outside their range.

    Args:
        config: with `vocab_size`, `num_classes`, `hidden_size`, `num_layers`, `num_heads`, and the fields of its head.
        layer_parameters: about how many a layer has.

    Raises:
        ValueError: naming the field.
    """
    bounds = {"vocab_size": (2, MAX_CODES), "num_classes": (0, MAX_CLASSES), "hidden_size": (1, MAX_WIDTH)}
    check_counts(config, bounds | {"num_layers": (1, MAX_LAYERS), "num_heads": (1, MAX_WIDTH)})
    D, plan = config.hidden_size, configured_plan(config)
    num_of_head = num_head_parameters(config, D)
    check_num_parameters(
        config.num_layers * layer_parameters + num_of_head + (plan.num_scores + config.num_classes) * D,
        f"num_layers {config.num_layers}, hidden_size {D}, vocab_size {config.vocab_size} and num_classes "
        f"{config.num_classes}",
    )
    if D % config.num_heads:
        raise ValueError(f"num_heads is {config.num_heads}; expected a divisor of hidden_size {D}")


def check_names(config: PreTrainedConfig) -> None:
    """Refuse class names that are not one a class, and a fingerprint that is no text.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(config.tokenizer_fingerprint, str | None):
        raise ValueError(f"tokenizer_fingerprint is {config.tokenizer_fingerprint!r}; expected a text, or None")
    names = config.class_names
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names is {names!r}; expected texts, or None")
    if names is not None and len(names) != config.num_classes:
        raise ValueError(f"class_names has {len(names)} names; expected {config.num_classes}, one a class")
