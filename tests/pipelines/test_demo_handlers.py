"""What the demo page's buttons do, bit for bit as the pipeline itself."""

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.pixels import fit_image
from nextblock.evaluation.metrics import psnr
from nextblock.evaluation.pictures import image_grid
from nextblock.pipelines import demo_handlers as handlers
from nextblock.pipelines.demo_limits import BodyLimit, DemoLimits, one_line

OPTIONS = {
    "guidance_scale": 1.5,
    "guidance_schedule": "linear",
    "guidance_power": 1.0,
    "temperature": 0.9,
    "top_k": 6,
    "top_p": 0.95,
    "min_p": 0.01,
    "is_smooth": False,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawing(image: Image.Image, *boxes: tuple[int, int, int, int]) -> dict:
    """What the editor gives after strokes over boxes, each on a layer of its own."""
    layers = []
    for box in boxes:
        layers.append(Image.new("RGBA", image.size))
        layers[-1].paste((255, 112, 67, 255), box)
    return {"background": image.convert("RGBA"), "layers": layers, "composite": None}


@pytest.mark.parametrize("is_progressive", [False, True])
def test_samples_are_those_of_the_pipeline(any_pipe, is_progressive):
    drawn, frames = handlers.sample(any_pipe, [2, 0], 3, 7, OPTIONS, is_progressive)
    images, captions = zip(*drawn, strict=True)
    expected = any_pipe([2, 0], num_images_per_label=3, generator=generator(7), **OPTIONS).images
    assert np.array_equal(stacked(images), stacked(expected))
    assert captions == ("wren",) * 3 + ("blue tit",) * 3
    expected = any_pipe.progressive([2, 0], 3, generator=generator(7), **OPTIONS) if is_progressive else []
    assert len(frames) == len(expected)
    for frame, images in zip(frames, expected, strict=True):
        assert np.array_equal(stacked(frame), stacked(images))


def test_blocks_are_laid_out_and_named(build_pipeline):
    pipe = build_pipeline()
    frames = pipe.progressive([0, 1], 2)
    grids, captions = zip(*handlers.block_pictures(pipe, frames, 3), strict=True)
    for grid, frame in zip(grids, frames, strict=True):
        assert np.array_equal(grid, image_grid(stacked(frame), 3))
    assert captions == tuple(f"block {k + 1} of 3: {side}×{side} tokens" for k, side in enumerate((1, 2, 4)))


def test_of_many_blocks_some_are_shown(build_pipeline, monkeypatch):
    monkeypatch.setattr(handlers, "MAX_SHOWN_BLOCKS", 3)
    pipe = build_pipeline("rows")
    shown = handlers.block_pictures(pipe, pipe.progressive([1]), 1)
    assert [caption for _, caption in shown] == [f"block {k} of 4: 1×4 tokens" for k in (1, 3, 4)]


def test_a_model_without_classes_samples_a_number(build_pipeline):
    pipe = build_pipeline(num_classes=0)
    drawn, _ = handlers.sample(pipe, None, 5, 3, {})
    assert np.array_equal(stacked(image for image, _ in drawn), stacked(pipe(5, generator=generator(3)).images))
    assert {caption for _, caption in drawn} == {""}


def test_the_written_call_gives_the_same_images(build_pipeline):
    pipe = build_pipeline()
    text = handlers.call_text(pipe, [1, 2], 2, 11, OPTIONS)
    assert "top_k=6" in text and "is_smooth" not in text and "guidance_power" not in text
    names = {"pipe": pipe, "torch": torch}
    exec(text, names)
    drawn, _ = handlers.sample(pipe, [1, 2], 2, 11, OPTIONS)
    assert np.array_equal(stacked(names["images"]), stacked(image for image, _ in drawn))


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (21, 50)])
def test_reconstruction_beside_the_image(any_pipe, size):
    image = picture(size=size)
    (original, caption), (reconstruction, figures) = handlers.reconstruct(any_pipe, image)
    assert caption == "image, 16×16"
    assert np.array_equal(original, fit_image(image, (16, 16)))
    assert np.array_equal(reconstruction, any_pipe.reconstruct(original).images[0])
    pixels = [torch.from_numpy(np.array(each)).double()[None] / 127.5 - 1 for each in (reconstruction, original)]
    assert figures.endswith(f"of 12 codes: {psnr(*pixels).item():.1f} dB")


