"""Starts a local web page on which to try a pipeline: sample, reconstruct, in-paint, interpolate.

    nextblock demo --pipeline out/quickstart/pipeline

Needs the optional extra: pip install 'nextblock[demo]'.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import torch
from PIL import Image

from nextblock.pipelines.demo_limits import DemoLimits

from .command_line import parse_run_config
from .inputs import load_given_pipeline


@dataclass(kw_only=True)
class DemoConfig:
    """Starts a local web page on which to try a pipeline; Ctrl-C stops it."""

    pipeline: str
    """Folder or hub repository of the pipeline."""
    requires_own_tokenizer: bool = False
    """Refuse a pipeline whose tokenizer is not the one whose tokens its prior has learned, instead of warning."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int | None = None
    """Port to listen at; null takes the first free one from 7860."""
    share: bool = False
    """Also make the page public for a week, through Gradio's servers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantizer stays in float32."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""
    limits: DemoLimits = field(default_factory=DemoLimits)
    """What one request may ask for."""

    def __post_init__(self):
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"port is {self.port}; expected 1 to 65535, or null")
        spec = find_spec("gradio")
        # A folder called gradio, as Gradio makes for its pictures, is a package without a file to a python beside it.
        if spec is None or spec.origin is None:
            raise ValueError("the package gradio is missing; install it by `pip install 'nextblock[demo]'`")


def _check_address(host: str, port: int | None) -> None:
    """Refuse an address that is not this machine's, or where something listens already: Gradio would try for long."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        raise ValueError(
            f"host is {host!r} and port {port}; expected an address of this machine and a free port: {error}"
        ) from error


def main(argv: Sequence[str]) -> None:
    """Serve the page until the process is stopped."""
    config = parse_run_config(DemoConfig, command="demo", argv=argv)
    # Read when gradio is imported, which the page does.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from nextblock.pipelines.demo_page import CSS, build_page, launch_limits

    _check_address(config.host, config.port)
    device = "cuda" if torch.cuda.is_available() and not config.cpu else "cpu"
    options = {"requires_own_tokenizer": config.requires_own_tokenizer}
    pipe = load_given_pipeline("pipeline", config.pipeline, **options)
    pipe.to(device, getattr(torch, config.dtype))
    pipe.set_progress_bar_config(disable=True)
    limits = config.limits
    # Gradio opens pictures too; PIL refuses twice as many pixels, whoever opens them.
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    build_page(pipe, limits).launch(
        server_name=config.host,
        server_port=config.port,
        share=config.share,
        css=CSS,
        **launch_limits(limits),
    )
