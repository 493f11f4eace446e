import numpy as np
import pytest
from PIL import Image

from nextblock.evaluation.pictures import class_grid, comparison_grid, image_grid, neighbour_grid, save_curves


def _flat_images(*levels, side=64):
    return np.stack([np.full((side, side, 3), level, dtype=np.uint8) for level in levels])


def _cells(picture, num_rows, num_columns, side=64):
    """Read the level in the middle of every cell."""
    array = np.asarray(picture)
    assert array.shape == (num_rows * (side + 2) + 2, num_columns * (side + 2) + 2, 3)
    middles = lambda count: [2 + n * (side + 2) + side // 2 for n in range(count)]  # noqa: E731
    return array[np.ix_(middles(num_rows), middles(num_columns), [0])][..., 0].tolist()


def test_image_grid_places_images_row_by_row():
    picture = image_grid(_flat_images(10, 20, 30, 40, 50), num_columns=3)
    assert _cells(picture, 2, 3) == [[10, 20, 30], [40, 50, 255]]


def test_image_grid_enlarges_small_images():
    images = np.arange(2 * 32 * 16 * 3, dtype=np.uint64).astype(np.uint8).reshape(2, 32, 16, 3)
    picture = np.asarray(image_grid(images, num_columns=2))
    assert picture.shape == (64 + 4, 2 * 34 + 2, 3)
    np.testing.assert_array_equal(picture[2:66:2, 2:34:2], images[0])
    np.testing.assert_array_equal(picture[3:66:2, 37:69:2], images[1])


def test_comparison_grid_puts_originals_above_reconstructions():
    picture = comparison_grid(_flat_images(1, 2, 3, 4, 5), _flat_images(11, 12, 13, 14, 15), num_columns=2)
    assert _cells(picture, 4, 2) == [[1, 2], [11, 12], [3, 4], [13, 14]]
    picture = comparison_grid(_flat_images(1), _flat_images(11), num_columns=8)
    assert _cells(picture, 2, 1) == [[1], [11]]


def test_class_grid_gives_each_class_a_row():
    images = _flat_images(10, 20, 30, 40, 50, 60)
    picture = class_grid(images, np.array([7, 7, 7, 2, 2, 0]), num_columns=2, max_rows=3)
    assert _cells(picture, 3, 2) == [[10, 20], [40, 50], [60, 255]]
    assert _cells(class_grid(images, np.array([7, 7, 7, 2, 2, 0]), 3, max_rows=1), 1, 3) == [[10, 20, 30]]


def test_grids_refuse_what_is_no_image():
    with pytest.raises(ValueError, match="float64"):
        image_grid(np.zeros((1, 4, 4, 3)), num_columns=1)
    with pytest.raises(ValueError, match="N ≥ 1"):
        image_grid(np.zeros((0, 4, 4, 3), dtype=np.uint8), num_columns=1)
    with pytest.raises(ValueError, match="num_columns is 0"):
        image_grid(_flat_images(1), num_columns=0)
    with pytest.raises(ValueError, match="expected equal"):
        comparison_grid(_flat_images(1), _flat_images(1, 2), num_columns=1)
    with pytest.raises(ValueError, match="class_labels have shape"):
        class_grid(_flat_images(1, 2), np.array([1]))


def test_save_curves_draws_every_panel(tmp_path):
    curves = {"train/loss": ([1, 2, 3], [3.0, 2.0, 1.0]), "eval/loss": ([3], [1.5])}
    save_curves({"tokenizer": curves, "prior": {}}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 400)
    with pytest.raises(ValueError, match="panels is empty"):
        save_curves({}, tmp_path / "none.png")


def test_neighbour_grid_puts_each_image_beside_what_is_nearest_to_it():
    picture = np.asarray(neighbour_grid(_flat_images(10, 20, 30), _flat_images(11, 21, 31, side=32), num_columns=2))
    width, height = 64 + 64 + 8 + 2, 64 + 2
    assert picture.shape == (2 * height + 2, 2 * width + 2, 3)
    columns = [2 + x * width + middle for x in range(2) for middle in (32, 96, 132)]
    middles = picture[np.ix_([34, 34 + height], columns, [0])][..., 0].tolist()
    assert middles == [[10, 11, 255, 20, 21, 255], [30, 31, 255, 255, 255, 255]]
    small = neighbour_grid(_flat_images(10, side=16), _flat_images(11, side=32))
    assert small.size == (64 + 64 + 8 + 4, 64 + 4)
    with pytest.raises(ValueError, match="2 samples and 1 nearest images"):
        neighbour_grid(_flat_images(1, 2), _flat_images(1))
