"""Pictures to pixel values and back: geometry, numbers, bytes."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from nextblock.data.augment import TransformConfig, apply_transform
from nextblock.data.pixels import fit_image, to_output, to_pictures, to_pixel_values, to_rgb, to_uint8

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (31, 40, 3), dtype=np.uint8))


def on_ties_and_beside_them() -> torch.Tensor:
    """Pixel values (1, 3, 16, 48) halfway between two bytes, the floats beside those, and the ends."""
    halfway = ((torch.arange(255) + 0.5) / 127.5 - 1).float()
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (2.0, -2.0)]
    return torch.cat([halfway, *beside, torch.tensor([-1.0, 1.0, 0.0])]).view(1, 1, 16, 48).expand(1, 3, 16, 48)


@pytest.mark.parametrize("size", [(8, 6), (31, 40), (64, 20), (7, 7)])
@pytest.mark.parametrize("picture", [PICTURE, PICTURE.resize((16, 90))])
def test_a_crop_is_how_held_out_images_are_seen(picture, size):
    expected = apply_transform(picture, size, TransformConfig(), 0, 0, 0)
    assert np.array_equal(fit_image(picture, size), expected)
    grey = picture.convert("L")
    colours = apply_transform(grey.convert("RGB"), size, TransformConfig(), 0, 0, 0)
    assert np.array_equal(fit_image(grey, size, "crop"), colours[..., 0])


def test_stretching_changes_proportions():
    expected = PICTURE.resize((6, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(fit_image(PICTURE, (8, 6), "stretch"), expected)


@pytest.mark.parametrize(
    ("size", "inner", "corner"),
    [((40, 40), (31, 40), (4, 0)), ((20, 20), (16, 20), (2, 0)), ((31, 61), (31, 40), (0, 10))],
)
def test_padding_keeps_all_of_the_picture_and_repeats_its_edges(size, inner, corner):
    padded = np.asarray(fit_image(PICTURE, size, "pad"))
    scaled = np.asarray(PICTURE.resize(inner[::-1], Image.Resampling.LANCZOS))
    assert padded.shape == (*size, 3)
    for y in range(size[0]):
        for x in range(size[1]):
            inside = [min(max(at - start, 0), n - 1) for at, start, n in zip((y, x), corner, inner, strict=True)]
            assert np.array_equal(padded[y, x], scaled[tuple(inside)])
    grey = fit_image(PICTURE.convert("L"), size, "pad")
    assert grey.mode == "L" and grey.size == size[::-1]


def test_thin_pictures_are_padded_too():
    assert fit_image(Image.new("RGB", (500, 1), "red"), (8, 8), "pad").getcolors() == [(64, (255, 0, 0))]


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_a_picture_of_the_size_is_left_alone(fit):
    assert fit_image(PICTURE, (31, 40), fit) is PICTURE


def test_unknown_fits_are_refused():
    with pytest.raises(ValueError, match=r"fit is 'fill'; expected one of \['crop', 'stretch', 'pad'\]"):
        fit_image(PICTURE, (31, 40), "fill")


def test_transparent_pictures_lie_on_the_background():
    clear = Image.fromarray(np.array([[[200, 100, 0, 0], [200, 100, 0, 255]]], np.uint8))
    assert np.asarray(to_rgb(clear)).tolist() == [[[255] * 3, [200, 100, 0]]]
    assert np.asarray(to_rgb(clear, "black")).tolist() == [[[0] * 3, [200, 100, 0]]]


def test_what_was_given_is_left_alone():
    copy = to_rgb(PICTURE)
    copy.putpixel((0, 0), (1, 2, 3))
    assert copy.getpixel((0, 0)) != PICTURE.getpixel((0, 0)) and type(copy) is Image.Image


def test_16_bits_are_rounded_to_the_nearest_of_8():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in (np.uint16, np.int32):
        got = np.asarray(to_rgb(Image.fromarray(levels.astype(kind))))
        assert np.array_equal(got[..., 0], np.round(levels / 257)) and np.array_equal(got[..., 1], got[..., 2])


def test_arrays_and_tensors_become_the_same_values():
    pixels = RNG.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels[0, :2, :4] = np.arange(24).reshape(2, 4, 3)
    values = to_pixel_values(pixels)
    # The exact quotient, rounded once, then the exact difference, rounded once.
    exact = (pixels.astype(np.float64) / 127.5).astype(np.float32).astype(np.float64) - 1
    assert values.dtype == torch.float32 and values.is_contiguous()
    assert np.array_equal(values, exact.astype(np.float32).transpose(0, 3, 1, 2))
    assert torch.equal(to_pixel_values(torch.from_numpy(pixels)), values)
    last = to_pixel_values(torch.from_numpy(pixels), torch.channels_last)
    assert torch.equal(last, values) and last.is_contiguous(memory_format=torch.channels_last)
    ends = np.array([0] * 3 + [255] * 3, np.uint8).reshape(1, 1, 2, 3)
    assert to_pixel_values(ends).flatten().tolist() == [-1, 1] * 3


def test_bytes_come_back_and_what_lies_outside_is_clipped():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_pixel_values(levels)), levels)
    beyond = to_uint8(torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert beyond[:, 0, 0, 0].tolist() == [0, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16)).shape == (2, 4, 6, 3)
    (picture,) = to_pictures(to_pixel_values(levels))
    assert picture.mode == "RGB" and np.array_equal(picture, levels[0])


def test_outputs_are_those_of_diffusers():
    pixel_values, processor = on_ties_and_beside_them(), VaeImageProcessor()
    for output_type in ("pt", "np", "pil"):
        got, expected = to_output(pixel_values, output_type), processor.postprocess(pixel_values, output_type)
        assert type(got) is type(expected) and len(got) == len(expected)
        assert np.array_equal(np.stack(list(got)), np.stack(list(expected)))
