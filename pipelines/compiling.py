"""Compiling a pipeline: the step through the prior's layers, and the tokenizer's decoder."""

from collections.abc import Mapping

import torch

from nextblock.prior.family import compile_step

# Those that let inductor capture graphs of its own, inside of which there can be no other.
CAPTURING_MODES = ("reduce-overhead", "max-autotune")


def compile_pipeline(pipe, captures_graphs: bool | None, options: Mapping) -> None:
    """Compile prior and decoder; see `ClassToImagePipeline.compile`."""
    try:
        torch.compile(torch.nn.Identity(), **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"options are {options}; expected those of torch.compile: {error}") from error
    is_captured_inside = options.get("mode") in CAPTURING_MODES or (options.get("options") or {}).get(
        "triton.cudagraphs", False
    )
    if captures_graphs not in (None, True, False) or captures_graphs and is_captured_inside:
        raise ValueError(
            f"captures_graphs is {captures_graphs!r}, options are {options}; "
            "expected None, False, or True with options that do not let inductor capture graphs too"
        )
    compile_step(pipe.prior, captures_graphs=not is_captured_inside and captures_graphs is not False, **options)
    pipe.tokenizer.decoder.compile(**options)
