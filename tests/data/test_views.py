"""The views of an image: what each number means, and that pixels are those."""

import numpy as np
import pytest
from PIL import Image

from nextblock.data.augment import TransformConfig, apply_transform
from nextblock.data.views import ViewSet

SIZE = (8, 6)
PLAIN, RANDOM = TransformConfig(), TransformConfig(max_shift=2, horizontal_flip=True)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8))


def render(views: ViewSet, name: str, picture=PICTURE) -> np.ndarray:
    return views.render(picture, SIZE, views.names.index(name), 7)


@pytest.mark.parametrize("num_augmented", [0, 2])
@pytest.mark.parametrize("has_flip", [False, True])
@pytest.mark.parametrize("ratio", [None, 1.5])
def test_every_name_is_a_view_of_its_own(num_augmented, has_flip, ratio):
    views = ViewSet(RANDOM, num_augmented, has_flip, ratio, seed=3)
    assert len(views.names) == 1 + num_augmented + has_flip + (10 if ratio else 0)
    assert views.names[0] == "center crop"
    pictures = [views.render(PICTURE, SIZE, view, 7) for view in range(len(views.names))]
    assert {picture.shape for picture in pictures} == {(8, 6, 3)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_plain_flipped_and_augmented_views():
    views = ViewSet(RANDOM, num_augmented=2, has_flip=True, ten_crop_ratio=1.5, seed=3)
    plain = apply_transform(PICTURE, SIZE, PLAIN, 3, 0, 7)
    assert np.array_equal(render(views, "center crop"), plain)
    assert np.array_equal(render(views, "center crop, mirrored"), plain[:, ::-1])
    for epoch in (1, 2):
        expected = apply_transform(PICTURE, SIZE, RANDOM, 3, epoch, 7)
        assert np.array_equal(render(views, f"augmentation {epoch}"), expected)


def test_ten_crops_lie_at_corners_and_center():
    # Of exactly the size that the range asks for, so that nothing is resized: 12×9 for crops of 8×6.
    pixels = np.random.default_rng(1).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    views, picture = ViewSet(PLAIN, has_flip=False, ten_crop_ratio=1.5), Image.fromarray(pixels)
    corners = {"top left": (0, 0), "top right": (0, 3), "bottom left": (4, 0), "bottom right": (4, 3), "center": (2, 2)}
    for name, (top, left) in corners.items():
        expected = pixels[top : top + 8, left : left + 6]
        assert np.array_equal(render(views, f"crop {name} at 1.5", picture), expected)
        assert np.array_equal(render(views, f"crop {name} at 1.5, mirrored", picture), expected[:, ::-1])
