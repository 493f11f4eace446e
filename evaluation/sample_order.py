"""The order in which a sampling job writes its images: class by class in turn, so that every part holds all classes.

ADM's evaluator averages its inception score over ten consecutive parts, to which images sorted by class are ten sets of
few classes each. Legend: N images, C classes asked for, n images of each.
"""

import numpy as np

from nextblock.data.keyed_random import keyed_order

# What a job's record says of its order; jobs of earlier versions say nothing and are sorted by class.
IN_TURN = "in turn"


def turn_order(seed: int, num_labels: int, num_images_per_label: int) -> np.ndarray:
    """Return the images' own numbers in the order in which they are written.

    Images are numbered class by class, n of each. Each turn writes one image of every class, in an order of classes
    that is random, keyed by the seed, and the same in all turns: any C images in a row are of all classes.

    Args:
        seed: of the job.
        num_labels: C ≥ 1.
        num_images_per_label: n ≥ 1.

    Returns:
        (N,) int64, a permutation of 0 … C·n - 1.
    """
    classes = keyed_order(seed, num_items=num_labels).numpy()
    return (np.arange(num_images_per_label)[:, None] + classes * num_images_per_label).reshape(-1)
