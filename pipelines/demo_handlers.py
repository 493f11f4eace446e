"""What the buttons of the demo page do: functions of a pipeline and of the values of the page's fields.

Legend: H×W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from nextblock.data.pixels import fit_image, to_rgb
from nextblock.data.reading import read_picture
from nextblock.data.unreadable import UnreadableImageError
from nextblock.evaluation.metrics import psnr
from nextblock.evaluation.pictures import image_grid

from .demo_limits import MAX_LAYERS, DemoLimits

Captioned = tuple[Image.Image, str]
# More pictures of blocks than this say no more.
MAX_SHOWN_BLOCKS = 16
# A brush is not for single pixels.
EDITOR_SIDE = 512
NO_OTHERS = DemoLimits()


def sample(
    pipe,
    class_labels: list[int] | list[str] | None,
    num_images_per_label: int,
    seed: int,
    options: Mapping,
    is_progressive: bool = False,
    limits: DemoLimits = NO_OTHERS,
) -> tuple[list[Captioned], list[list[Image.Image]]]:
    """Sample images.

    Args:
        pipe: of classes or of texts, as for every function here.
        class_labels: label numbers, or prompts; None for a model without classes.
        num_images_per_label: images of each.
        seed: of the generator that seeds every image's own.
        options: fields of `prior.sampling.SamplingOptions`, and of texts `negative_prompt`.
        is_progressive: whether to decode the images after each block too.
        limits: of one request, as for every function here.

    Returns:
        The images with their classes' names or prompts; and the images after each block, or nothing.

    Raises:
        ValueError: as the pipeline; or if more is asked for than the limits allow.
    """
    if class_labels is not None and not isinstance(class_labels, list):
        raise ValueError(f"class_labels is {class_labels!r}; expected a list of labels")
    limits.check_count([None] if class_labels is None else class_labels, num_images_per_label)
    if is_progressive:
        num_images = len(class_labels or [None]) * num_images_per_label if type(num_images_per_label) is int else 0
        if num_images * pipe.num_timesteps > limits.max_decoded:
            raise ValueError(
                f"{num_images} images after each of {pipe.num_timesteps} blocks are asked for; expected "
                f"{limits.max_decoded} pictures at most"
            )
    count_name = pipe._condition_arguments[1]
    arguments = {count_name: num_images_per_label, "generator": _generator(seed), **options}
    frames = pipe.progressive(class_labels, **arguments) if is_progressive else []
    images = frames[-1] if is_progressive else pipe(class_labels, **arguments).images
    names = [label_name(pipe, label) for label in class_labels or []]
    captions = [name for name in names or [""] for _ in range(num_images_per_label)]
    return list(zip(images, captions, strict=True)), frames


def block_pictures(pipe, frames: Sequence[Sequence[Image.Image]], num_columns: int) -> list[Captioned]:
    """Lay out the images after evenly spaced blocks, the last among them.

    Args:
        pipe: see `sample`.
        frames: the images after each block.
        num_columns: images in a row.

    Returns:
        Up to 16 grids with the number and size of their blocks.
    """
    num_blocks, shapes = len(frames), pipe.tokenizer.layout.shapes
    shown = np.linspace(0, num_blocks - 1, min(num_blocks, MAX_SHOWN_BLOCKS)).round().astype(int)
    return [
        (
            image_grid(np.stack([np.asarray(image) for image in frames[k]]), num_columns),
            f"block {k + 1} of {num_blocks}: {shapes[k][0]}×{shapes[k][1]} tokens",
        )
        for k in shown.tolist()
    ]


def call_text(pipe, class_labels: list[int] | None, num_images_per_label: int, seed: int, options: Mapping) -> str:
    """Write down the call that gives the images of `sample`.

    Args:
        pipe, class_labels, num_images_per_label, seed, options: those of `sample`.

    Returns:
        Python, for a pipeline called `pipe`; options that are the pipeline's own are left out.
    """
    defaults = asdict(pipe.sampling)
    arguments = dict(zip(pipe._condition_arguments, (class_labels, num_images_per_label), strict=True))
    arguments |= {name: value for name, value in options.items() if value != defaults.get(name)}
    lines = [f"    {name}={value!r},\n" for name, value in arguments.items()]
    return f"images = pipe(\n{''.join(lines)}    generator=torch.Generator().manual_seed({seed}),\n).images"


def reconstruct(pipe, image: Image.Image | str | None, limits: DemoLimits = NO_OTHERS) -> list[Captioned]:
    """Show an image beside what the tokenizer keeps of it.

    Args:
        pipe: see `sample`.
        image: any size, or its file; its center is cut out, as for images that are held out of training.
        limits: of one request.

    Returns:
        The image at the tokenizer's size, and its reconstruction with its PSNR.

    Raises:
        ValueError: if there is no image.
    """
    original = fit_image(_opened(pipe, image, "image", limits), pipe.tokenizer.config.image_size)
    reconstruction = pipe.reconstruct(original).images[0]
    decibels = psnr(_levels(reconstruction), _levels(original), data_range=255).item()
    layout, (H, W) = pipe.tokenizer.layout, pipe.tokenizer.config.image_size
    num_tokens = f"{layout.num_tokens} tokens of {pipe.tokenizer.config.vocab_size} codes"
    return [(original, f"image, {H}×{W}"), (reconstruction, f"reconstruction from {num_tokens}: {decibels:.1f} dB")]


def inpaint(
    pipe,
    drawing: Mapping | None,
    class_label: int | str | None,
    num_images_per_label: int,
    seed: int,
    options: Mapping,
    limits: DemoLimits = NO_OTHERS,
) -> list[Image.Image]:
    """Paint anew what lies under the strokes of a drawing.

    Args:
        pipe: see `sample`.
        drawing: of Gradio's image editor: "background", an image, and "layers", images that are opaque where there
            are strokes.
        class_label: what to paint, or a prompt; None for a model without classes.
        num_images_per_label: pictures to paint.
        seed: of the generator that seeds every image's own.
        options: fields of `prior.sampling.SamplingOptions`.
        limits: of one request.

    Returns:
        The pictures.

    Raises:
        ValueError: if there is no background or no stroke; or as the pipeline.
    """
    limits.check_count(class_label, num_images_per_label)
    drawing = drawing or {}
    image = _opened(pipe, drawing.get("background"), "background", limits)
    layers = drawing.get("layers") or []
    sizes = {layer.size for layer in layers}
    if len(layers) > MAX_LAYERS or len(sizes) > 1:
        raise ValueError(
            f"the drawing has {len(layers)} layers of {len(sizes)} sizes; expected {MAX_LAYERS} at most, of one size"
        )
    strokes = [np.asarray(layer.convert("RGBA"))[..., 3] >= 128 for layer in layers]
    mask = np.any(strokes, axis=0) if strokes else np.zeros((1, 1), dtype=bool)
    if not mask.any():
        raise ValueError("the drawing has no strokes; expected some over what is to be painted anew")
    generator = _generator(seed)
    return pipe.inpaint(image, mask, class_label, num_images_per_label, generator=generator, **options).images


def interpolate(
    pipe,
    image_a: Image.Image | str | None,
    image_b: Image.Image | str | None,
    num_steps: int,
    limits: DemoLimits = NO_OTHERS,
) -> list[Image.Image]:
    """Go from one image to another in code space.

    Args:
        pipe: see `sample`.
        image_a: the first image, of any size, or its file.
        image_b: the last image.
        num_steps: images, the reconstructions of both among them.
        limits: of one request.

    Returns:
        The images.

    Raises:
        ValueError: if an image is missing; or as the pipeline.
    """
    limits.check_count(None, num_steps)
    ends = _opened(pipe, image_a, "first image", limits), _opened(pipe, image_b, "last image", limits)
    return pipe.interpolate(*ends, num_steps).images


def enlarged(image: Image.Image) -> Image.Image:
    """Enlarge an image by a whole factor to about 512 pixels, for a brush."""
    factor = max(1, EDITOR_SIDE // max(image.size))
    return _repeated(image, factor)


def label_name(pipe, label: int | str) -> str:
    """Name a class, by its number where it has no name; a prompt is its own name."""
    if isinstance(label, str):
        return label
    names = pipe.prior.conditions.class_names
    return names[label] if names else f"class {label}"


def prompts_of(text: str | None) -> list[str]:
    """Take prompts from a text, one a line."""
    prompts = [line.strip() for line in (text or "").split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt is {text!r}; expected a text, or several in lines of their own")
    return prompts


def _generator(seed: int) -> torch.Generator:
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; expected an integer from 0 to 2^63 − 1")
    return torch.Generator().manual_seed(seed)


def _repeated(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _opened(pipe, image: Image.Image | str | None, name: str, limits: DemoLimits) -> Image.Image:
    """Open a picture or its file as for training; one that `enlarged` made becomes what it was."""
    if image is None:
        raise ValueError(f"the {name} is missing; expected a picture")
    if isinstance(image, Image.Image):
        limits.check_pixels(*image.size)
    try:
        image = to_rgb(image) if isinstance(image, Image.Image) else read_picture(image, limits.max_pixels)
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
        raise UnreadableImageError(f"the {name}", str(image), error) from error
    H, W = pipe.tokenizer.config.image_size
    factor = image.width // W
    if factor > 1 and image.size == (W * factor, H * factor):
        reduced = image.reduce(factor)
        if np.array_equal(_repeated(reduced, factor), image):
            return reduced
    return image


def _levels(image: Image.Image) -> torch.Tensor:
    """Pixels (1, 3, H, W) from 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
