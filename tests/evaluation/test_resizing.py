import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nextblock.evaluation.resizing import pil_bicubic_float, pil_bicubic_uint8, tf1_bilinear, torch_bilinear

WAYS = (tf1_bilinear, torch_bilinear, pil_bicubic_float, pil_bicubic_uint8)


def _pictures(height=9, width=14, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_of_the_size_stays_as_it_is(way):
    pictures = _pictures(12, 12)
    levels = way(pictures, 12)
    assert levels.dtype == torch.float32
    np.testing.assert_array_equal(levels.numpy(), pictures.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", [5, 20])
def test_even_pictures_stay_even_and_levels_stay_in_range(way, side):
    even = np.full((1, 7, 11, 3), 200, np.uint8)
    torch.testing.assert_close(way(even, side), torch.full((1, 3, side, side), 200.0), rtol=0, atol=1e-4)
    levels = way(_pictures(), side)
    assert levels.shape == (3, 3, side, side) and 0 <= levels.min() and levels.max() <= 255


@pytest.mark.parametrize("side", [4, 9, 23])
def test_tf1_bilinear_takes_pixel_i_at_i_times_the_ratio(side):
    pictures = _pictures()
    expected = np.empty((3, 3, side, side))
    for y in range(side):
        for x in range(side):
            top, left = y * 9 / side, x * 14 / side
            (row, dy), (column, dx) = (int(top), top % 1), (int(left), left % 1)
            rows, columns = [row, min(row + 1, 8)], [column, min(column + 1, 13)]
            corners = pictures[:, rows][:, :, columns].astype(float)
            lines = corners[:, :, 0] * (1 - dx) + corners[:, :, 1] * dx
            expected[:, :, y, x] = lines[:, 0] * (1 - dy) + lines[:, 1] * dy
    np.testing.assert_allclose(tf1_bilinear(pictures, side).numpy(), expected, atol=1e-3)


def test_tf1_bilinear_is_the_affine_grid_of_stylegan_and_fid_helper():
    """Their grid is shifted by half a pixel of the source less half a pixel of the result."""
    pictures, side = _pictures(32, 32), 299
    shift = 1 / 32 - 1 / side
    theta = torch.tensor([[[1.0, 0, shift], [0, 1, shift]]]).repeat(3, 1, 1)
    grid = F.affine_grid(theta, [3, 3, side, side], align_corners=False)
    levels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    expected = F.grid_sample(levels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(tf1_bilinear(pictures, side), expected, rtol=0, atol=5e-3)


def test_pil_bicubic_float_keeps_what_bytes_round():
    pictures = _pictures() // 4 + 96
    rounded, exact = pil_bicubic_uint8(pictures, 20), pil_bicubic_float(pictures, 20)
    assert torch.equal(rounded, rounded.round()) and not torch.equal(exact, exact.round())
    # PIL rounds, and clips, after each of its two passes.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1.5)
    picture = Image.fromarray(pictures[1]).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(rounded[1].permute(1, 2, 0).numpy(), np.asarray(picture))
