"""What the options of `nextblock evaluate` name as a reference, and as training images."""

from __future__ import annotations

import os
from dataclasses import replace

from nextblock.data.datasets_source import has_column, is_saved_to_disk
from nextblock.data.images import ImageDataConfig
from nextblock.evaluation.presets import preset_of
from nextblock.evaluation.references import OpenedReference, open_data, open_reference

from .evaluate_config import EvaluateConfig
from .mistakes import reading
from .run_data import data_of_run


def open_references(
    config: EvaluateConfig, size: tuple[int, int]
) -> tuple[OpenedReference, OpenedReference | None]:
    """Open what samples of a size (H, W) are compared with, and the training images where they are others."""
    crop = config.reference_crop
    if crop is None and config.preset is not None:
        crop = preset_of(config.preset).crop
    train = None
    if config.training_images is not None:
        with reading("training_images", config.training_images, "images, as a folder or an .npz file"):
            train = open_reference(config.training_images, size, crop)
            if train.images is None:
                raise ValueError("it holds statistics alone; expected images")
    data = config.data
    if config.reference is not None:
        data = _dataset_of(config.reference)
        if data is None:
            if config.reference_split is not None:
                raise ValueError(
                    f"reference_split is {config.reference_split!r}, but reference {config.reference!r} is no dataset; "
                    "expected null"
                )
            with reading("reference", config.reference, "images or statistics, as a folder or an .npz file"):
                return open_reference(config.reference, size, crop), train
    elif data.source is None:
        data = data_of_run(config.run_dirs[0])[0]
    split = config.reference_split or data.eval_split or data.split
    with reading("reference" if config.reference else "data", config.reference or data.path, "images that can be read"):
        reference = open_data(data, split, size, crop)
        if train is None and config.reference is None and split != data.split:
            train = open_data(data, data.split, size, crop)
    return reference, train


def _dataset_of(reference: str) -> ImageDataConfig | None:
    """Return the data that a reference names; None where it names files."""
    if reference == "digits":
        return ImageDataConfig(source="digits")
    if is_saved_to_disk(reference):
        return _of_library(reference)
    looks_like_files = os.path.exists(reference) or reference.endswith(".npz") or reference.startswith((".", "/", "~"))
    # A name on the hub has an owner, or is a single word; a path into a folder that is here is mistyped.
    if looks_like_files or reference.count("/") > 1 or os.path.isdir(reference.partition("/")[0]):
        return None
    return _of_library(reference)


def _of_library(path: str) -> ImageDataConfig:
    """Return a dataset of the library `datasets`, with classes where it has some by the usual name."""
    with reading("reference", path, "images or statistics, as files or as a dataset"):
        data = ImageDataConfig(source="datasets", path=path)
        return data if has_column(path, data.label_column) else replace(data, label_column=None)
