"""Editing on a tokenizer and a prior: painting by a token mask, reconstruction, interpolation, progressive decoding.

Painting keeps tokens outside a mask and samples those inside (VAR, arXiv:2404.02905, section 5.4).
Legend: B images, K blocks, L_k tokens of block k, C code channels, H×W pixels, h×w latent cells.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput
from PIL import Image
from torch import Tensor

from nextblock.data.blocks import BlockLayout

from .sampling_request import OUTPUT_TYPES, check_counts

PICTURE_TYPES = OUTPUT_TYPES[:3]


class EditingMixin:
    """What a pipeline does with images that are given."""

    @torch.no_grad()
    def inpaint(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Paint part of an image anew: in-painting and class-conditional editing by a token mask.

        In every block, tokens outside the mask come from the encoded image and tokens inside from the prior. A token is
        inside if at least half of its area is.

        Args:
            image: one image, or one for each label; PIL, array or tensor, resized to the tokenizer's size.
            mask_image: one mask, or one for each image; white is painted anew, black is kept.
            class_labels: see `__call__`.
            num_images_per_label: see `__call__`.
            options: further arguments of `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if images, masks and labels do not fit each other, or an option is outside its range.
        """
        pixel_values, mask = self._pixels("image", image), self._mask(mask_image)
        return self._paint(pixel_values, mask, class_labels, num_images_per_label, options)

    @torch.no_grad()
    def outpaint(
        self,
        image: PipelineImageInput,
        box: tuple[int, int, int, int],
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_label: int = 1,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Paint what lies around an image: the image goes into a box of the picture, the rest is sampled.

        Args:
            image: one image, or one for each label, resized to the box.
            box: (left, top, right, bottom) in pixels of the tokenizer's size.
            class_labels: see `__call__`.
            num_images_per_label: see `__call__`.
            options: further arguments of `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if the box does not lie inside the picture, or as for `inpaint`.
        """
        H, W = self.tokenizer.config.image_size
        is_box = isinstance(box, (list, tuple)) and len(box) == 4 and all(type(n) is int for n in box)
        if not is_box or not (0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H):
            raise ValueError(f"box is {box!r}; expected (left, top, right, bottom) inside {W} by {H} pixels")
        left, top, right, bottom = box
        inside = self._pixels("image", image, (bottom - top, right - left))
        # What the encoder sees around the box is no edge that it would code.
        pixel_values = F.pad(inside, (left, W - right, top, H - bottom), mode="replicate")
        mask = torch.ones(1, 1, H, W, device=pixel_values.device)
        mask[:, :, top:bottom, left:right] = 0
        return self._paint(pixel_values, mask, class_labels, num_images_per_label, options)

    @torch.no_grad()
    def reconstruct(
        self,
        image: PipelineImageInput,
        decode_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Encode images to indices and decode them: the best that the tokenizer allows.

        Args:
            image: one or several.
            decode_batch_size: see `__call__`.
            output_type: see `__call__`.
            return_dict: see `__call__`.

        Returns:
            As `__call__`.

        Raises:
            ValueError: if the image is none, or an option is outside its range.
        """
        check_counts(output_type, decode_batch_size=decode_batch_size)
        pixel_values = self._pixels("image", image)
        with self._hooks_freed():
            idx_BL = self.tokenizer.img_to_idx(pixel_values)
            images = self.tokenizer.layout.split(idx_BL)
            if output_type != "latent":
                features = self.tokenizer.quantizer.idx_to_features(idx_BL)
                images = self._decode(features, decode_batch_size, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: PipelineImageInput,
        image_b: PipelineImageInput,
        num_steps: int = 8,
        decode_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Go from one image to another along the straight line between their quantized maps.

        Args:
            image_a: the first image.
            image_b: the last image.
            num_steps: images, the reconstructions of both among them; at least 2.
            decode_batch_size: see `__call__`.
            output_type: "pil", "np" or "pt": between two images there are no indices.
            return_dict: see `__call__`.

        Returns:
            As `__call__`, with `num_steps` images.

        Raises:
            ValueError: if there are several images on a side, or an option is outside its range.
        """
        check_counts(output_type, PICTURE_TYPES, decode_batch_size=decode_batch_size)
        if type(num_steps) is not int or num_steps < 2:
            raise ValueError(f"num_steps is {num_steps!r}; expected an integer of at least 2")
        ends = {name: self._pixels(name, image) for name, image in {"image_a": image_a, "image_b": image_b}.items()}
        for name, pixel_values in ends.items():
            if len(pixel_values) != 1:
                raise ValueError(f"{name} holds {len(pixel_values)} images; expected 1")
        with self._hooks_freed():
            idx_BL = self.tokenizer.img_to_idx(torch.cat(list(ends.values())))
            first, last = self.tokenizer.quantizer.idx_to_features(idx_BL).split(1)
            weights = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
            images = self._decode(torch.lerp(first, last, weights.view(-1, 1, 1, 1)), decode_batch_size, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _paint(self, pixel_values: Tensor, mask: Tensor, class_labels, num_images_per_label: int, options: dict):
        """Sample the tokens that lie inside a mask."""
        check_counts("pil", num_images_per_label=num_images_per_label)
        num_labels = len(self.resolve_labels(class_labels))
        for name, tensor in {"image": pixel_values, "mask_image": mask}.items():
            if len(tensor) not in (1, num_labels):
                raise ValueError(f"{name} holds {len(tensor)} images; expected 1 or {num_labels}, one a label")
        if "idx_Bl" in options:
            raise ValueError("idx_Bl is given; expected none, since the known tokens are those of the image")
        given, is_inside_Bl = [], mask_blocks(self.tokenizer.layout, mask)
        with self._hooks_freed():
            for idx, is_inside in zip(self.tokenizer.img_to_idxBl(pixel_values), is_inside_Bl, strict=True):
                block = torch.where(is_inside, -1, idx).expand(num_labels, -1)
                given.append(block.repeat_interleave(num_images_per_label, dim=0))
            return self(class_labels, num_images_per_label, idx_Bl=given, **options)

    def _pixels(self, name: str, image: PipelineImageInput, size: tuple[int, int] | None = None) -> Tensor:
        """Turn images into (B, 3, H, W) in [-1, 1]."""
        _check_images(name, image)
        pixel_values = self.image_processor.preprocess(image, *(size or self.tokenizer.config.image_size))
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"{name} gives pixels of shape {tuple(pixel_values.shape)}; expected (batch, 3, H, W)")
        largest = pixel_values.abs().amax().item()
        if not largest <= 1.001:
            raise ValueError(f"{name} reaches {largest} in absolute value; expected values in [0, 1] or [-1, 1]")
        return pixel_values.to(self._execution_device)

    def _mask(self, mask_image: PipelineImageInput) -> Tensor:
        """Turn masks into (B, 1, H, W) of 0 and 1."""
        _check_images("mask_image", mask_image)
        mask = self.mask_processor.preprocess(mask_image, *self.tokenizer.config.image_size)
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask_image has shape {tuple(mask.shape)}; expected (batch, 1, H, W)")
        return mask.to(self._execution_device)


def _check_images(name: str, image: PipelineImageInput) -> None:
    """Refuse what holds no image."""
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(each, (Image.Image, np.ndarray, Tensor)) for each in images):
        raise ValueError(f"{name} is {image!r}; expected a PIL image, an array, a tensor, or a list of them")


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