def test_an_enlarged_image_comes_back_as_it_was(any_pipe):
    image = picture()
    enlarged = handlers.enlarged(image)
    assert enlarged.size == (512, 512)
    (original, _), _ = handlers.reconstruct(any_pipe, enlarged)
    assert np.array_equal(original, image)


def test_strokes_of_all_layers_are_painted_anew(any_pipe):
    image, mask = picture(), Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    given = drawing(image, (8, 0, 16, 8), (8, 8, 16, 16))
    painted = handlers.inpaint(any_pipe, given, 1, 3, 5, OPTIONS)
    expected = any_pipe.inpaint(image, mask, 1, 3, generator=generator(5), **OPTIONS).images
    assert np.array_equal(stacked(painted), stacked(expected))
    assert len(np.unique(stacked(painted).reshape(3, -1), axis=0)) > 1


def test_strokes_lie_where_they_were_drawn_on_a_picture_of_any_size(build_pipeline):
    pipe, image = build_pipeline("rows"), picture(size=(48, 32))
    # The top quarter, which is the first of four rows.
    painted = handlers.inpaint(pipe, drawing(image, (0, 0, 48, 8)), 1, 2, 5, OPTIONS)
    mask = np.zeros((16, 16), bool)
    mask[:4] = True
    expected = pipe.inpaint(fit_image(image, (16, 16)), mask, 1, 2, generator=generator(5), **OPTIONS).images
    assert np.array_equal(stacked(painted), stacked(expected))


def test_a_sample_made_large_is_painted_on_as_it_was(build_pipeline):
    pipe = build_pipeline("rows")
    image, mask = pipe(1, generator=generator(2)).images[0], np.zeros((16, 16), bool)
    mask[8:] = True
    painted = handlers.inpaint(pipe, drawing(handlers.enlarged(image), (0, 256, 512, 512)), 1, 2, 5, OPTIONS)
    expected = pipe.inpaint(image, mask, 1, 2, generator=generator(5), **OPTIONS).images
    assert np.array_equal(stacked(painted), stacked(expected))


def test_a_model_without_classes_in_paints(build_pipeline):
    pipe = build_pipeline(num_classes=0)
    painted = handlers.inpaint(pipe, drawing(picture(), (0, 0, 16, 16)), None, 2, 5, {})
    assert np.array_equal(stacked(painted), stacked(pipe(2, generator=generator(5)).images))


def test_interpolation_is_the_pipelines(any_pipe):
    first, last = picture(0), picture(1)
    images = handlers.interpolate(any_pipe, first, last, 4)
    assert np.array_equal(stacked(images), stacked(any_pipe.interpolate(first, last, 4).images))


