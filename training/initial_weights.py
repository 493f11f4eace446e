"""Starting a training from a trained model, its architecture and its weights, instead of random ones: fine-tuning."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from nextblock.files.regular import read_json
from nextblock.files.state_dicts import check_state_dict
from nextblock.files.stored_model import read_stored_weights

from .run_config import given_options
from .sharding import load_tensors

OptionsT = TypeVar("OptionsT")


def find_initial_model(folder: str | Path, model_type: str) -> Path:
    """Return the folder of a model itself: of a pipeline, the component that is of the wanted kind.

    Args:
        folder: of a saved model or pipeline.
        model_type: of the wanted model's configuration.

    Raises:
        ValueError: if the folder holds no such model.
    """
    kinds = stored_model_types(folder)
    fitting = [place for place, kind in kinds.items() if kind == model_type]
    if len(fitting) != 1:
        found = ", ".join(f"{kind} in {place}" for place, kind in kinds.items()) or "none"
        raise ValueError(
            f"init_from is {str(folder)!r}; expected the folder of a saved {model_type}, or of a pipeline that has "
            f"one; models found: {found}"
        )
    return fitting[0]


def stored_model_types(folder: str | Path) -> dict[Path, str | None]:
    """Return what the configurations in the folder of a model or pipeline say they are of, by their folders."""
    folder = Path(folder)
    configs = [folder / "config.json"] if (folder / "config.json").is_file() else sorted(folder.glob("*/config.json"))
    return {path.parent: _model_type(path) for path in configs}


def with_initial_architecture(
    options: OptionsT, config_class: type[PreTrainedConfig], init_from: str, tuned: Collection[str]
) -> OptionsT:
    """Fill in the architecture that a training takes over.

    Args:
        options: of the model, as given.
        config_class: of the model.
        init_from: folder of the model, or of a pipeline.
        tuned: options that decide how it is trained and not what it computes; they may differ where given.

    Returns:
        The options of the saved model, with those of `tuned` that were given.

    Raises:
        ValueError: if the folder holds no such model, or options were given that differ from its own.
    """
    stored = config_class.from_pretrained(find_initial_model(init_from, config_class.model_type))
    kind = getattr(options, "kind", None)
    values = {field.name: getattr(stored, field.name) for field in dataclasses.fields(options) if field.name != kind}
    given = {name: value for name, value in given_options(options).items() if name != kind}
    different = [
        f"model.{name} is {value!r}, there {values[name]!r}"
        for name, value in given.items()
        if name not in tuned and _as_stored(stored, name, value) != values[name]
    ]
    if different:
        raise ValueError(
            f"init_from is {init_from!r}, a model of another architecture: {'; '.join(different)}. Expected options "
            "as they are there, or none: they are taken from there"
        )
    return dataclasses.replace(options, **values | {name: given[name] for name in tuned if name in given})


def load_initial_weights(model: nn.Module, folder: str | Path, fresh: Sequence[str] = ()) -> list[str]:
    """Give a model another one's weights, all of them but those named and those that cannot fit its data.

    Args:
        model: unwrapped, built for this training.
        folder: a saved model of the same architecture, or a pipeline that has one.
        fresh: tensors of the model, or modules, that stay as they are.

    Returns:
        The names of the tensors that stay as they are, or start from the ones loaded.

    Raises:
        ValueError: if the folder holds no weights, a name in `fresh` is none of the model's, or tensors are missing,
            unexpected or of another shape, others than the model's class says.
    """
    own = model.state_dict()
    for name in fresh:
        if not any(_is_within(key, [name]) for key in own):
            raise ValueError(f"init_except has {name!r}; expected names of tensors or modules: {list(own)[:8]} …")
    config = getattr(model, "config", None)
    given = read_stored_weights(folder if config is None else find_initial_model(folder, config.model_type))
    # Names of older versions, where the model class knows any.
    for old, new in getattr(model, "renamed_weights", {}).items():
        given = {re.sub(old, new, name): tensor for name, tensor in given.items()}
    adapted = getattr(model, "fitted_to_data", ())
    unfit = [
        key
        for key in own.keys() | given.keys()
        if _is_within(key, adapted) and (key not in given or key not in own or given[key].shape != own[key].shape)
    ]
    new = [key for key in own if key in unfit or _is_within(key, fresh)]
    given = {key: tensor for key, tensor in given.items() if key not in unfit and not _is_within(key, fresh)}
    check_state_dict(given, {key: tuple(tensor.shape) for key, tensor in own.items() if key not in new}, {})
    load_tensors(model, given)
    if unfit:
        model.start_unfit(unfit)
    return new


def _model_type(config: Path) -> str | None:
    """Return the kind of model that a config.json is of."""
    fields = read_json(config)
    return fields.get("model_type") if isinstance(fields, dict) else None


def _as_stored(stored: PreTrainedConfig, name: str, value: Any) -> Any:
    """Return a given option as a configuration holds it: a size may be one number for two."""
    try:
        return getattr(type(stored).from_dict(stored.to_dict() | {name: value}), name)
    except ValueError:  # It does not go with the others, so it is not theirs.
        return value


def _is_within(key: str, names: Sequence[str]) -> bool:
    """Tell whether a tensor has one of the names or lies in a module of one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
