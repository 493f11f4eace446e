"""Animated pictures of progressive decoding.

Legend: K frames, N images a frame, H×W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nextblock.evaluation.pictures import image_grid

SUFFIXES = (".gif", ".webp")


def save_animation(
    frames: Sequence[Sequence[Image.Image]],
    path: str | Path,
    *,
    num_columns: int = 8,
    frame_ms: int = 300,
    last_frame_ms: int = 1500,
) -> None:
    """Save what `ClassToImagePipeline.progressive` returns as an endless animation, a grid of images a frame.

    Args:
        frames: K lists of N images.
        path: the file to write, .gif or .webp.
        num_columns: images in a row.
        frame_ms: milliseconds that each frame stays.
        last_frame_ms: milliseconds that the last frame stays.

    Raises:
        ValueError: naming the argument that is outside its range.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path is {str(path)!r}; expected a file name that ends with one of {list(SUFFIXES)}")
    for name, value in {"num_columns": num_columns, "frame_ms": frame_ms, "last_frame_ms": last_frame_ms}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a positive integer")
    is_pictures = len(frames) > 0 and all(
        len(frame) > 0 and all(isinstance(image, Image.Image) for image in frame) for frame in frames
    )
    if not is_pictures:
        raise ValueError("frames is no list of lists of PIL images; expected what `progressive` returns")
    grids = []
    for frame in frames:
        images = np.stack([np.asarray(image.convert("RGB")) for image in frame])
        grids.append(image_grid(images, min(num_columns, len(images))))
    durations = [*[frame_ms] * (len(grids) - 1), last_frame_ms]
    # Without `lossless`, WebP would blur what the tokenizer did not; GIF has no such option and ignores it.
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=durations, loop=0, lossless=True)
