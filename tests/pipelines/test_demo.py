"""The demo's command, and the page's wiring as its own HTTP clients meet it."""

import json
import re
from contextlib import suppress
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock import demo
from nextblock.command_line import parse_run_config
from nextblock.data.reading import read_picture
from nextblock.pipelines import ClassToImagePipeline, demo_handlers
from nextblock.pipelines.demo_limits import DemoLimits

OPTIONS = {"guidance_scale": 1.5, "guidance_schedule": "linear", "guidance_power": 1.0, "temperature": 1.0}
LIMITS = DemoLimits(max_pixels=10_000, max_upload_bytes=1_000_000)
OPTIONS |= {"top_k": 6, "top_p": 1.0, "min_p": 0.0, "is_smooth": False}


@pytest.fixture(scope="module")
def pipe(build_pipeline):
    pipe = build_pipeline()
    stored = {"guidance_scale": 1.25, "guidance_schedule": "linear", "top_p": 0.9}
    pipe = ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, sampling=stored)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def page(pipe):
    pytest.importorskip("gradio")
    from nextblock.pipelines.demo_page import build_page

    return build_page(pipe, LIMITS)


@pytest.fixture(scope="module")
def client(page):
    """A client of the page, which this process serves."""
    import gradio_client

    from nextblock.pipelines.demo_page import launch_limits

    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_limits(LIMITS))
    yield gradio_client.Client(address, verbose=False)
    page.close(verbose=False)


@pytest.fixture
def files(tmp_path):
    """Two pictures as files, and the pictures."""
    pictures = []
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels))
        pictures[-1].save(tmp_path / f"{seed}.png")
    from gradio_client import handle_file

    return [handle_file(str(tmp_path / f"{seed}.png")) for seed in (0, 1)], pictures


def read(gallery) -> np.ndarray:
    """The pictures of a gallery, as they were saved for the browser."""
    return np.stack([np.asarray(Image.open(entry["image"])) for entry in gallery])


