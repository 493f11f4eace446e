"""The handwritten digits that ship with scikit-learn: 1797 grey images of 8x8 with intensities 0 to 16.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), split
80/20, stratified, always the same way. Legend: N images.
"""

import numpy as np
from PIL import Image

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test")
IMAGE_SIZE = (32, 32)
MAX_INTENSITY = 16


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads one split of the digits at their own resolution.

    Args:
        split: "train" (1437 images) or "test" (360 images).

    Returns:
        Intensities (N, 8, 8) float64 in [0, 16], labels (N,) int64 in 0..9 and rows (N,) int64, increasing:
        each image's position in scikit-learn's array.

    Raises:
        ValueError: for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the digits have the splits {list(SPLITS)}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    rows = np.sort(parts[SPLITS.index(split)])
    return digits.images[rows], digits.target[rows].astype(np.int64), rows


def upsample_digit(intensities: np.ndarray) -> Image.Image:
    """Turns one digit into a picture.

    Args:
        intensities: (8, 8), in [0, 16].

    Returns:
        RGB image of 32x32, grey, resampled with PIL's bicubic filter.
    """
    levels = np.round(intensities * (255 / MAX_INTENSITY)).astype(np.uint8)
    height, width = IMAGE_SIZE
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


class DigitsSource:
    """An image source of digits, held in memory as pictures of 32x32.

    Args:
        intensities: (N, 8, 8), in [0, 16].
        labels: (N,), in 0..9.
        rows: (N,), what identifies each image.
    """

    def __init__(self, intensities: np.ndarray, labels: np.ndarray, rows: np.ndarray):
        self.class_names = list(CLASS_NAMES)
        self.captions = None
        # Pictures and not arrays: making a picture of an array takes a tenth of an augmented image's time.
        self._images = [upsample_digit(digit) for digit in intensities]
        self._labels = labels.tolist()
        self._rows = rows.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        """The picture itself, RGB: copy it before drawing on it."""
        return self._images[index]

    def label(self, index: int) -> int:
        """The digit, 0..9."""
        return self._labels[index]

    def identifier(self, index: int) -> str:
        """The image's row in scikit-learn's array, as "digits/<row>"."""
        return f"digits/{self._rows[index]}"
