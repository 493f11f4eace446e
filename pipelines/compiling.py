"""Compiling a pipeline: the step through the prior's layers, and the tokenizer's decoder."""

from collections.abc import Mapping

import torch

from nextblock.prior.family import compile_step


def compile_pipeline(pipe, options: Mapping) -> None:
    """Compile prior and decoder; see `ClassToImagePipeline.compile`."""
    try:
        torch.compile(torch.nn.Identity(), **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"options are {options}; expected those of torch.compile: {error}") from error
    compile_step(pipe.prior, **options)
    pipe.tokenizer.decoder.compile(**options)
