"""Guards around the fields of the demo page: Gradio itself takes whatever a programme sends to its interface.

It would unpack every picture of any size, fetch addresses, keep what editors send piece by piece without end, and show
a stranger nothing but a traceback in the log.
"""

import html
import io
from collections.abc import Callable
from functools import wraps

import gradio as gr

from nextblock.files.regular import open_regular

from .demo_limits import MAX_LAYERS, DemoLimits, one_line

# Drawings that editors have sent a part of.
MAX_DRAWINGS = 64


def refusal(error: object) -> gr.Error:
    """Return a message for the page: one line, and no HTML, for which Gradio would take it."""
    return gr.Error(html.escape(one_line(error), quote=False), print_exception=False)


def reported(handler: Callable) -> Callable:
    """Make a handler show what the pipeline refuses as a message on the page."""

    @wraps(handler)
    def show(*values):
        try:
            return handler(*values)
        except ValueError as error:
            raise refusal(error) from error

    return show


def guard(component: gr.components.Component, limits: DemoLimits) -> gr.components.Component:
    """Hold what is sent to a field against the limits before Gradio works on it.

    Args:
        component: an input.
        limits: of one request.

    Returns:
        The component.
    """
    preprocess, fetch = component.preprocess, component.async_move_resource_to_block_cache

    @wraps(preprocess)
    def checked(payload):
        try:
            _check_payload(component, payload, limits)
            return preprocess(payload)
        except (ValueError, TypeError, OverflowError, AttributeError, OSError) as error:
            # Named by the page's own words, for whatever a number or a list stands where it does not belong.
            raise refusal(f"{component.label or type(component).__name__}: {error}") from error

    @wraps(fetch)
    async def fetched(url_or_file_path):
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise refusal("an address is given; expected a picture that is uploaded")
        return await fetch(url_or_file_path)

    component.preprocess, component.async_move_resource_to_block_cache = checked, fetched
    if isinstance(component, gr.ImageEditor):
        component.accept_blobs = _bounded(component)
    return component


def _check_payload(component: gr.components.Component, payload, limits: DemoLimits) -> None:
    """Refuse lists that are too long, and pictures that are too large."""
    if isinstance(payload, list) and len(payload) > limits.max_images:
        raise ValueError(f"{len(payload)} are given; expected {limits.max_images} at most")
    if payload is None:
        return
    if isinstance(component, gr.ImageEditor):
        drawing = payload if payload.id is None else component.blob_storage.get(payload.id)
        parts = [] if drawing is None else [drawing.background, drawing.composite, *(drawing.layers or [])]
        if len(parts) > MAX_LAYERS + 2:
            raise ValueError(f"the drawing has {len(parts) - 2} layers; expected {MAX_LAYERS} at most")
        for part in parts:
            if isinstance(part, bytes):
                limits.check_picture(io.BytesIO(part))
            elif part is not None:
                _check_file(part.path, limits)
    elif isinstance(component, gr.Image) and payload.path is not None:
        _check_file(payload.path, limits)


def _check_file(path: str, limits: DemoLimits) -> None:
    """Refuse a file that is no picture within the limits."""
    with open_regular(path) as file:
        limits.check_picture(file)


def _bounded(editor: gr.ImageEditor) -> Callable:
    """Make an editor keep no more parts of drawings than it needs, the latest."""
    accept = editor.accept_blobs

    @wraps(accept)
    def accepted(data):
        index = data.data.get("index")
        if index is not None and index != "null" and not 0 <= int(index) < MAX_LAYERS:
            raise refusal(f"layer {one_line(index)} of a drawing is sent; expected {MAX_LAYERS} at most")
        while len(editor.blob_storage) >= MAX_DRAWINGS:
            editor.blob_storage.pop(next(iter(editor.blob_storage)))
        return accept(data)

    return accepted