def test_wrong_fields_are_refused(build_pipeline):
    pipe = build_pipeline()
    blank = drawing(picture())
    wrong = {
        "seed is -1; expected an integer from 0": lambda: handlers.sample(pipe, [0], 1, -1, {}),
        "seed is None; expected an integer": lambda: handlers.sample(pipe, [0], 1, None, {}),
        r"class_labels is \[\]; expected a label": lambda: handlers.sample(pipe, [], 1, 0, {}),
        "top_k is 13; expected": lambda: handlers.sample(pipe, [0], 1, 0, {"top_k": 13}),
        "the image is missing": lambda: handlers.reconstruct(pipe, None),
        "the background is missing": lambda: handlers.inpaint(pipe, None, 0, 1, 0, {}),
        "the drawing has no strokes": lambda: handlers.inpaint(pipe, blank | {"layers": []}, 0, 1, 0, {}),
        "no strokes; expected": lambda: handlers.inpaint(pipe, drawing(picture(), (0, 0, 0, 0)), 0, 1, 0, {}),
        "class_labels is None": lambda: handlers.inpaint(pipe, drawing(picture(), (0, 0, 9, 9)), None, 1, 0, {}),
        "the last image is missing": lambda: handlers.interpolate(pipe, picture(), None, 4),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_classes_without_names_go_by_number(build_pipeline):
    pipe = build_pipeline()
    pipe.prior.config.class_names = None
    assert handlers.sample(pipe, [2], 1, 0, {})[0][0][1] == "class 2"


def test_more_than_the_limits_allow_is_refused_before_anything_is_computed(build_pipeline, tmp_path, monkeypatch):
    pipe, limits = build_pipeline(), DemoLimits(max_images=6, max_decoded=12, max_pixels=300)
    monkeypatch.setattr(pipe.prior, "decode_block", None)
    large, layers = picture(size=(20, 16)), [Image.new("RGBA", (16, 16))] * 9
    large.save(tmp_path / "large.png")
    painted = {"background": picture(), "layers": layers}
    ragged = {"background": picture(), "layers": [layers[0], Image.new("RGBA", (8, 8))]}
    wrong = {
        "7 × 1 images are asked for": lambda: handlers.sample(pipe, [0] * 7, 1, 0, {}, False, limits),
        "2 × 4 images are asked for": lambda: handlers.sample(pipe, [0, 1], 4, 0, {}, False, limits),
        "1 × 1000000000": lambda: handlers.sample(pipe, [0], 10**9, 0, {}, False, limits),
        "5 images after each of 3 blocks": lambda: handlers.sample(pipe, [0], 5, 0, {}, True, limits),
        "class_labels is 'wren'; expected a list": lambda: handlers.sample(pipe, "wren", 1, 0, {}, False, limits),
        "1 × 7 images": lambda: handlers.interpolate(pipe, picture(), picture(), 7, limits),
        "the picture has 16×20 pixels": lambda: handlers.reconstruct(pipe, large, limits),
        "20×16 pixels; expected 300": lambda: handlers.reconstruct(pipe, str(tmp_path / "large.png"), limits),
        "9 layers of 1 sizes; expected 8": lambda: handlers.inpaint(pipe, painted, 0, 1, 0, {}, limits),
        "2 layers of 2 sizes": lambda: handlers.inpaint(pipe, ragged, 0, 1, 0, {}, limits),
        "3 × 3 images": lambda: handlers.inpaint(pipe, ragged, [0, 1, 2], 3, 0, {}, limits),
        "expected a positive integer": lambda: handlers.sample(pipe, [0], "3", 0, {}, False, limits),
        "temperature is 1e-40": lambda: handlers.sample(pipe, [0], 1, 0, {"temperature": 1e-40}, False, limits),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, 1 << 50])
def test_limits_are_positive_integers(value):
    with pytest.raises(ValueError, match="limits.max_images is .*; expected an integer from 1"):
        DemoLimits(max_images=value)


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("a\n  b\tc") == "a b c" and len(one_line("x" * 10_000)) == 300


@pytest.mark.parametrize(
    ("headers", "chunks", "is_whole"),
    [
        ({}, [b"x" * 100], True),
        ({b"content-length": b"99999999999"}, [], False),
        ({b"content-length": b"-1"}, [], False),
        ({b"content-length": b"9" * 5000}, [], False),
        ({}, [b"x" * 100_000] * 5, False),
        ({b"content-length": b"1"}, [b"x" * 300_000], False),
        ({b"content-type": b"multipart/form-data; boundary=x"}, [b"x" * 100_000] * 5, True),
        ({b"content-type": b"multipart/form-data; boundary=x"}, [b"x" * 100_000] * 20, False),
    ],
    ids=range(8),
)
def test_bodies_are_bounded_whatever_their_headers_say(headers, chunks, is_whole):
    seen, answers = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            seen.append(message["body"])
            if not message["more_body"]:
                await send({"type": "http.response.start", "status": 200})
                return

    last = len(chunks) - 1
    waiting = [{"type": "http.request", "body": body, "more_body": n < last} for n, body in enumerate(chunks)]

    async def receive():
        return waiting.pop(0)

    async def send(message):
        answers.append(message.get("status"))

    scope = {"type": "http", "headers": list(headers.items())}
    asyncio.run(BodyLimit(app, max_upload_bytes=1_000_000)(scope, receive, send))
    assert (answers[:1] == [200]) is is_whole
    assert sum(map(len, seen)) <= 1_300_000
