"""The views of an image that a tokenization job encodes, numbered from the plain center crop, view 0.

Legend: HxW pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .augment import TransformConfig, apply_transform, cover_and_crop

# Where each of the crops lies in its free space, (y, x).
_CROPS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1), "center": None}


@dataclass(frozen=True)
class ViewSet:
    """Which views there are and how each is made.

    View 0 is the center crop. Random augmentations follow, then the mirrored center crop, then the ten crops.

    Args:
        transform: makes the augmented views.
        num_augmented: random augmentations of each image; the a-th, from 1, is the transform's epoch a.
        has_flip: whether the mirrored center crop is a view.
        ten_crop_ratio: the shorter side is resized to this multiple of the target, 1 or more, for crops at the four
            corners and the center, as they are and mirrored; None for no such views.
        seed: key of the augmentation.
    """

    transform: TransformConfig
    num_augmented: int = 0
    has_flip: bool = False
    ten_crop_ratio: float | None = None
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The views by number."""
        names = ["center crop", *(f"augmentation {epoch}" for epoch in range(1, self.num_augmented + 1))]
        if self.has_flip:
            names.append("center crop, mirrored")
        if self.ten_crop_ratio is not None:
            crops = [f"crop {corner} at {self.ten_crop_ratio:g}" for corner in _CROPS]
            names += [*crops, *(f"{crop}, mirrored" for crop in crops)]
        return names

    def render(self, image: Image.Image, image_size: tuple[int, int], view: int, index: int) -> np.ndarray:
        """Make one view of one image.

        Args:
            image: RGB, any size.
            image_size: (H, W) of the result.
            view: its number.
            index: the image's position in its source, the key of its augmentation.

        Returns:
            uint8 (H, W, 3).
        """
        if 1 <= view <= self.num_augmented:
            return apply_transform(image, image_size, self.transform, self.seed, view, index)
        view = view - self.num_augmented if view else 0
        if view and not self.has_flip:
            view += 1
        if view < 2:
            pixels = apply_transform(image, image_size, TransformConfig(), self.seed, 0, index)
            return pixels[:, ::-1] if view else pixels
        is_mirrored, number = divmod(view - 2, len(_CROPS))
        position = list(_CROPS.values())[number]
        pixels = np.asarray(cover_and_crop(image, image_size, self.ten_crop_ratio, position))
        return pixels[:, ::-1] if is_mirrored else pixels
