"""Painting part of an image anew by a token mask, and going on from known tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.blocks import BlockLayout
from nextblock.pipelines import ClassToImagePipeline
from nextblock.pipelines.editing import mask_blocks
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig

LAYOUTS = [{"layout": "scales", "scales": [1, 2, 4]}, {"layout": "tiles", "tile": [1, 4]}]


def make_pipeline(**layout) -> ClassToImagePipeline:
    """A tiny pipeline whose logits are far from uniform."""
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(image_size=16, hidden_dim=16, vocab_size=12, embedding_dim=8, **layout)).eval()
    config = BlockPriorConfig(
        layout=tokenizer.layout.to_dict(),
        vocab_size=12,
        embedding_dim=8,
        num_classes=3,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        adaln_gamma_init=1.0,
    )
    prior = BlockPrior(config).eval()
    with torch.no_grad():
        prior.head.weight.mul_(100)
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=LAYOUTS, ids=["scales", "rows"])
def pipe(request) -> ClassToImagePipeline:
    return make_pipeline(**request.param)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask_image(left: int, right: int) -> Image.Image:
    """White in the columns from left to right."""
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, left:right] = 255
    return Image.fromarray(pixels)


def encoded(pipe: ClassToImagePipeline, image: Image.Image) -> torch.Tensor:
    pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return torch.cat(pipe.tokenizer.img_to_idxBl(pixel_values), dim=1)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_black_mask_reconstructs_and_a_white_one_samples(pipe, image):
    kept = pipe.inpaint(image, mask_image(0, 0), 1, output_type="latent", generator=generator()).images
    assert torch.equal(torch.cat(kept, dim=1), encoded(pipe, image))
    painted = pipe.inpaint(image, mask_image(0, 16), 1, output_type="latent", generator=generator()).images
    sampled = pipe(1, output_type="latent", generator=generator()).images
    assert torch.equal(torch.cat(painted, dim=1), torch.cat(sampled, dim=1))


def test_tokens_outside_the_mask_stay_and_those_inside_are_sampled(pipe, image):
    options = {"num_images_per_label": 6, "output_type": "latent", "generator": generator(), "guidance_scale": 1.5}
    idx = torch.cat(pipe.inpaint(image, mask_image(8, 16), 2, **options).images, dim=1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    is_inside = torch.cat(mask_blocks(pipe.tokenizer.layout, mask), dim=1)[0]
    assert 0 < is_inside.sum() < len(is_inside)
    assert (idx[:, ~is_inside] == encoded(pipe, image)[:, ~is_inside]).all()
    assert (idx[:, is_inside] != idx[:1, is_inside]).any()


def test_one_image_a_label(pipe, image):
    images = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    idx = torch.cat(pipe.inpaint(images, mask_image(0, 0), [0, 2], 2, output_type="latent").images, dim=1)
    expected = torch.cat([encoded(pipe, each) for each in images]).repeat_interleave(2, dim=0)
    assert torch.equal(idx, expected)
    with pytest.raises(ValueError, match="image holds 2 images; expected 1 or 3"):
        pipe.inpaint(images, mask_image(0, 0), [0, 1, 2])


def test_sampling_goes_on_from_known_blocks(pipe):
    whole = pipe([0, 1], output_type="latent", generator=generator()).images
    given = [whole[0], *(torch.full_like(idx, -1) for idx in whole[1:])]
    continued = pipe([0, 1], idx_Bl=given, output_type="latent", generator=generator()).images
    assert torch.equal(torch.cat(continued, dim=1), torch.cat(whole, dim=1))
    other = [(whole[0] + 1) % 12, *given[1:]]
    continued = pipe([0, 1], idx_Bl=other, output_type="latent", generator=generator()).images
    assert torch.equal(continued[0], other[0])


def test_known_tokens_that_do_not_fit_are_refused(pipe):
    whole = pipe([0], output_type="latent").images
    with pytest.raises(ValueError, match=r"idx_Bl has 2 blocks; expected a list of \d"):
        pipe([0], idx_Bl=whole[:2])
    with pytest.raises(ValueError, match=r"given_idx_Bl\[0\] has 1 rows from 12 to 12"):
        pipe([0], idx_Bl=[torch.full_like(whole[0], 12), *whole[1:]])
    with pytest.raises(ValueError, match=r"given_idx_Bl\[0\] has 1 rows .* expected 2 rows"):
        pipe([0, 1], idx_Bl=whole)


@pytest.mark.parametrize(
    "layout",
    [BlockLayout.scales([1, 2, [2, 4]]), BlockLayout.tiles([2, 1], [2, 4])],
    ids=["scales", "tiles"],
)
def test_a_token_is_inside_when_half_of_its_area_is(layout):
    mask = (torch.rand(3, 1, 8, 16, generator=generator()) < 0.5).float()
    for k, is_inside in enumerate(mask_blocks(layout, mask)):
        height, width = layout.shapes[k]
        for row in range(height):
            for column in range(width):
                if layout.is_scales:
                    rows, columns = range(8 * row // height, 8 * (row + 1) // height), 16 // width
                    area = mask[:, 0, rows.start : rows.stop, column * columns : (column + 1) * columns]
                else:
                    area = mask[:, 0, 4 * row : 4 * row + 4, 4 * k : 4 * k + 4]
                expected = area.mean((1, 2)) >= 0.5
                assert torch.equal(is_inside[:, row * width + column], expected)
