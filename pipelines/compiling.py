"""Compiling a pipeline: the prior's layers around attention, and the tokenizer's decoder."""

from collections.abc import Mapping

import torch

from nextblock.prior.family import compile_layers


def compile_pipeline(pipe, options: Mapping) -> None:
    """Compile prior and decoder; see `ClassToImagePipeline.compile`."""
    if options.get("fullgraph"):
        raise ValueError(f"options are {options}; expected no fullgraph: attention stays out of the graphs")
    try:
        torch.compile(torch.nn.Identity(), **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"options are {options}; expected those of torch.compile: {error}") from error
    compile_layers(pipe.prior, **options)
    pipe.tokenizer.decoder.compile(**options)
