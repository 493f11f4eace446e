"""The demo page: its tabs and fields, wired to the functions of demo_handlers.

Legend: H×W pixels.
"""

from dataclasses import fields

import gradio as gr
from starlette.middleware import Middleware

from nextblock.prior.head_plan import plan_of
from nextblock.prior.sampling import GUIDANCE_SCHEDULES, SamplingOptions

from . import demo_handlers as handlers
from .demo_guards import guard, reported
from .demo_limits import BodyLimit, DemoLimits

# The order of single tokens stays the pipeline's.
OPTION_NAMES = [field.name for field in fields(SamplingOptions) if field.name != "order"]
# Characters in the box of prompts.
MAX_PROMPT_LENGTH = 4000
# Images below this many pixels a side are shown pixel by pixel, and many in a row.
SMALL_SIDE = 128
# Gradio's thumbnails are 100 pixels wide at least, which cuts off the last of many; captions would hide small ones.
CSS = """
.pictures .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
.pictures .grid-wrap { min-height: 100px !important; max-height: none !important; }
.pixels img { image-rendering: pixelated; }
.unnamed .caption-label { display: none; }
"""
# One pipeline serves the page: calls wait for each other.
QUEUE = {"concurrency_id": "pipeline", "concurrency_limit": 1}


# Files that the page has made or received are deleted after an hour; looked after every ten minutes.
CACHE_SECONDS = (600, 3600)


