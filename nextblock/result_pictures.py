"""What people look at of a measured set of samples: a grid, the nearest training images, a page with all figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nextblock.evaluation.pictures import class_grid, image_grid, neighbour_grid, save_picture
from nextblock.evaluation.result_page import write_result_page
from nextblock.evaluation.sample_sets import SampleSet

GRID_NAME, NEIGHBOURS_NAME = "samples.png", "neighbours.png"
_COLUMNS, _ROWS = 10, 10
_NUM_PAIRS, _PAIR_COLUMNS = 20, 5


def draw_result(
    output_dir: Path,
    result: Mapping,
    figures: Mapping[str, str],
    samples: SampleSet,
    train: SampleSet | None,
    nearest_name: str,
) -> None:
    """Write samples.png, neighbours.png where there are some, and report.html.

    Args:
        output_dir: where they go, and the file of neighbours is.
        result: figures and settings by name.
        figures: what the figures among them are, by name.
        samples: that were measured.
        train: images among which the nearest was looked for, or None.
        nearest_name: of the file of `sample_numbers`, `train_numbers` and `distances`, each (n,), in `output_dir`.
    """
    save_picture(sample_grid(samples), output_dir / GRID_NAME)
    pictures = {GRID_NAME: "Samples"}
    if train is None:
        (output_dir / NEIGHBOURS_NAME).unlink(missing_ok=True)
    else:
        with np.load(output_dir / nearest_name) as nearest:
            chosen = np.argsort(nearest["distances"], kind="stable")[:_NUM_PAIRS]
            pairs = samples.images(nearest["sample_numbers"][chosen]), train.images(nearest["train_numbers"][chosen])
        save_picture(neighbour_grid(*pairs, num_columns=_PAIR_COLUMNS), output_dir / NEIGHBOURS_NAME)
        pictures[NEIGHBOURS_NAME] = (
            "The samples that lie nearest to a training image, by the features, each with that image on its right; the "
            "nearest first"
        )
    write_result_page(output_dir, result, figures, pictures)


def sample_grid(samples: SampleSet):
    """Lay out the first samples, those of a class in a row where there are classes.

    Args:
        samples: N ≥ 1.

    Returns:
        The picture, of ten rows of ten at most.
    """
    labels = samples.class_labels
    if labels is None or len(np.unique(labels)) == 1:
        return image_grid(samples.images(range(min(len(samples), _COLUMNS * _ROWS))), _COLUMNS)
    shown = np.unique(labels)[:_ROWS]
    numbers = np.concatenate([np.flatnonzero(labels == label)[:_COLUMNS] for label in shown])
    return class_grid(samples.images(numbers), labels[numbers], _COLUMNS, _ROWS)
