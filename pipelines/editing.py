"""Editing on a tokenizer and a prior: painting by a token mask, reconstruction, interpolation.

Painting keeps tokens outside a mask and samples those inside (VAR, arXiv:2404.02905, section 5.4). The functions do
what the pipeline's methods of the same names say.
Legend: B images, K blocks, L_k tokens of block k, H×W pixels, h×w latent cells.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from torch import Tensor

from nextblock.data.blocks import BlockLayout

from .given_images import ImageInput, images_to_pixel_values, masks_to_tensor, split_images, split_masks
from .sampling_loop import decode, hooks_freed
from .sampling_request import MAX_BATCH_SIZE, MAX_IMAGES, OUTPUT_TYPES, BatchShape, check_count, check_counts

PICTURE_TYPES = OUTPUT_TYPES[:3]
Labels = int | str | Sequence[int | str] | Tensor | None
Output = ImagePipelineOutput | tuple


def inpaint(
    pipe,
    image: ImageInput,
    mask_image: ImageInput,
    class_labels: Labels,
    num_images_per_label: int,
    fit: str,
    options: Mapping,
) -> Output:
    """Paint part of an image anew; see `ClassToImagePipeline.inpaint`."""
    images, masks = split_images("image", image), split_masks("mask_image", mask_image)
    num_labels = _count_labels(pipe, class_labels, num_images_per_label, options, image=images, mask_image=masks)
    size = pipe.tokenizer.config.image_size
    pixel_values = images_to_pixel_values("image", images, size, fit)
    mask = masks_to_tensor(masks, images, size, fit)
    return _paint(pipe, pixel_values, mask, class_labels, num_labels, num_images_per_label, options)


def outpaint(
    pipe,
    image: ImageInput,
    box: tuple[int, int, int, int],
    class_labels: Labels,
    num_images_per_label: int,
    fit: str,
    options: Mapping,
) -> Output:
    """Paint what lies around an image; see `ClassToImagePipeline.outpaint`."""
    H, W = pipe.tokenizer.config.image_size
    is_box = isinstance(box, (list, tuple)) and len(box) == 4 and all(type(n) is int for n in box)
    if not is_box or not (0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H):
        raise ValueError(f"box is {box!r}; expected (left, top, right, bottom) inside {W} by {H} pixels")
    left, top, right, bottom = box
    images = split_images("image", image)
    num_labels = _count_labels(pipe, class_labels, num_images_per_label, options, image=images)
    inside = images_to_pixel_values("image", images, (bottom - top, right - left), fit)
    # What the encoder sees around the box is no edge that it would code.
    pixel_values = F.pad(inside, (left, W - right, top, H - bottom), mode="replicate")
    mask = torch.ones(1, 1, H, W)
    mask[:, :, top:bottom, left:right] = 0
    return _paint(pipe, pixel_values, mask, class_labels, num_labels, num_images_per_label, options)


def reconstruct(
    pipe, image: ImageInput, decode_batch_size: int | None, output_type: str, return_dict: bool, fit: str
) -> Output:
    """Encode images and decode them; see `ClassToImagePipeline.reconstruct`."""
    check_counts(output_type, decode_batch_size=decode_batch_size)
    pixel_values = _pixel_values(pipe, "image", split_images("image", image), fit)
    with hooks_freed(pipe):
        idx_BL = pipe.tokenizer.img_to_idx(pixel_values)
        images = pipe.tokenizer.layout.split(idx_BL)
        if output_type != "latent":
            features = pipe.tokenizer.quantizer.idx_to_features(idx_BL)
            images = decode(pipe, features, BatchShape(num_images=decode_batch_size or MAX_BATCH_SIZE), output_type)
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def interpolate(
    pipe,
    image_a: ImageInput,
    image_b: ImageInput,
    num_steps: int,
    decode_batch_size: int | None,
    output_type: str,
    return_dict: bool,
    fit: str,
) -> Output:
    """Go from one image to another; see `ClassToImagePipeline.interpolate`."""
    check_counts(output_type, PICTURE_TYPES, decode_batch_size=decode_batch_size)
    if type(num_steps) is not int or not 2 <= num_steps <= MAX_IMAGES:
        raise ValueError(f"num_steps is {num_steps!r:.80}; expected an integer of at least 2, up to {MAX_IMAGES}")
    ends = []
    for name, image in {"image_a": image_a, "image_b": image_b}.items():
        images = split_images(name, image)
        if len(images) != 1:
            raise ValueError(f"{name} holds {len(images)} images; expected 1")
        ends.append(_pixel_values(pipe, name, images, fit))
    with hooks_freed(pipe):
        idx_BL = pipe.tokenizer.img_to_idx(torch.cat(ends))
        first, last = pipe.tokenizer.quantizer.idx_to_features(idx_BL).split(1)
        weights = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
        features = torch.lerp(first, last, weights.view(-1, 1, 1, 1))
        images = decode(pipe, features, BatchShape(num_images=decode_batch_size or MAX_BATCH_SIZE), output_type)
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def _pixel_values(pipe, name: str, images: list, fit: str) -> Tensor:
    """Bring images (B, 3, H, W) to the tokenizer's size and the pipeline's device."""
    pixel_values = images_to_pixel_values(name, images, pipe.tokenizer.config.image_size, fit)
    return pixel_values.to(pipe._execution_device)


def _count_labels(
    pipe, class_labels: Labels, num_images_per_label: int, options: Mapping, **pictures: list
) -> int:
    """Count labels; refuse images and masks of which there is neither one nor one a label."""
    check_count(pipe._condition_arguments[1], num_images_per_label)
    num_labels = pipe._count_conditions(class_labels, options)
    kind = pipe._condition_arguments[1].rpartition("_")[2]
    for name, given in pictures.items():
        if len(given) not in (1, num_labels):
            raise ValueError(f"{name} holds {len(given)} images; expected 1 or {num_labels}, one a {kind}")
    return num_labels


def _paint(
    pipe,
    pixel_values: Tensor,
    mask: Tensor,
    class_labels: Labels,
    num_labels: int,
    num_images_per_label: int,
    options: Mapping,
) -> Output:
    """Sample the tokens that lie inside a mask."""
    if "idx_Bl" in options:
        raise ValueError("idx_Bl is given; expected none, since the known tokens are those of the image")
    pixel_values, mask = pixel_values.to(pipe._execution_device), mask.to(pipe._execution_device)
    given, is_inside_Bl = [], mask_blocks(pipe.tokenizer.layout, mask)
    with hooks_freed(pipe):
        for idx, is_inside in zip(pipe.tokenizer.img_to_idxBl(pixel_values), is_inside_Bl, strict=True):
            block = torch.where(is_inside, -1, idx).expand(num_labels, -1)
            given.append(block.repeat_interleave(num_images_per_label, dim=0))
        asked = zip(pipe._condition_arguments, (class_labels, num_images_per_label), strict=True)
        return pipe(**dict(asked), idx_Bl=given, **options)


def mask_blocks(layout: BlockLayout, mask: Tensor) -> list[Tensor]:
    """Tell which tokens of each block lie inside a mask.

    Args:
        layout: the blocks.
        mask: (B, 1, H, W) in [0, 1]; 1 is inside.

    Returns:
        K boolean tensors (B, L_k), true where at least half of the token's area is inside.
    """
    if not layout.is_scales:
        cells = F.interpolate(mask, size=layout.grid, mode="area").flatten(1)
        return layout.split(cells[:, layout.tile_cells(cells.device)] >= 0.5)
    return [F.interpolate(mask, size=shape, mode="area").flatten(1) >= 0.5 for shape in layout.shapes]
