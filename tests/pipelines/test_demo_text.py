"""The demo's page of a pipeline that takes prompts, as its own HTTP clients meet it."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.pipelines import demo_handlers
from nextblock.pipelines.demo_limits import DemoLimits

OPTIONS = {"guidance_scale": 2.0, "guidance_schedule": "linear", "guidance_power": 1.0, "temperature": 1.0}
OPTIONS |= {"top_k": 6, "top_p": 1.0, "min_p": 0.0, "is_smooth": False}


@pytest.fixture(scope="module")
def pipe(build_text_pipeline):
    return build_text_pipeline()


@pytest.fixture(scope="module")
def client(pipe):
    gradio_client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    from nextblock.pipelines.demo_page import build_page, launch_limits

    limits = DemoLimits(max_images=8)
    page = build_page(pipe, limits)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_limits(limits))
    yield gradio_client.Client(address, verbose=False)
    page.close(verbose=False)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(gallery) -> np.ndarray:
    return np.stack([np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in gallery])


def test_prompts_and_a_negative_prompt_are_drawn(client, pipe):
    prompts, negative = ["a red bird", "the dog"], "blue"
    arguments = [" a red bird\n\nthe dog ", 2, False, 5, *OPTIONS.values(), negative]
    gallery, _, text = client.predict(*arguments, api_name="/sample")
    expected = pipe(prompts, negative, 2, generator=generator(5), **OPTIONS).images
    assert np.array_equal(read(gallery["value"]), np.stack([np.asarray(image) for image in expected]))
    assert [entry["caption"] for entry in gallery["value"]] == ["a red bird"] * 2 + ["the dog"] * 2
    given = OPTIONS | {"negative_prompt": negative}
    assert text == demo_handlers.call_text(pipe, prompts, 2, 5, given) and "negative_prompt='blue'" in text
    gallery, _, text = client.predict(*arguments[:-1], "", api_name="/sample")
    assert "negative_prompt" not in text


def test_what_a_page_cannot_do_is_said(client):
    from gradio_client.exceptions import AppError

    for prompt, count, message in ((" ", 1, "the prompt is"), ("a\n" * 9, 1, "9 × 1 images are asked for")):
        with pytest.raises(AppError, match=message):
            client.predict(prompt, count, False, 5, *OPTIONS.values(), "", api_name="/sample")


def test_a_picture_is_painted_by_a_prompt(pipe):
    image, strokes = pipe("the dog", generator=generator(0)).images[0], Image.new("RGBA", (16, 16))
    strokes.paste((255, 112, 67, 255), (8, 0, 16, 16))
    drawing = {"background": image, "layers": [strokes]}
    painted = demo_handlers.inpaint(pipe, drawing, "a red bird", 2, 4, OPTIONS)
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    expected = pipe.inpaint(image, mask, "a red bird", 2, generator=generator(4), **OPTIONS).images
    assert all(np.array_equal(*pair) for pair in zip(painted, expected, strict=True))
