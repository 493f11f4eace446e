"""Class labels as people give them: numbers, names, parts of names; counts for a model without classes."""

import difflib
import unicodedata
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nextblock.prior.conditioning import ClassConditions

from .sampling_request import MAX_IMAGES


def resolve_labels(class_labels, conditions: ClassConditions) -> list[int]:
    """Turn labels and class names into label numbers.

    Args:
        class_labels: a number, a name, or several in a sequence, array or tensor. A name counts in any case; part of a
            name does where only one class has it. Without classes: None for one image, or a number of images.
        conditions: the classes of the prior.

    Returns:
        Label numbers; the null class for each image of an unconditional model.

    Raises:
        ValueError: naming the label that is none.
    """
    if isinstance(class_labels, (Tensor, np.ndarray, np.integer)):
        class_labels = class_labels.tolist()
    if conditions.num_classes == 0:
        return _unconditional_labels(class_labels)
    if isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    if not isinstance(class_labels, Sequence) or not class_labels:
        raise ValueError(f"class_labels is {class_labels!r}; expected a label, a class name, or a list of them")
    return [_label_number(label, conditions.num_classes, conditions.class_names) for label in class_labels]


def _unconditional_labels(count: int | None) -> list[int]:
    """Return the null class, which is 0 where there is no other, for each image."""
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_IMAGES):
        raise ValueError(
            f"class_labels is {count!r}; expected None for an unconditional model, or a positive number of images, "
            f"up to {MAX_IMAGES}"
        )
    return [0] * (1 if count is None else count)


def _label_number(label: int | str, num_classes: int, names: list[str] | None) -> int:
    """Turn one label or class name into a label number."""
    label = label.item() if isinstance(label, np.integer) else label
    if type(label) is int:
        if not 0 <= label < num_classes:
            raise ValueError(f"class_labels holds {label}; expected 0 to {num_classes - 1}")
        return label
    if not isinstance(label, str):
        raise ValueError(f"class_labels holds {label!r}; expected integers and class names")
    if names is None:
        raise ValueError(f"class_labels holds {label!r}, but the prior has no class names; expected integers")
    wanted, folded = _folded(label), [_folded(name) for name in names]
    # ImageNet has a "Cardigan" that is a dog and a "cardigan" that is not.
    matches = [n for n, name in enumerate(names) if name == label.strip()]
    matches = matches or [n for n, name in enumerate(folded) if name == wanted]
    matches = matches or [n for n, name in enumerate(folded) if wanted and wanted in name]
    if len(matches) != 1:
        near = [names[n] for n in matches[:5]] or _near_names(wanted, names, folded)
        found = f"{len(matches)} classes" if matches else "no class"
        raise ValueError(f"class_labels holds {label!r}, which names {found}; did you mean one of {near}?")
    return matches[0]


def _near_names(wanted: str, names: list[str], folded: list[str]) -> list[str]:
    """Return the five names most like a wanted one, as they are spelled."""
    near = difflib.get_close_matches(wanted, dict.fromkeys(folded), n=5, cutoff=0.0)
    return [names[folded.index(name)] for name in near]


def _folded(name: str) -> str:
    """Return a name without case, its accents written in one way."""
    return unicodedata.normalize("NFC", name.strip()).casefold()
