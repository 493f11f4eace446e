"""Resizing, cropping and random placement of one image, keyed on (seed, epoch, index).

Everything random about an image is drawn at once, and shift, rotation, scale and shear are composed into one
affine resampling. Sizes are (height, width); arrays are (H, W, 3) uint8.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# A picture is resized to the square of its ratio to the target's area.
MAX_RATIO = 16
# A resized picture of up to so many times the area to be covered is made whole.
_MAX_COVER = 32
# Beyond that, so many times the crop's longer side is kept on either side of the crop, for what a shift brings in.
_SURROUNDINGS = 4


@dataclass(kw_only=True)
class TransformConfig:
    """How images are brought to size and varied; with the defaults a deterministic center crop."""

    resize_ratio: float = 1.0
    """The shorter side is resized to this multiple of the target size before the crop (1 or more)."""
    random_crop: bool = False
    """Crop at a random position; otherwise at the center."""
    horizontal_flip: bool = False
    """Mirror half of the images left to right."""
    max_shift: float = 0.0
    """Largest shift along each axis, in pixels of the result."""
    max_rotation: float = 0.0
    """Largest rotation either way about the center, in degrees (0 to 180)."""
    max_scale: float = 0.0
    """Largest enlargement or reduction, as a fraction of the size (0.06 scales by 0.94 to 1.06; below 1)."""
    max_shear: float = 0.0
    """Largest horizontal shear either way, in pixels per pixel of height."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling of shift, rotation, scale and shear: "bilinear" is truer for smooth images such as upsampled
    digits and twice as fast, "bicubic" keeps more of the detail of photographs."""

    def __post_init__(self):
        if not 1 <= self.resize_ratio <= MAX_RATIO:
            raise ValueError(f"resize_ratio={self.resize_ratio}: expected a number from 1 to {MAX_RATIO}")
        for name in ("max_shift", "max_rotation", "max_scale", "max_shear"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: expected a finite number of 0 or more")
        if self.max_rotation > 180:
            raise ValueError(f"max_rotation={self.max_rotation}: expected at most 180 degrees")
        if self.max_scale >= 1:
            raise ValueError(f"max_scale={self.max_scale}: expected less than 1")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation={self.interpolation!r}: expected one of {sorted(_RESAMPLING)}")

    @property
    def has_affine(self) -> bool:
        """Whether images are resampled by a random affine map."""
        return any((self.max_shift, self.max_rotation, self.max_scale, self.max_shear))

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the key."""
        return self.random_crop or self.horizontal_flip or self.has_affine


class Placement(NamedTuple):
    """What is drawn for one image; the defaults change nothing and crop at the center."""

    crop: tuple[float, float] | None = None
    """Position (y, x) of the crop in its free space, each in [0, 1); None for the center."""
    is_flipped: bool = False
    shift: tuple[float, float] = (0.0, 0.0)
    """(y, x) in pixels of the result, down and right."""
    rotation: float = 0.0
    """Degrees, counter-clockwise as seen on a screen."""
    scale: float = 1.0
    shear: float = 0.0
    """Rightward displacement per pixel downward, applied before the rotation."""


def draw_placement(config: TransformConfig, seed: int, epoch: int, index: int) -> Placement:
    """Draws the placement of one image, a pure function of its arguments.

    Args:
        config: the ranges to draw from.
        seed: 0 or more, as are `epoch` and `index`; any change of one of them gives independent draws.
        epoch: the pass over the data.
        index: the image's position in its source.

    Returns:
        The placement. Every number has its own place in the stream: switching one option on leaves the draws
        of the others as they were.
    """
    if not config.is_random:
        return Placement()
    draws = np.random.default_rng((seed, epoch, index)).random(8).tolist()
    crop_y, crop_x, flip = draws[:3]
    shift_y, shift_x, rotation, scale, shear = (2 * draw - 1 for draw in draws[3:])
    return Placement(
        crop=(crop_y, crop_x) if config.random_crop else None,
        is_flipped=config.horizontal_flip and flip < 0.5,
        shift=(config.max_shift * shift_y, config.max_shift * shift_x),
        rotation=config.max_rotation * rotation,
        scale=1 + config.max_scale * scale,
        shear=config.max_shear * shear,
    )


def apply_transform(
    image: Image.Image,
    image_size: tuple[int, int],
    config: TransformConfig,
    seed: int,
    epoch: int,
    index: int,
) -> np.ndarray:
    """Brings one image to size and varies it as its key (seed, epoch, index) says.

    Args:
        image: RGB, any size.
        image_size: (H, W) of the result.
        config: what to vary and how much.
        seed: 0 or more, as are `epoch` and `index`.
        epoch: the pass over the data.
        index: the image's position in its source.

    Returns:
        uint8 array (H, W, 3), read-only.
    """
    assert image.mode == "RGB", image.mode
    placement = draw_placement(config, seed, epoch, index)
    if config.has_affine:
        image, corner = _resize_around(image, image_size, config.resize_ratio, placement.crop, has_surroundings=True)
        image = warp(image, image_size, corner, placement, config.interpolation)
    else:
        image = cover_and_crop(image, image_size, config.resize_ratio, placement.crop)
    pixels = _pixels(image)
    return pixels[:, ::-1] if placement.is_flipped else pixels