def stacked(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def component(page, kind: str, label: str | None = None):
    """The page's first component of a kind."""
    return next(
        block for block in page.blocks.values() if type(block).__name__ == kind and label in (None, block.label)
    )


def test_the_page_opens_with_samples(page, pipe):
    gallery = component(page, "Gallery")
    pictures = np.stack([np.asarray(Image.open(entry["image"]["path"])) for entry in gallery.value])
    expected = pipe([0, 1, 2], num_images_per_label=4, generator=generator(0)).images
    assert np.array_equal(pictures, stacked(expected))
    assert [entry["caption"] for entry in gallery.value[::4]] == ["blue tit", "great tit", "wren"]
    assert component(page, "Dropdown", "Class").choices == [("blue tit", 0), ("great tit", 1), ("wren", 2)]


def test_sampling_on_the_page(client, pipe):
    gallery, blocks, text = client.predict([2, 1], 3, True, 9, *OPTIONS.values(), api_name="/sample")
    expected = pipe([2, 1], num_images_per_label=3, generator=generator(9), **OPTIONS).images
    assert np.array_equal(read(gallery["value"]), stacked(expected))
    assert gallery["columns"] == 6
    assert [block["caption"] for block in blocks["value"]][-1] == "block 3 of 3: 4×4 tokens"
    assert text == demo_handlers.call_text(pipe, [2, 1], 3, 9, OPTIONS)
    _, blocks, _ = client.predict([2, 1], 3, False, 9, *OPTIONS.values(), api_name="/sample")
    assert blocks["value"] == [] and blocks["visible"] is False


def test_pictures_on_the_page(client, pipe, files):
    handles, (first, last) = files
    gallery = client.predict(handles[0], api_name="/reconstruct")
    assert np.array_equal(read(gallery), stacked([first, *pipe.reconstruct(first).images]))
    gallery = client.predict(*handles, 5, api_name="/interpolate")
    assert np.array_equal(read(gallery), stacked(pipe.interpolate(first, last, 5).images))


def odd_pictures() -> list[Image.Image]:
    """16 bits, and pixels that are clear over a colour."""
    levels = np.random.default_rng(3).integers(0, 65536, (16, 16), dtype=np.uint16)
    clear = Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    clear.putalpha(Image.fromarray((levels & 255).astype(np.uint8)))
    return [Image.fromarray(levels), clear]


@pytest.mark.parametrize("picture", odd_pictures(), ids=["16 bits", "transparent"])
def test_a_file_on_the_page_is_read_as_for_training(client, pipe, picture, tmp_path):
    from gradio_client import handle_file

    exif = Image.Exif()
    # Gradio's editor lays what is clear over white before anybody can turn it; a browser's canvas has no such tag.
    exif[0x0112] = 6 if picture.mode == "I;16" else 1
    picture.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        expected = pipe.reconstruct(opened).images
    handle = handle_file(str(tmp_path / "x.png"))
    gallery = client.predict(handle, api_name="/reconstruct")
    assert np.array_equal(read(gallery), stacked([read_picture(tmp_path / "x.png"), *expected]))
    mask = Image.new("RGBA", (16, 16))
    mask.paste((255, 112, 67, 255), (8, 0, 16, 16))
    mask.save(tmp_path / "strokes.png")
    drawing = {"background": handle, "layers": [handle_file(str(tmp_path / "strokes.png"))], "composite": None}
    gallery = client.predict(drawing, 1, 1, 4, *OPTIONS.values(), api_name="/inpaint")
    with Image.open(tmp_path / "x.png") as opened:
        strokes = mask.getchannel("A")
        expected = pipe.inpaint(opened, strokes, 1, 1, generator=generator(4), **OPTIONS).images
    assert np.array_equal(read(gallery), stacked(expected))


def test_in_painting_on_the_page(client, pipe, files, tmp_path):
    from gradio_client import handle_file

    handles, (image, _) = files
    strokes, mask = Image.new("RGBA", (16, 16)), Image.new("L", (16, 16))
    strokes.paste((255, 112, 67, 255), (8, 0, 16, 16))
    mask.paste(255, (8, 0, 16, 16))
    strokes.save(tmp_path / "strokes.png")
    drawing = {"background": handles[0], "layers": [handle_file(str(tmp_path / "strokes.png"))], "composite": None}
    gallery = client.predict(drawing, 1, 3, 4, *OPTIONS.values(), api_name="/inpaint")
    expected = pipe.inpaint(image, mask, 1, 3, generator=generator(4), **OPTIONS).images
    assert np.array_equal(read(gallery), stacked(expected))
    drawing = client.predict(2, 7, *OPTIONS.values(), api_name="/draw")
    (expected,) = pipe(2, generator=generator(7), **OPTIONS).images
    assert np.array_equal(Image.open(drawing["background"]).convert("RGB"), demo_handlers.enlarged(expected))


def test_what_the_pipeline_refuses_is_shown(client):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=r"class_labels is \[\]; expected a label"):
        client.predict([], 1, False, 0, *OPTIONS.values(), api_name="/sample")
    with pytest.raises(AppError, match="the image is missing; expected a picture"):
        client.predict(None, api_name="/reconstruct")


@pytest.mark.parametrize(("layout", "num_classes"), [("scales", 0), ("rows", 3)])
def test_fields_follow_the_model(build_pipeline, layout, num_classes):
    pytest.importorskip("gradio")
    from nextblock.pipelines.demo_page import build_page

    pipe = build_pipeline(layout, num_classes)
    page = build_page(pipe)
    assert component(page, "Slider", "Guidance scale").visible is (num_classes > 0)
    assert component(page, "Dropdown").visible is (num_classes > 0)
    smooth = "Smooth: mixtures of codes, for looking at and not for measuring"
    assert component(page, "Checkbox", smooth).visible is (layout == "scales")
    if num_classes == 0:
        entries = component(page, "Gallery").value
        pictures = [np.asarray(Image.open(entry["image"]["path"])) for entry in entries]
        assert np.array_equal(pictures, stacked(pipe(4, generator=generator(0)).images))


