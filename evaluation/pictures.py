"""Pictures for people: grids of images and training curves.

Legend: N images, HxW pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextblock.files.atomic import write_whole

_PADDING = 2
_BACKGROUND = 255
_LINE_HEIGHT, _FONT_SIZE = 16, 11
_MIN_SHOWN_SIDE = 64  # smaller images are enlarged by a whole factor to about this many pixels


def image_grid(images: np.ndarray, num_columns: int) -> Image.Image:
    """Lay images out row by row; small ones are enlarged by a whole factor.

    Args:
        images: (N, H, W, 3) uint8, N ≥ 1.
        num_columns: images in a row, ≥ 1; the last row may be shorter.

    Raises:
        ValueError: if the images are not such an array or `num_columns` is not positive.
    """
    _check_images(images)
    if num_columns < 1:
        raise ValueError(f"num_columns is {num_columns}; expected a positive integer")
    images = _enlarged(images)
    height, width = images.shape[1] + _PADDING, images.shape[2] + _PADDING
    num_rows = -(-len(images) // num_columns)
    shape = (num_rows * height + _PADDING, num_columns * width + _PADDING, 3)
    canvas = np.full(shape, _BACKGROUND, dtype=np.uint8)
    for n, image in enumerate(images):
        row, column = divmod(n, num_columns)
        top, left = row * height + _PADDING, column * width + _PADDING
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def captioned_grid(images: np.ndarray, captions: Sequence[str], num_columns: int) -> Image.Image:
    """Lay out an image grid a caption, the caption in a line under it; see `image_grid`.

    Args:
        images: (C·n, H, W, 3) uint8, n of the first caption, then n of the second, and so on.
        captions: C texts; what does not fit is cut.
        num_columns: images in a row, a multiple of n ≥ 1.

    Raises:
        ValueError: if the images are not equally many of each caption.
    """
    _check_images(images)
    if not captions or len(images) % len(captions) or num_columns % (n := len(images) // len(captions)):
        raise ValueError(
            f"there are {len(images)} images, {len(captions)} captions and {num_columns} columns; expected equally "
            "many images of each caption, and columns for all of them"
        )
    cells = [image_grid(images[start : start + n], n) for start in range(0, len(images), n)]
    width, height = cells[0].width, cells[0].height + _LINE_HEIGHT
    per_row = num_columns // n
    sheet = Image.new("RGB", (per_row * width, -(-len(cells) // per_row) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        left, top = number % per_row * width, number // per_row * height
        sheet.paste(cell, (left, top))
        while caption and font.getlength(caption) > width - 2 * _PADDING:
            caption = caption.removesuffix("…")[:-1] + "…" if len(caption) > 2 else ""
        draw.text((left + _PADDING, top + cell.height - 1), caption, "black", font)
    return sheet


def comparison_grid(originals: np.ndarray, reconstructions: np.ndarray, num_columns: int) -> Image.Image:
    """Lay out rows of originals, each above the row of their reconstructions.

    Args:
        originals: (N, H, W, 3) uint8, N ≥ 1.
        reconstructions: the same shape.
        num_columns: images in a row, ≥ 1; images that do not fill a row are left out, except in a single one.

    Raises:
        ValueError: if the shapes differ or are not images.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals have shape {originals.shape}, reconstructions {reconstructions.shape}; expected equal"
        )
    _check_images(originals)
    num_columns = min(num_columns, len(originals))
    rows = []
    for start in range(0, len(originals) - num_columns + 1, num_columns):
        rows += [originals[start : start + num_columns], reconstructions[start : start + num_columns]]
    return image_grid(np.concatenate(rows), num_columns)


def class_grid(
    images: np.ndarray, class_labels: np.ndarray, num_columns: int = 10, max_rows: int = 10
) -> Image.Image:
    """Lay out the first images of each class, one class a row, in order of first appearance.

    Args:
        images: (N, H, W, 3) uint8, N ≥ 1.
        class_labels: (N,) integers.
        num_columns: the most images of a class, ≥ 1; a class with fewer leaves the rest of its row empty.
        max_rows: the most classes shown.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_images(images)
    if class_labels.shape != (len(images),):
        raise ValueError(f"class_labels have shape {class_labels.shape}; expected ({len(images)},)")
    labels = list(dict.fromkeys(class_labels.tolist()))[:max_rows]
    rows = [images[class_labels == label][:num_columns] for label in labels]
    num_columns = max(len(row) for row in rows)
    blank = np.full((1, *images.shape[1:]), _BACKGROUND, dtype=np.uint8)
    padded = [np.concatenate([row, *[blank] * (num_columns - len(row))]) for row in rows]
    return image_grid(np.concatenate(padded), num_columns)


def neighbour_grid(samples: np.ndarray, nearest: np.ndarray, num_columns: int = 5) -> Image.Image:
    """Lay out pairs, each image with the reference that is nearest to it on its right.

    Args:
        samples: (N, H, W, 3) uint8, N ≥ 1.
        nearest: (N, H', W', 3) uint8, what is nearest to each; of another size it is brought to that of the samples.
        num_columns: pairs in a row, ≥ 1.

    Raises:
        ValueError: if the shapes do not fit.
    """
    for images in (samples, nearest):
        _check_images(images)
    if len(samples) != len(nearest):
        raise ValueError(f"there are {len(samples)} samples and {len(nearest)} nearest images; expected equally many")
    if samples.shape != nearest.shape:
        size = samples.shape[2], samples.shape[1]
        nearest = np.stack([Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in nearest])
    samples, nearest = _enlarged(samples), _enlarged(nearest)
    gap = np.full((len(samples), samples.shape[1], max(1, samples.shape[2] // 8), 3), _BACKGROUND, np.uint8)
    # The two touch; pairs are apart.
    return image_grid(np.concatenate([samples, nearest, gap], axis=2), min(num_columns, len(samples)))


def _enlarged(images: np.ndarray) -> np.ndarray:
    """Enlarge small images by a whole factor."""
    zoom = max(1, round(_MIN_SHOWN_SIDE / max(images.shape[1:3])))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)


def save_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], path: str | Path, over: str = "step"
) -> None:
    """Draw named curves over steps, one panel beside the other, and save the picture.

    Args:
        panels: title → name of a curve → (steps, values); a panel without curves says so.
        path: the file to write; its suffix chooses the format.
        over: what the steps are, for the axis.

    Raises:
        ValueError: if there is no panel.
    """
    if not panels:
        raise ValueError("panels is empty; expected at least one panel of curves")
    # Figure, not pyplot: no global state, no window system, and the Agg canvas is its default.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel(over)
        for name, (steps, values) in curves.items():
            marker = "o" if len(steps) < 20 else None
            axes.plot(steps, values, label=name, linewidth=1, marker=marker, markersize=3)
        if curves:
            axes.legend()
            axes.grid(alpha=0.3)
        else:
            axes.text(0.5, 0.5, "no curves recorded", ha="center", va="center", transform=axes.transAxes)
    write_whole(Path(path), partial(figure.savefig, format=Path(path).suffix[1:], dpi=100))


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save a picture as PNG; the file is whole or not there.

    Args:
        picture: any.
        path: the file to write.
    """
    write_whole(path, partial(picture.save, format="PNG"))


def _check_images(images: np.ndarray) -> None:
    """Refuse anything but a non-empty uint8 stack of RGB images."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"images have shape {images.shape} and dtype {images.dtype}; expected (N, H, W, 3) uint8, N ≥ 1"
        )