def cover_and_crop(
    image: Image.Image, image_size: tuple[int, int], ratio: float = 1.0, position: tuple[float, float] | None = None
) -> Image.Image:
    """Resizes (Lanczos), keeping proportions, to the smallest size that covers `ratio` times the target, and crops.

    Args:
        image: any mode and size.
        image_size: (H, W) of the crop.
        ratio: 1 or more.
        position: (y, x) of the crop in its free space, each in [0, 1]; None for the center.

    Returns:
        The crop, or `image` itself where it is all of it.
    """
    image, (top, left) = _resize_around(image, image_size, ratio, position)
    height, width = image_size
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def cover_size(size: tuple[int, int], image_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Returns the size (width, height) that a picture of a size (width, height) is resized to."""
    box_height, box_width = (round(ratio * side) for side in image_size)
    width, height = size
    if width * box_height >= height * box_width:
        return (width * box_height // height, box_height)
    return (box_width, height * box_width // width)


def _resize_around(
    image: Image.Image,
    image_size: tuple[int, int],
    ratio: float,
    position: tuple[float, float] | None,
    has_surroundings: bool = False,
) -> tuple[Image.Image, tuple[int, int]]:
    """Resizes to cover the target; returns the picture and the (top, left) of the crop in it.

    Of a picture that would become very long, only the part around the crop is made: a line of pixels one wide would
    take gigabytes otherwise. Its pixels may differ from those of the whole by a rounding.
    """
    size = cover_size(image.size, image_size, ratio)
    top, left = _crop_corner(size, image_size, position)
    if size == image.size:
        return image, (top, left)
    if size[0] * size[1] <= _MAX_COVER * round(ratio * image_size[0]) * round(ratio * image_size[1]):
        return image.resize(size, Image.Resampling.LANCZOS), (top, left)
    axis = int(size[1] > size[0])
    corner, length = (left, top)[axis], image_size[1 - axis]
    margin = _SURROUNDINGS * max(image_size) if has_surroundings else 0
    start, end = max(0, corner - margin), min(size[axis], corner + length + margin)
    scale = image.size[axis] / size[axis]
    # Lanczos looks three pixels far, of whichever grid is the coarser; only so much is handed to it, as it computes
    # places in float32.
    reach = math.ceil(3 * max(1.0, scale)) + 1
    first, last = max(0, int(start * scale) - reach), min(image.size[axis], math.ceil(end * scale) + reach)
    box, part, result = [0.0, 0.0, *image.size], [0, 0, *image.size], list(size)
    part[axis], part[axis + 2] = first, last
    box[axis], box[axis + 2] = start * scale - first, min(end * scale - first, last - first)
    result[axis] = end - start
    image = image.crop(tuple(part)).resize(tuple(result), Image.Resampling.LANCZOS, box=tuple(box))
    return image, ((top, left - start), (top - start, left))[axis]


def warp(
    image: Image.Image,
    image_size: tuple[int, int],
    corner: tuple[int, int],
    placement: Placement,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Shears, rotates, scales and shifts about the center of a crop and cuts the crop out, in one resampling.

    What comes into view from outside the crop is the image where it reaches that far, and beyond it the
    per-channel median of the image's border: the background where there is one (the mean would be grey around
    digits that touch the edge).

    Args:
        image: RGB, at least as large as the crop.
        image_size: (H, W) of the crop.
        corner: (top, left) of the crop, in pixels.
        placement: shift, rotation, scale and shear; its crop and flip are not applied here.
        interpolation: "bilinear" or "bicubic".

    Returns:
        RGB image of the crop's size.
    """
    (height, width), (top, left) = image_size, corner
    angle = math.radians(placement.rotation)
    cosine, sine = math.cos(angle) / placement.scale, math.sin(angle) / placement.scale
    # The inverse map, result to source: unrotate and unscale, then unshear. The y axis points down.
    xx, xy = cosine - placement.shear * sine, -sine - placement.shear * cosine
    yx, yy = sine, cosine
    from_y, from_x = height / 2 + placement.shift[0], width / 2 + placement.shift[1]
    offset_x = left + width / 2 - xx * from_x - xy * from_y
    offset_y = top + height / 2 - yx * from_x - yy * from_y
    fill = _border_median(_pixels(image))
    # Without a fill colour PIL fills with black, and is faster.
    return image.transform(
        (width, height),
        Image.Transform.AFFINE,
        (xx, xy, offset_x, yx, yy, offset_y),
        resample=_RESAMPLING[interpolation],
        fillcolor=fill if any(fill) else None,
    )


def _crop_corner(
    size: tuple[int, int], image_size: tuple[int, int], position: tuple[float, float] | None
) -> tuple[int, int]:
    """(top, left) of the crop in a size (width, height); a center between two pixels is rounded to the even one."""
    free = (size[1] - image_size[0], size[0] - image_size[1])
    assert min(free) >= 0, (size, image_size)
    if position is None:
        return round(free[0] / 2), round(free[1] / 2)
    return min(free[0], int(position[0] * (free[0] + 1))), min(free[1], int(position[1] * (free[1] + 1)))


def _pixels(image: Image.Image) -> np.ndarray:
    """The image as a read-only uint8 array (H, W, 3)."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _border_median(pixels: np.ndarray) -> tuple[int, ...]:
    """The per-channel (upper) median of the outermost rows and columns."""
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    middle = len(border) // 2
    border.partition(middle, axis=0)
    return tuple(border[middle].tolist())