def test_nothing_is_reported_to_gradio(page):
    assert page.analytics_enabled is False


@pytest.mark.parametrize("options", ["--port 0", "--port 70000"])
def test_ports_are_checked(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--pipeline", "p", *options.split()])
    assert f"port is {options.split()[1]}; expected 1 to 65535, or null" in capsys.readouterr().err


@pytest.mark.parametrize("found", [None, ModuleSpec("gradio", None)], ids=["nothing", "folder"])
def test_without_gradio_the_command_says_how_to_install_it(found, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: found)
    with pytest.raises(SystemExit) as end:
        parse_run_config(demo.DemoConfig, command="test", argv=["--pipeline", "p"])
    assert end.value.code == 2
    assert "the package gradio is missing; install it by `pip install 'nextblock[demo]'`" in capsys.readouterr().err


def test_the_command_serves_the_named_pipeline(pipe, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = []
    # The command bounds what PIL unpacks in its process, which here is the tests'.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.append((page, options)))
    pipe.save_pretrained(tmp_path)
    demo.main(["--pipeline", str(tmp_path), "--cpu", "true", "--port", "8123", "--dtype", "bfloat16"])
    ((page, options),) = launched
    assert options["server_name"] == "127.0.0.1" and options["server_port"] == 8123
    assert options["max_file_size"] == 1 << 25 and Image.MAX_IMAGE_PIXELS == 1 << 25
    assert options["share"] is False and "pixelated" in options["css"]
    assert "16×16 pixels as 21 tokens in 3 scales up to 4×4; 12 codes, 3 classes" in component(page, "Markdown").value


def ask(client, name: str, data: list, **more) -> str:
    """What the page's interface answers to a body that no client of its own would send."""
    httpx = pytest.importorskip("httpx")
    address = f"{client.src}gradio_api/call/{name}"
    content = json.dumps({"data": data} | more)
    answer = httpx.post(address, content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text}"
    return httpx.get(f"{address}/{answer.json()['event_id']}", timeout=60).text


SAMPLE = [[0], 1, False, 0, *OPTIONS.values()]


def replaced(place: int, value) -> list:
    return [*SAMPLE[:place], value, *SAMPLE[place + 1 :]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replaced(0, [0] * 10_000), "10000 are given; expected 64 at most"),
        (replaced(0, [0] * 300_000), "413 the request is too large"),
        ([[0, 1, 2] * 16, 2, *SAMPLE[2:]], r"48 \\u00d7 2 images are asked for at once; expected 64 at most"),
        (replaced(1, 10**9), "greater than maximum"),
        (replaced(1, "many"), "Images of each class: "),
        (replaced(1, [[[3]]]), "Images of each class: "),
        (replaced(1, float("nan")), "event: error|422|400"),
        (replaced(3, 1e400), "Seed: |422|400"),
        (replaced(3, 2**64), "seed is 18446744073709551616; expected an integer"),
        (replaced(3, {"a": 1}), "Seed: "),
        (replaced(4, 1e38), "greater than maximum"),
        (replaced(5, "steep"), "is not in the list of choices"),
        (replaced(7, 1e-40), "less than minimum"),
        (replaced(8, 10**30), "greater than maximum"),
        (replaced(11, "yes"), "is_smooth is 'yes'; expected True or False"),
        (replaced(0, 2), "class_labels is 2; expected a list of labels"),
        (replaced(0, [[1]]), "is not in the list of choices"),
        (SAMPLE[:4], "event: error"),
        ([], "event: error"),
    ],
    ids=range(19),
)
def test_what_a_stranger_sends_is_answered_in_one_line(data, message, client):
    answer = ask(client, "sample", data)
    assert re.search(message, answer), answer
    assert len(answer) < 2000 and "Traceback" not in answer


