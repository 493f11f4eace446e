"""Images and masks in every form that people have them in."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.augment import TransformConfig, apply_transform
from nextblock.data.pixels import fit_image, to_pixel_values
from nextblock.pipelines.given_images import images_to_pixel_values, masks_to_tensor, split_images, split_masks

SIZE = (8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
VALUES = to_pixel_values(PIXELS)
IS_INSIDE = np.random.default_rng(1).random((8, 8)) < 0.5


def read(images, fit: str = "crop", size: tuple[int, int] = SIZE) -> torch.Tensor:
    return images_to_pixel_values("image", split_images("image", images), size, fit)


def read_mask(masks, images=None, fit: str = "crop", size: tuple[int, int] = SIZE) -> torch.Tensor:
    images = split_images("image", PIXELS[:1] if images is None else images)
    return masks_to_tensor(split_masks("mask_image", masks), images, size, fit)


@pytest.mark.parametrize(
    "images",
    [
        [Image.fromarray(each) for each in PIXELS],
        tuple(PIXELS),
        PIXELS,
        PIXELS[:, ::-1][:, ::-1],
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        list(torch.from_numpy(PIXELS).permute(0, 3, 1, 2)),
        [Image.fromarray(PIXELS[0]), torch.from_numpy(PIXELS[1:]).permute(0, 3, 1, 2)],
        VALUES,
        VALUES.double(),
        [Image.fromarray(PIXELS[0]), VALUES[1]],
        VALUES.permute(0, 2, 3, 1).numpy(),
    ],
    ids=lambda images: type(images).__name__,
)
def test_bytes_and_pixel_values_are_what_training_sees(images):
    got = read(images)
    assert got.dtype == torch.float32 and torch.equal(got, VALUES)


def test_values_from_0_to_1_keep_what_bytes_would_lose():
    values = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = 2 * values.float() - 1
    assert torch.equal(read(values), expected) and torch.equal(read(values.float()), expected)
    assert torch.equal(read([values[0].float().permute(1, 2, 0).numpy(), values[1]]), expected)
    assert torch.equal(read(values.half()), 2 * values.half().float() - 1)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("shape", [(20, 30), (9, 8), (5, 40)])
def test_other_sizes_are_fitted(fit, shape):
    pixels = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = to_pixel_values(np.asarray(fit_image(Image.fromarray(pixels), SIZE, fit))[None])
    forms = [Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1), (pixels / 255)[None]]
    for image in [*forms, to_pixel_values(pixels[None])]:
        assert torch.equal(read(image, fit), expected)
    assert torch.equal(read([*forms, PIXELS[0]], fit)[-1:], VALUES[:1])
    if fit == "crop":
        held_out = apply_transform(Image.fromarray(pixels), SIZE, TransformConfig(), 0, 0, 0)
        assert torch.equal(read(pixels), to_pixel_values(held_out[None]))


def test_pil_images_are_opened_as_for_training():
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    expected = np.round(levels / 257).astype(np.uint8)
    assert torch.equal(read(Image.fromarray(levels)), to_pixel_values(expected[None, ..., None].repeat(3, axis=3)))
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (read(clear) == 1).all()
    turned = Image.fromarray(PIXELS[0])
    turned.getexif()[0x0112] = 3
    assert torch.equal(read(turned), VALUES[:1].flip(2, 3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS[0, 0], r"image has shape \(8, 3\); expected \(H, W, 3\) or \(n, H, W, 3\)"),
        (VALUES.movedim(1, 3), r"image has shape \(2, 8, 8, 3\); expected \(3, H, W\) or \(n, 3, H, W\)"),
        (VALUES[:0], r"image has shape \(0, 3, 8, 8\)"),
        (PIXELS.astype(np.int64), "image has dtype int64; expected uint8 or floating point"),
        (VALUES > 0, "image has dtype torch.bool; expected uint8 or floating point"),
        (PIXELS.astype(np.float32), r"image reaches \d+.0 in absolute value; expected values in"),
        (VALUES * torch.nan, "image reaches nan in absolute value"),
        (Image.new("F", (8, 8)), "image has floating-point pixels"),
        ([PIXELS, "bird.png"], "expected a PIL image, an array, a tensor, or a list of them"),
    ],
)
def test_what_is_no_image_is_refused_by_name(images, message):
    with pytest.raises(ValueError, match=message):
        read(images)


@pytest.mark.parametrize(
    "masks",
    [
        Image.fromarray(IS_INSIDE),
        Image.fromarray(IS_INSIDE.astype(np.uint8) * 255).convert("RGB"),
        IS_INSIDE,
        IS_INSIDE.astype(np.uint8) * 255,
        IS_INSIDE.astype(np.uint8),
        IS_INSIDE.astype(np.float64),
        IS_INSIDE[None],
        IS_INSIDE[..., None],
        IS_INSIDE[None, ..., None],
        [IS_INSIDE],
        torch.from_numpy(IS_INSIDE),
        torch.from_numpy(IS_INSIDE)[None, None].float(),
        torch.from_numpy(IS_INSIDE)[None].to(torch.uint8),
        torch.where(torch.from_numpy(IS_INSIDE), 0.5, 0.4999999),
        np.where(IS_INSIDE, 128, 127).astype(np.uint8),
    ],
)
def test_masks_of_all_kinds_are_cut_at_one_half(masks):
    assert torch.equal(read_mask(masks), torch.from_numpy(IS_INSIDE)[None, None].float())


@pytest.mark.parametrize(("fit", "kept"), [("crop", (0, 1)), ("stretch", (0, 1, 2, 3)), ("pad", (1, 2))])
def test_masks_go_the_way_of_their_images(fit, kept):
    # Red, and masked, where the picture is left of its middle: the mask is where the fitted picture is red.
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255
    mask = pixels[..., 0] > 0
    expected = (read(pixels, fit)[:, :1] >= 0).float()
    assert 0 < expected.sum() < expected.numel()
    halved = np.asarray(Image.fromarray(mask).resize((16, 8)))
    for same in (mask, Image.fromarray(mask), halved, np.asarray(Image.fromarray(mask).resize((64, 64)))):
        assert torch.equal(read_mask(same, pixels, fit), expected)


def test_each_image_has_its_mask_or_all_share_one():
    images = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    shared = read_mask(mask, images)
    # Of the wide picture's left half the crop shows the right part.
    assert shared.shape == (2, 1, 8, 8) and shared[0, 0, 0].tolist() == [1] * 4 + [0] * 4
    assert torch.equal(shared[0], shared[1])
    several = read_mask([mask, ~mask], images[0])
    assert torch.equal(several, torch.cat([shared[:1], 1 - shared[:1]]))
    assert torch.equal(read_mask([mask, ~mask], images), several)


def test_transparent_masks_lie_on_black():
    strokes = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 4, 8))
    assert read_mask(strokes)[0, 0, 0].tolist() == [1] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((2, 8, 8, 3)), r"mask_image has shape \(2, 8, 8, 3\); expected \(H, W\), \(n, H, W\)"),
        (np.zeros(8), r"mask_image has shape \(8,\)"),
        (np.zeros((8, 8), np.int64), "mask_image has dtype int64; expected bool, uint8 or floating point"),
        (None, "mask_image is None; expected a PIL image"),
        (np.full((8, 8), np.nan), "mask_image: the mask has 64 of 64 values NaN or infinite"),
        (torch.full((8, 8), torch.inf), "mask_image: the mask has 64 of 64 values NaN or infinite"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(masks, message):
    with pytest.raises(ValueError, match=message):
        read_mask(masks)
