"""Resizing, cropping, warping and the keyed draws behind them."""

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nextblock.data.augment import (
    Placement,
    TransformConfig,
    apply_transform,
    cover_and_crop,
    cover_size,
    draw_placement,
    warp,
)

FULL = TransformConfig(
    resize_ratio=1.25,
    random_crop=True,
    horizontal_flip=True,
    max_shift=2,
    max_rotation=8,
    max_scale=0.06,
    max_shear=0.05,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow_warp(pixels, size, corner, placement, fill):
    """Every output pixel by hand: undo the forward map, then blend the four neighbours."""
    height, width = pixels.shape[:2]
    angle = math.radians(placement.rotation)
    # Counter-clockwise on a screen, whose y axis points down.
    rotate = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    forward = placement.scale * rotate @ np.array([[1, placement.shear], [0, 1]])
    center_in = np.array([corner[1] + size[1] / 2, corner[0] + size[0] / 2])
    center_out = np.array([size[1] / 2 + placement.shift[1], size[0] / 2 + placement.shift[0]])
    result = np.empty((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = np.linalg.solve(forward, np.array([column + 0.5, row + 0.5]) - center_out) + center_in
            if not (0 <= x < width and 0 <= y < height):
                result[row, column] = fill
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            blend = np.zeros(3)
            for near_y, weight_y in ((top, top + 1.5 - y), (top + 1, y - 0.5 - top)):
                for near_x, weight_x in ((left, left + 1.5 - x), (left + 1, x - 0.5 - left)):
                    pixel = pixels[min(max(near_y, 0), height - 1), min(max(near_x, 0), width - 1)]
                    blend += weight_y * weight_x * pixel
            result[row, column] = blend
    return result


@pytest.mark.parametrize(
    "placement",
    [
        Placement(rotation=30.0),
        Placement(rotation=-8.0),
        Placement(scale=1.3),
        Placement(scale=0.8),
        Placement(shear=0.2),
        Placement(shift=(2.25, -1.5)),
        Placement(rotation=11.0, scale=0.93, shear=-0.1, shift=(-1.5, 0.75)),
    ],
)
def test_warp_equals_a_slow_reference(placement):
    pixels = noise(20, 24)
    pixels[[0, -1]] = pixels[:, [0, -1]] = (10, 20, 30)
    for size, corner in (((20, 24), (0, 0)), ((12, 10), (3, 9))):
        got = np.asarray(warp(Image.fromarray(pixels), size, corner, placement)).astype(float)
        expected = slow_warp(pixels, size, corner, placement, (10, 20, 30))
        # PIL cuts fractions off.
        assert np.all(got <= expected + 1e-3) and np.all(got > expected - 1 - 1e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_quarter_turn_is_counter_clockwise_and_identity_changes_nothing(interpolation):
    pixels = noise(16, 16)
    turned = warp(Image.fromarray(pixels), (16, 16), (0, 0), Placement(rotation=90.0), interpolation)
    assert np.abs(np.asarray(turned).astype(int) - np.rot90(pixels)).max() <= 1
    same = warp(Image.fromarray(pixels), (16, 16), (0, 0), Placement(), interpolation)
    assert np.array_equal(np.asarray(same), pixels)


def test_a_shift_goes_down_and_right_and_fills_with_the_median_of_the_border():
    pixels = noise(10, 12)
    pixels[[0, -1]] = pixels[:, [0, -1]] = (200, 100, 0)
    pixels[0, :5] = 255
    shifted = np.asarray(warp(Image.fromarray(pixels), (10, 12), (0, 0), Placement(shift=(2, 3))))
    assert np.array_equal(shifted[2:, 3:], pixels[:-2, :-3])
    assert np.all(shifted[:2] == (200, 100, 0)) and np.all(shifted[:, :3] == (200, 100, 0))


def test_a_warped_crop_shows_the_image_beyond_it():
    pixels = noise(12, 12)
    crop = np.asarray(warp(Image.fromarray(pixels), (6, 6), (3, 3), Placement(shift=(-2, 1))))
    assert np.array_equal(crop, pixels[5:11, 2:8])


def test_bicubic_is_sharper_than_bilinear():
    image, placement = Image.fromarray(noise(32, 32)), Placement(shift=(0.5, 0.5))
    spread = [np.std(warp(image, (32, 32), (0, 0), placement, name)) for name in ("bilinear", "bicubic")]
    assert spread[1] > 1.2 * spread[0]


@pytest.mark.parametrize(
    ("size", "target", "ratio", "expected"),
    [
        ((100, 50), (32, 32), 1.0, (64, 32)),
        ((50, 101), (32, 32), 1.0, (32, 64)),
        ((20, 20), (32, 32), 1.125, (36, 36)),
        ((100, 100), (16, 48), 1.0, (48, 48)),
        ((300, 100), (16, 24), 1.5, (72, 24)),
        ((333, 500), (256, 256), 1.0, (256, 384)),
    ],
)
def test_the_shorter_side_meets_its_size_and_proportions_stay(size, target, ratio, expected):
    image = Image.fromarray(noise(size[1], size[0]))
    assert cover_size(image.size, target, ratio) == expected
    resized = np.asarray(image.resize(expected, Image.Resampling.LANCZOS))
    height, width = target
    assert np.array_equal(cover_and_crop(image, target, ratio, (0, 0)), resized[:height, :width])
    assert np.array_equal(cover_and_crop(image, target, ratio, (1, 1)), resized[-height:, -width:])


def test_an_image_that_fits_is_cropped_at_the_center_and_not_resampled():
    pixels = noise(32, 41)
    assert cover_size((41, 32), (32, 32), 1.0) == (41, 32)
    cropped = apply_transform(Image.fromarray(pixels), (32, 32), TransformConfig(), 0, 0, 0)
    assert cropped.dtype == np.uint8 and np.array_equal(cropped, pixels[:, 4:36])
    again = apply_transform(Image.fromarray(pixels), (32, 32), TransformConfig(), 1, 2, 3)
    assert np.array_equal(cropped, again)
    tall = noise(20, 8)
    cropped = apply_transform(Image.fromarray(tall), (8, 8), TransformConfig(), 0, 0, 0)
    assert np.array_equal(cropped, tall[6:14])


@pytest.mark.parametrize("size", [(3, 500), (700, 9), (40, 3000), (2000, 30), (1, 300), (16, 4000)])
@pytest.mark.parametrize("position", [None, (0, 0), (1, 1), (0.3, 0.7)])
def test_of_a_very_long_image_the_crop_is_that_of_the_whole(size, position):
    image = Image.fromarray(noise(*size))
    whole = image.resize(cover_size(image.size, (16, 16), 1.0), Image.Resampling.LANCZOS)
    assert whole.width * whole.height > 32 * 16 * 16
    cropped = np.asarray(cover_and_crop(image, (16, 16), 1.0, position)).astype(int)
    assert np.abs(cropped - np.asarray(cover_and_crop(whole, (16, 16), 1.0, position))).max() <= 1


def test_what_a_shift_brings_into_view_is_there_in_a_very_long_image_too():
    config, image = TransformConfig(max_shift=12, max_rotation=20, random_crop=True), Image.fromarray(noise(6, 900))
    whole = image.resize(cover_size(image.size, (16, 16), 1.0), Image.Resampling.LANCZOS)
    fills = []
    for epoch in range(20):
        shifted = apply_transform(image, (16, 16), config, 0, epoch, 0).astype(int)
        expected = apply_transform(whole, (16, 16), config, 0, epoch, 0)
        # Beyond the image's border lies the median of what is known of that border.
        fills.append((np.abs(shifted - expected).max(axis=2) > 1).mean())
    assert np.mean(fills) < 0.5 and min(fills) < 0.2


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_the_memory_of_a_line_of_pixels_is_that_of_the_crop(size):
    image = Image.new("RGB", size, (200, 100, 0))
    code = (
        "import resource, sys; from PIL import Image; from nextblock.data.augment import *; "
        f"image = Image.new('RGB', {size}, (200, 100, 0)); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "config = TransformConfig(resize_ratio=1.25, random_crop=True, max_shift=5); "
        "[apply_transform(image, (256, 256), config, 0, epoch, 0) for epoch in range(3)]; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KB; the whole would take 300 GB
    assert np.all(apply_transform(image, (64, 64), TransformConfig(), 0, 0, 0) == (200, 100, 0))


def test_random_crops_reach_every_position_equally_often():
    pixels = noise(10, 10)
    config = TransformConfig(resize_ratio=1.25, random_crop=True)
    windows = {(y, x): pixels[y : y + 8, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    counts = dict.fromkeys(windows.values(), 0)
    for index in range(900):
        counts[apply_transform(Image.fromarray(pixels), (8, 8), config, 0, 0, index).tobytes()] += 1
    assert len(counts) == 9 and all(60 < count < 140 for count in counts.values())


def test_half_of_the_images_are_mirrored():
    pixels = noise(8, 8)
    config = TransformConfig(horizontal_flip=True)
    mirrored = 0
    for index in range(400):
        result = apply_transform(Image.fromarray(pixels), (8, 8), config, 0, 0, index)
        is_mirrored = np.array_equal(result, pixels[:, ::-1])
        assert is_mirrored or np.array_equal(result, pixels)
        mirrored += is_mirrored
    assert 160 < mirrored < 240


def test_a_result_depends_on_its_key_alone():
    image = Image.fromarray(noise(24, 30))

    def at(*key):
        return apply_transform(image, (16, 16), FULL, *key)

    first = at(7, 3, 11)
    others = [at(7, 4, 11), at(8, 3, 11), at(7, 3, 12)]
    assert np.array_equal(first, at(7, 3, 11))
    assert all(not np.array_equal(first, other) for other in others)


def test_draws_come_from_the_keyed_generator_and_fill_their_ranges():
    draws = np.random.default_rng((7, 3, 11)).random(8)
    placement = draw_placement(FULL, 7, 3, 11)
    assert placement.crop == (draws[0], draws[1]) and placement.is_flipped == (draws[2] < 0.5)
    assert placement.shift == (2 * (2 * draws[3] - 1), 2 * (2 * draws[4] - 1))
    assert placement.rotation == 8 * (2 * draws[5] - 1)
    many = [draw_placement(FULL, 0, 0, index) for index in range(2000)]
    values = np.array([(*p.shift, p.rotation, p.scale - 1, p.shear) for p in many])
    limits = np.array([2, 2, 8, 0.06, 0.05])
    assert np.all(np.abs(values) <= limits)
    assert np.all(values.max(0) > 0.99 * limits) and np.all(values.min(0) < -0.99 * limits)
    assert np.all(np.abs(values.mean(0)) < 0.05 * limits)
    correlation = np.corrcoef(values.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.1


def test_one_option_leaves_the_draws_of_the_others():
    rotation = draw_placement(TransformConfig(max_rotation=8), 0, 1, 2)
    both = draw_placement(TransformConfig(max_rotation=8, random_crop=True, horizontal_flip=True), 0, 1, 2)
    assert rotation.rotation == both.rotation != 0
    assert rotation.crop is None and rotation.shift == (0, 0) and rotation.scale == 1 and rotation.shear == 0
    assert draw_placement(TransformConfig(), 0, 1, 2) == Placement()


def test_apply_transform_warps_as_drawn_then_mirrors():
    image = Image.fromarray(noise(20, 20))
    config = TransformConfig(max_rotation=20, max_scale=0.2, horizontal_flip=True)
    for index in range(6):
        placement = draw_placement(config, 0, 0, index)
        expected = np.asarray(warp(image, (20, 20), (0, 0), placement))
        expected = expected[:, ::-1] if placement.is_flipped else expected
        assert np.array_equal(apply_transform(image, (20, 20), config, 0, 0, index), expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("resize_ratio", 0.9, "from 1 to 16"),
        ("resize_ratio", math.nan, "from 1 to 16"),
        ("max_shift", -1, "0 or more"),
        ("max_rotation", 181, "at most 180"),
        ("max_scale", 1, "less than 1"),
        ("max_scale", math.inf, "finite"),
        ("max_shear", math.nan, "finite"),
        ("interpolation", "cubic", "'bicubic', 'bilinear'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=f"{field}={value!r}.*{expected}"):
        TransformConfig(**{field: value})