def test_the_page_still_draws_after_what_it_has_refused(client):
    assert "event: complete" in ask(client, "sample", SAMPLE)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"path": "/etc/passwd"}, "event: error"),
        ({"path": "../../../../etc/passwd"}, "event: error"),
        ({"path": "http://127.0.0.1:1/x.png"}, "an address is given; expected a picture that is uploaded"),
        ({"path": "x", "url": "file:///etc/passwd"}, "event: error"),
        ({"path": 3}, "event: error"),
        ("data:image/png;base64,AAAA", "event: error"),
        ([[[]]], "event: error"),
    ],
    ids=range(7),
)
def test_files_that_were_not_uploaded_are_not_read(file, message, client):
    if isinstance(file, dict):
        file |= {"meta": {"_type": "gradio.FileData"}}
    answer = ask(client, "reconstruct", [file])
    assert message in answer and "root:" not in answer


def test_uploads_are_bounded_in_bytes_and_pixels(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    httpx = pytest.importorskip("httpx")
    for size, expected in ((1_100_000, 413), (3_000_000, 413), (10_000, 200)):
        upload = {"files": ("x.png", bytes(size), "image/png")}
        assert httpx.post(f"{client.src}gradio_api/upload", files=upload).status_code == expected
    chunks = (bytes(100_000) for _ in range(40))
    with suppress(httpx.HTTPError):
        answer = httpx.post(f"{client.src}gradio_api/call/sample", content=chunks)
        assert answer.status_code >= 400
    Image.new("RGB", (400, 400)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "programme.eps")
    (tmp_path / "programme.eps").rename(tmp_path / "programme.png")
    messages = dict.fromkeys(["text", "programme"], "no picture that can be read")
    messages["large"] = "the picture has 400×400 pixels; expected 10000 at most"
    for name, message in messages.items():
        handle = handle_file(str(tmp_path / f"{name}.png"))
        for call in (
            lambda handle: client.predict(handle, api_name="/reconstruct"),
            lambda handle: client.predict(handle, handle, 3, api_name="/interpolate"),
            lambda handle: client.predict(
                {"background": handle, "layers": [], "composite": None}, 1, 1, 4, *OPTIONS.values(), api_name="/inpaint"
            ),
        ):
            with pytest.raises(AppError, match=message):
                call(handle)


def test_drawings_are_bounded(client, page, files, monkeypatch):
    from gradio_client.exceptions import AppError

    (handle, _), _ = files
    drawing = {"background": handle, "layers": [handle] * 20, "composite": None}
    with pytest.raises(AppError, match="the drawing has 20 layers; expected 8 at most"):
        client.predict(drawing, 1, 1, 4, *OPTIONS.values(), api_name="/inpaint")
    httpx = pytest.importorskip("httpx")
    editor = component(page, "ImageEditor")
    form = {"component_id": str(editor._id), "session_hash": "s", "fn_name": "accept_blobs", "type": "layer"}
    for index, expected in (("3", 200), ("1000000000000", 500), ("-1", 500)):
        body = form | {"id": "a", "index": index}
        answer = httpx.post(f"{client.src}gradio_api/component_server", data=body, files={"file": b"x"})
        assert answer.status_code == expected
    assert len(editor.blob_storage["a"].layers) == 4
    monkeypatch.setattr("nextblock.pipelines.demo_guards.MAX_DRAWINGS", 3)
    for number in range(4):
        body = form | {"id": str(number), "index": "0"}
        httpx.post(f"{client.src}gradio_api/component_server", data=body, files={"file": b"x"})
    assert list(editor.blob_storage) == ["1", "2", "3"]


def test_files_of_the_machine_are_not_served_and_the_queue_is_bounded(client, page):
    httpx = pytest.importorskip("httpx")
    for path in ("/etc/passwd", "pyproject.toml", "../../etc/passwd", __file__):
        assert httpx.get(f"{client.src}gradio_api/file={path}").status_code in (403, 404)
    assert page._queue.max_size == LIMITS.max_waiting and page.max_file_size == LIMITS.max_upload_bytes
