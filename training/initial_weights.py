"""Starting a training from a trained model's weights instead of random ones: fine-tuning."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from nextblock.files.state_dicts import check_state_dict
from nextblock.files.stored_model import read_stored_weights


def load_initial_weights(model: nn.Module, folder: str | Path, fresh: Sequence[str] = ()) -> None:
    """Give a model another one's weights, all of them but those named.

    Args:
        model: unwrapped, built for this training.
        folder: a saved model of the same architecture.
        fresh: tensors of the model, or modules, that stay as they are: "class_emb" for other classes.

    Raises:
        ValueError: if the folder holds no weights, a name in `fresh` is none of the model's, or tensors are missing,
            unexpected or of another shape.
    """
    own = model.state_dict()
    for name in fresh:
        if not any(_is_within(key, name) for key in own):
            raise ValueError(f"init_except has {name!r}; expected names of tensors or modules: {list(own)[:8]} …")
    given = read_stored_weights(folder)
    # Names of older versions, where the model class knows any.
    for old, new in getattr(model, "renamed_weights", {}).items():
        given = {re.sub(old, new, name): tensor for name, tensor in given.items()}
    kept = {key: tensor for key, tensor in own.items() if any(_is_within(key, name) for name in fresh)}
    given = {key: tensor for key, tensor in given.items() if not any(_is_within(key, name) for name in fresh)}
    check_state_dict(given, {key: tuple(t.shape) for key, t in own.items() if key not in kept}, {})
    model.load_state_dict(given | kept)


def _is_within(key: str, name: str) -> bool:
    """Tell whether a tensor has a name or lies in the module of that name."""
    return key == name or key.startswith(f"{name}.")
