"""A picture becomes pixel values here, and pixel values a picture, for training, jobs and editing alike.

Legend: N images, H×W pixels; pixel values are float32 (N, 3, H, W) in [-1, 1], pictures PIL images of 8 bits.
"""

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from .augment import cover_and_crop
from .unreadable import UnreadableModeError

FITS = ("crop", "stretch", "pad")
# What brings a picture with each orientation tag upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Turns an image upright as its orientation tag says and converts it to RGB.

    Args:
        image: grey, palette, CMYK and other 8-bit modes; transparent, laid over the background; 16-bit grey, whose
            levels are divided by 257.
        background: colour by name.

    Returns:
        RGB image.

    Raises:
        UnreadableModeError: for floating-point images and integers beyond 16 bits, whose range is unknown, and for
            colour spaces that are not known here.
    """
    given, image = image, _upright(image)
    if image.mode.startswith("I"):
        image = _grey_of_8_bits(image)
    if image.mode in ("F", "LAB"):
        kind = "floating-point" if image.mode == "F" else "CIELAB"
        raise UnreadableModeError(f"{kind} pixels (mode {image.mode!r}); expected 8 or 16 bits, grey, RGB or CMYK")
    if image.mode in ("La", "RGBa"):  # multiplied by their transparency
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = _with_alpha(image)
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    # Never the one that was given, which is somebody else's, or an open file.
    return image if image.mode == "RGB" and image is not given else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turns an image as its orientation tag says, whatever its other tags hold."""
    image.load()  # PIL turns some kinds itself while it loads them
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # tags that cannot be read say nothing of the orientation, and all viewers show such pictures
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Rounds 16-bit grey to 8 bits; a level that is transparent becomes an alpha channel."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise UnreadableModeError(f"pixels from {levels.min()} to {levels.max()}; expected 16 bits, 0 to 65535")
    grey = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def _with_alpha(image: Image.Image) -> Image.Image:
    """Converts a transparent image to RGBA."""
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        # Of a colour of 16 bits PIL keeps the upper eight, but not of the one that is transparent.
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    return image.convert("RGBA")


def check_fit(fit: str) -> None:
    """Refuses what is no way of bringing a picture to size.

    Raises:
        ValueError: naming the value and what was expected.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; expected one of {list(FITS)}")


def fit_image(image: Image.Image, image_size: tuple[int, int], fit: str = "crop") -> Image.Image:
    """Brings a picture to size (Lanczos).

    Args:
        image: RGB or grey, any size.
        image_size: (H, W) of the result.
        fit: "crop" cuts the center out of the smallest picture that covers the size, which is how images that are held
            out of training are seen; "stretch" changes proportions; "pad" repeats the edges around the whole picture.

    Returns:
        The picture, `image` itself where its size fits already.

    Raises:
        ValueError: if `fit` is none of these.
    """
    check_fit(fit)
    height, width = image_size
    if image.size == (width, height):
        return image
    if fit == "crop":
        return cover_and_crop(image, image_size)
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return _padded(image, height, width)


def _padded(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest copy that fits in, at the center, its edges repeated."""
    scale = min(width / image.width, height / image.height)
    inner_width, inner_height = (max(1, round(scale * side)) for side in image.size)
    inner = np.asarray(image.resize((inner_width, inner_height), Image.Resampling.LANCZOS))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    around = [(top, height - inner_height - top), (left, width - inner_width - left)]
    return Image.fromarray(np.pad(inner, around + [(0, 0)] * (inner.ndim - 2), mode="edge"))


def to_pixel_values(
    pixels: np.ndarray | Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Turns bytes into pixel values, the same numbers on every device.

    Args:
        pixels: (N, H, W, 3) uint8; an array, or a tensor on the device where the values are wanted.
        memory_format: how a tensor's values lie in memory.

    Returns:
        (N, 3, H, W) float32 in [-1, 1].
    """
    if isinstance(pixels, np.ndarray):
        # On the CPU numpy does it in half the time that torch takes.
        values = np.divide(pixels.transpose(0, 3, 1, 2), np.float32(127.5), order="C")
        values -= 1
        return torch.from_numpy(values)
    # A divisor on the device: a Python number would be multiplied by its rounded reciprocal there.
    half_range = torch.full((), 127.5, device=pixels.device)
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format) / half_range - 1


def to_uint8(pixel_values: Tensor) -> np.ndarray:
    """Turns pixel values into bytes, rounding to nearest and clipping what lies outside.

    Args:
        pixel_values: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, H, W, 3) uint8.
    """
    levels = (pixel_values.detach().float().cpu() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def to_pictures(pixel_values: Tensor) -> list[Image.Image]:
    """Turns pixel values into pictures.

    Args:
        pixel_values: (N, 3, H, W) in [-1, 1].

    Returns:
        N RGB pictures.
    """
    return [Image.fromarray(pixels) for pixels in to_uint8(pixel_values)]


def to_output(pixel_values: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Turns pixel values into what a pipeline hands out.

    Args:
        pixel_values: (N, 3, H, W) in [-1, 1].
        output_type: "pil", "np" or "pt".

    Returns:
        N RGB pictures; or in [0, 1] an array (N, H, W, 3), or a tensor (N, 3, H, W) on its device.
    """
    if output_type == "pil":
        return to_pictures(pixel_values)
    levels = (pixel_values * 0.5 + 0.5).clamp(0, 1)
    return levels if output_type == "pt" else levels.cpu().permute(0, 2, 3, 1).numpy()