def build_page(pipe, limits: DemoLimits = handlers.NO_OTHERS) -> gr.Blocks:
    """Lay out the page of a pipeline, with first samples.

    Args:
        pipe: of classes or of texts.
        limits: of one request.

    Returns:
        The page, to be launched with `css=CSS`.
    """
    with gr.Blocks(title="nextblock", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown(_description(pipe))
        with gr.Tab("Sample"):
            _sample_tab(pipe, limits)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(pipe, limits)
        with gr.Tab("In-paint"):
            _inpaint_tab(pipe, limits)
        with gr.Tab("Interpolate"):
            _interpolate_tab(pipe, limits)
    for component in {field._id: field for function in page.fns.values() for field in function.inputs}.values():
        guard(component, limits)
    return page.queue(max_size=limits.max_waiting)


def launch_limits(limits: DemoLimits) -> dict:
    """Return the options of Gradio's `launch` by which the limits hold for uploads and for bodies of requests."""
    middleware = [Middleware(BodyLimit, max_upload_bytes=limits.max_upload_bytes)]
    return {"max_file_size": limits.max_upload_bytes, "app_kwargs": {"middleware": middleware}}


def _sample_tab(pipe, limits: DemoLimits) -> None:
    num_classes = _num_classes(pipe)
    num_shown, num_images = (10, 4) if _is_small(pipe) else (4, 1)
    num_shown = min(num_shown, limits.max_images)
    num_images = max(1, min(num_images, limits.max_images // num_shown))
    num_decoded = max(1, min(num_shown, num_classes)) * num_images * pipe.num_timesteps

    def draw(labels, count, is_progressive, seed, *values):
        given = _given(pipe, values)
        labels = handlers.prompts_of(labels) if _is_of_text(pipe) else labels if num_classes else None
        drawn, frames = handlers.sample(pipe, labels, count, seed, given, is_progressive, limits)
        num_columns = _num_columns(pipe, len(drawn), count)
        blocks = handlers.block_pictures(pipe, frames, num_columns) if is_progressive else []
        return drawn, num_columns, blocks, handlers.call_text(pipe, labels, count, seed, given)

    def show(*values):
        drawn, num_columns, blocks, text = draw(*values)
        return gr.Gallery(drawn, columns=num_columns), gr.Gallery(blocks, visible=bool(blocks)), text

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            labels = _condition_field(pipe, "Classes", list(range(min(num_shown, num_classes))))
            name = "Images of each class" if num_classes else "Images"
            count = gr.Slider(1, min(16, limits.max_images), num_images, step=1, label=name)
            seed, options = _sampling_fields(pipe)
            is_progressive = gr.Checkbox(
                pipe.num_timesteps <= handlers.MAX_SHOWN_BLOCKS and num_decoded <= limits.max_decoded,
                label="Show the images after each block",
            )
            with gr.Row():
                button = gr.Button("Generate", variant="primary")
                next_button = gr.Button("Next seed")
        inputs = [labels, count, is_progressive, seed, *options]
        # The page opens with what its fields say.
        drawn, num_columns, blocks, text = draw(*(field.value for field in inputs))
        with gr.Column(scale=5):
            shown = [
                _gallery(pipe, drawn, num_columns, has_captions=not _is_small(pipe)),
                _gallery(pipe, blocks, visible=bool(blocks)),
                gr.Code(text, label="The same in Python", language="python", interactive=False),
            ]
    button.click(reported(show), inputs, shown, api_name="sample", **QUEUE)
    next_button.click(lambda seed: (seed or 0) + 1, seed, seed).then(reported(show), inputs, shown, **QUEUE)


def _picture_field(label: str, height: int | None = None) -> gr.Image:
    """A field for one picture, handed on as its file: Gradio would clip 16 bits and blacken what is clear."""
    return gr.Image(type="filepath", image_mode=None, label=label, sources=["upload", "clipboard"], height=height)


def _reconstruct_tab(pipe, limits: DemoLimits) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = _picture_field("Image")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=5):
            pictures = _gallery(pipe, num_columns=2)
    run = reported(lambda image: handlers.reconstruct(pipe, image, limits))
    gr.on([image.upload, button.click], run, image, pictures, api_name="reconstruct", **QUEUE)


def _inpaint_tab(pipe, limits: DemoLimits) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            editor = gr.ImageEditor(
                label="Brush over what is to be painted anew",
                type="pil",
                image_mode=None,
                format="png",
                sources=["upload", "clipboard"],
                transforms=[],
                layers=False,
                brush=gr.Brush(default_size=64, colors=["#ff7043"], color_mode="fixed"),
            )
            sample_button = gr.Button("Take a sample to paint on")
            label = _condition_field(pipe, "Class", 0 if _num_classes(pipe) else None)
            count = gr.Slider(1, min(16, limits.max_images), min(4, limits.max_images), step=1, label="Images")
            seed, options = _sampling_fields(pipe)
            button = gr.Button("In-paint", variant="primary")
        with gr.Column(scale=4):
            pictures = _gallery(pipe, num_columns=2)

    def paint(drawing, label, count, seed, *values):
        given = _given(pipe, values)
        return handlers.inpaint(pipe, drawing, label, count, seed, given, limits)

    def take_sample(label, seed, *values):
        given = _given(pipe, values)
        drawn, _ = handlers.sample(pipe, None if label is None else [label], 1, seed, given)
        return handlers.enlarged(drawn[0][0])

    button.click(reported(paint), [editor, label, count, seed, *options], pictures, api_name="inpaint", **QUEUE)
    sample_button.click(reported(take_sample), [label, seed, *options], editor, api_name="draw", **QUEUE)


def _interpolate_tab(pipe, limits: DemoLimits) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            ends = [
                _picture_field(name, height=240)
                for name in ("First image", "Last image")
            ]
            num_steps = gr.Slider(2, 16, 8, step=1, label="Images")
            button = gr.Button("Interpolate", variant="primary")
        with gr.Column(scale=5):
            pictures = _gallery(pipe)
    run = reported(lambda first, last, num_steps: handlers.interpolate(pipe, first, last, num_steps, limits))
    button.click(run, [*ends, num_steps], pictures, api_name="interpolate", **QUEUE)


def _sampling_fields(pipe) -> tuple[gr.Number, list]:
    """Fields for the seed and, in the order of OPTION_NAMES, the sampling options, which begin as the pipeline's.

    One for a negative prompt comes last, of a pipeline of texts.
    """
    sampling = pipe.sampling
    is_guided, layout = pipe.prior.conditions.has_null, pipe.tokenizer.layout
    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    scale = gr.Slider(
        0,
        max(10, sampling.guidance_scale),
        sampling.guidance_scale,
        step=0.05,
        label="Guidance scale",
        info="1 is none",
        visible=is_guided,
    )
    schedule = gr.Radio(
        list(GUIDANCE_SCHEDULES),
        value=sampling.guidance_schedule,
        label="Guidance over the blocks",
        visible=is_guided,
    )
    power = gr.Slider(
        min(0.1, sampling.guidance_power),
        max(5, sampling.guidance_power),
        sampling.guidance_power,
        step=0.1,
        label="Power of power-cosine",
        visible=is_guided and sampling.guidance_schedule.startswith("power-cosine"),
    )
    schedule.change(lambda name: gr.Slider(visible=name.startswith("power-cosine")), schedule, power)
    with gr.Accordion("Truncation", open=False):
        heat = sampling.temperature
        temperature = gr.Slider(min(0.05, heat), max(2, heat), heat, step=0.05, label="Temperature")
        most = plan_of(pipe.prior).largest_base
        top_k = gr.Number(sampling.top_k, precision=0, minimum=0, maximum=most, label="Top k", info="0 is off")
        top_p = gr.Slider(min(0.05, sampling.top_p), 1, sampling.top_p, step=0.01, label="Top p", info="1 is off")
        min_p = gr.Slider(0, 1, sampling.min_p, step=0.01, label="Min p", info="0 is off")
        smooth = gr.Checkbox(
            sampling.is_smooth,
            label="Smooth: mixtures of codes, for looking at and not for measuring",
            visible=layout.is_scales,
        )
    by_name = {
        "guidance_scale": scale,
        "guidance_schedule": schedule,
        "guidance_power": power,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "is_smooth": smooth,
    }
    fields = [by_name[name] for name in OPTION_NAMES]
    if _is_of_text(pipe):
        fields.append(gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT_LENGTH))
    return seed, fields


def _given(pipe, values: tuple) -> dict:
    """Name the values of the fields that `_sampling_fields` made."""
    if not _is_of_text(pipe):
        return dict(zip(OPTION_NAMES, values, strict=True))
    *values, negative_prompt = values
    return dict(zip(OPTION_NAMES, values, strict=True)) | {"negative_prompt": negative_prompt or None}


def _condition_field(pipe, label: str, value: int | list[int] | None) -> gr.Dropdown | gr.Textbox:
    """Box for prompts, of several where the value is a list; or drop-down of the classes, hidden without any."""
    if _is_of_text(pipe):
        is_several = isinstance(value, list)
        info = "one a line" if is_several else None
        lines = {"lines": 3 if is_several else 1, "max_length": MAX_PROMPT_LENGTH}
        return gr.Textbox("a picture", label="Prompt", info=info, **lines)
    choices = [(handlers.label_name(pipe, n), n) for n in range(_num_classes(pipe))]
    return gr.Dropdown(choices, value=value, multiselect=isinstance(value, list), label=label, visible=bool(choices))


def _gallery(
    pipe, pictures: list | None = None, num_columns: int = 4, has_captions: bool = True, visible: bool = True
) -> gr.Gallery:
    """Pictures as they are: not recompressed, and pixel by pixel where they are small."""
    classes = {"pictures": True, "pixels": _is_small(pipe), "unnamed": not has_captions}
    return gr.Gallery(
        pictures,
        show_label=False,
        columns=num_columns,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        visible=visible,
        elem_classes=[name for name, is_set in classes.items() if is_set],
    )


def _is_of_text(pipe) -> bool:
    """Whether the pipeline takes prompts."""
    return pipe._condition_arguments[0] == "prompt"


def _num_classes(pipe) -> int:
    """Classes of the pipeline; none where it takes prompts."""
    return 0 if _is_of_text(pipe) else pipe.prior.conditions.num_classes


def _num_columns(pipe, num_images: int, num_images_per_label: int) -> int:
    """Pictures in a row: whole classes where they fit."""
    most = 10 if _is_small(pipe) else 5
    whole = most // num_images_per_label * num_images_per_label
    return min(num_images, whole or most)


def _is_small(pipe) -> bool:
    return max(pipe.tokenizer.config.image_size) < SMALL_SIDE


def _description(pipe) -> str:
    """Heading and the pipeline's sizes."""
    layout, (H, W) = pipe.tokenizer.layout, pipe.tokenizer.config.image_size
    shape = "×".join(map(str, layout.shapes[-1]))
    kind = "scales up to" if layout.is_scales else "tiles of"
    kinds = "prompts" if _is_of_text(pipe) else f"{_num_classes(pipe) or 'no'} classes"
    num_parameters = (pipe.prior.num_parameters() + pipe.tokenizer.num_parameters()) / 1e6
    return (
        f"# nextblock\nImages of {H}×{W} pixels as {layout.num_tokens} tokens in {layout.num_blocks} {kind} {shape}; "
        f"{pipe.tokenizer.config.vocab_size} codes, {kinds}, "
        f"{num_parameters:.1f} M parameters."
    )
