"""Images and masks as people give them to a pipeline: PIL images, arrays or tensors, one or several.

Legend: B images, H×W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextblock.data.finite import check_finite
from nextblock.data.given import FLOAT_DTYPES, check_tensor
from nextblock.data.pixels import check_fit, fit_image, to_pictures, to_pixel_values, to_rgb
from nextblock.data.unreadable import UnreadableModeError

ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


def split_images(name: str, images: ImageInput) -> list[Image.Image | Tensor]:
    """Take images apart.

    Args:
        name: of the argument, for messages.
        images: PIL images of any mode, arrays (H, W, 3) or (n, H, W, 3), tensors (3, H, W) or (n, 3, H, W), uint8 or
            floating point; one or a sequence.

    Returns:
        B upright RGB pictures or tensors (3, H, W).

    Raises:
        ValueError: naming the argument where it holds no images.
    """
    found = []
    for each in _elements(name, images):
        if isinstance(each, Image.Image):
            found.append(_opened(name, each, "white"))
            continue
        pixels = _as_tensor(name, each, "uint8 or floating point")
        if isinstance(each, np.ndarray) and pixels.ndim >= 3:
            pixels = pixels.movedim(-1, -3)
        if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or not pixels.numel():
            expected = "(H, W, 3) or (n, H, W, 3)" if isinstance(each, np.ndarray) else "(3, H, W) or (n, 3, H, W)"
            raise ValueError(f"{name} has shape {tuple(each.shape)}; expected {expected}")
        found += pixels if pixels.ndim == 4 else [pixels]
    return found


def split_masks(name: str, masks: ImageInput) -> list[Image.Image]:
    """Take masks apart.

    Args:
        name: of the argument, for messages.
        masks: PIL images, transparent ones laid over black; arrays and tensors (H, W) or (n, H, W), the array with one
            channel at the end or the tensor with one before H: bool, floating point in [0, 1], or uint8 from 0 to 255
            or of 0 and 1.

    Returns:
        Grey pictures, white where a mask is.

    Raises:
        ValueError: naming the argument where it holds no masks.
    """
    found = []
    for each in _elements(name, masks):
        if isinstance(each, Image.Image):
            found.append(_opened(name, each, "black").convert("L"))
            continue
        levels = _as_tensor(name, each, "bool, uint8 or floating point")
        channel = -1 if isinstance(each, np.ndarray) else -3
        if levels.ndim == 4 or (levels.ndim == 3 and levels.shape[channel] == 1):
            levels = levels.squeeze(channel)
        if levels.ndim not in (2, 3) or not levels.numel():
            raise ValueError(f"{name} has shape {tuple(each.shape)}; expected (H, W), (n, H, W) or one channel more")
        if levels.is_floating_point():
            check_finite(name, {"the mask": levels})
            lowest, highest = levels.min().item(), levels.max().item()
            if not -0.001 <= lowest <= highest <= 1.001:
                raise ValueError(f"{name} spans {lowest:g} to {highest:g}; expected numbers from 0 to 1, bool or uint8")
        # A picture whose lightest pixel is 1 of 255 is no mask.
        if levels.dtype != torch.uint8 or levels.max() <= 1:
            levels = (levels.float().clamp(0, 1) * 255).round().to(torch.uint8)
        levels = levels.cpu().numpy()
        found += [Image.fromarray(mask) for mask in (levels if levels.ndim == 3 else levels[None])]
    return found


def images_to_pixel_values(
    name: str, images: list[Image.Image | Tensor], image_size: tuple[int, int], fit: str
) -> Tensor:
    """Bring images to size and range.

    Args:
        name: of the argument, for messages.
        images: B pictures or tensors, see `split_images`; floating-point ones all in [0, 1], or all in [-1, 1] where
            there is a negative value. Those that have the size keep their values; others go by pictures of 8 bits.
        image_size: (H, W).
        fit: see `nextblock.data.pixels.fit_image`.

    Returns:
        (B, 3, H, W) float32 in [-1, 1].

    Raises:
        ValueError: if values lie outside their range or `fit` is unknown.
    """
    check_fit(fit)
    is_signed = any(_is_floating(each) and each.min().item() < 0 for each in images)
    found = []
    for each in images:
        if _is_floating(each):
            largest = each.abs().amax().item()
            if not largest <= (1.001 if is_signed else 1.0005):
                raise ValueError(f"{name} reaches {largest} in absolute value; expected values in [0, 1] or [-1, 1]")
            each = each.float() if is_signed else 2.0 * each.float() - 1.0
            if tuple(each.shape[1:]) == tuple(image_size):
                found.append(each[None].cpu())
                continue
            each = to_pictures(each[None])[0]
        elif isinstance(each, Tensor):
            each = Image.fromarray(each.movedim(0, -1).cpu().contiguous().numpy())
        found.append(to_pixel_values(np.array(fit_image(each, image_size, fit))[None]))
    return torch.cat(found)


def masks_to_tensor(
    masks: list[Image.Image], images: list[Image.Image | Tensor], image_size: tuple[int, int], fit: str
) -> Tensor:
    """Bring masks to size as the images that they lie over; a mask of another size is first stretched over its image.

    Args:
        masks: one for all images, or one an image; several may lie over a single image.
        images: one or B pictures or tensors.
        image_size: (H, W).
        fit: see `nextblock.data.pixels.fit_image`.

    Returns:
        (B, 1, H, W) float32, 1 where a mask is at least half white and 0 elsewhere; B is 1 for one of each.
    """
    count = max(len(masks), len(images))
    assert count % len(masks) == count % len(images) == 0, (len(masks), len(images))
    masks, images = masks * (count // len(masks)), images * (count // len(images))
    found = []
    for mask, image in zip(masks, images, strict=True):
        size = image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])
        # A box filter measures areas.
        mask = mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)
        found.append(np.array(fit_image(mask, image_size, fit)) >= 128)
    return torch.from_numpy(np.stack(found)[:, None]).float()


def _elements(name: str, images: ImageInput) -> list:
    """Refuse what holds no image."""
    elements = list(images) if isinstance(images, (list, tuple)) else [images]
    if not elements or not all(isinstance(each, (Image.Image, np.ndarray, Tensor)) for each in elements):
        raise ValueError(f"{name} is {images!r}; expected a PIL image, an array, a tensor, or a list of them")
    return elements


def _opened(name: str, image: Image.Image, background: str) -> Image.Image:
    """Open a picture as for training."""
    if not all(image.size):
        raise ValueError(f"{name} is {image.size[0]} by {image.size[1]} pixels; expected at least 1 by 1")
    try:
        return to_rgb(image, background)
    except UnreadableModeError as error:
        raise ValueError(f"{name} has {error}") from error


def _as_tensor(name: str, values: np.ndarray | Tensor, kinds: str) -> Tensor:
    """Turn an array into a tensor; refuse values of another kind."""
    if isinstance(values, np.ndarray):
        is_float, is_taken = np.issubdtype(values.dtype, np.floating), str(values.dtype) in kinds
    else:
        is_float, is_taken = values.is_floating_point(), str(values.dtype).removeprefix("torch.") in kinds
    if not (is_float or is_taken):
        raise ValueError(f"{name} has dtype {values.dtype}; expected {kinds}")
    if isinstance(values, Tensor):
        check_tensor(name, values, kinds)
        if values.is_meta or (is_float and values.dtype not in FLOAT_DTYPES):
            raise ValueError(f"{name} is {values.dtype} on {values.device}; expected values of {kinds}")
        return values.detach()
    return torch.from_numpy(np.array(values, np.float32 if is_float else values.dtype, order="C"))


def _is_floating(image: Image.Image | Tensor) -> bool:
    """Whether an image is a tensor of floating-point values."""
    return isinstance(image, Tensor) and image.is_floating_point()
