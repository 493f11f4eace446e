"""Measures samples: FID and the like of any data, by features; or judges a pipeline of digits by its samples.

    nextblock evaluate --samples out/samples --reference my_images --features FILE --output_dir out/figures
    accelerate launch -m nextblock evaluate --samples out/samples --reference my_images --features FILE …
    nextblock evaluate --sweep guidance_scale=1,1.5,2 --pipeline out/pipeline --reference my_images --features FILE …
    nextblock evaluate --config pipelines/evaluate-digits --pipeline out/pipeline …
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nextblock.files.claim import claimed
from nextblock.training.processes import connect_processes

from .command_line import parse_run_config
from .evaluate_config import EvaluateConfig
from .inputs import check_is_no_result
from .judge_pipeline import judge_pipeline
from .measure_samples import measure_samples
from .stoppable import stoppable_job
from .sweep import sweep_figures


def evaluate(config: EvaluateConfig) -> dict:
    """Judge the pipeline and measure the samples that a config names.

    Args:
        config: with `pipeline`, `features` or both.

    Returns:
        What result.json or, of a sweep, sweep.json holds; empty on all processes but the first, and without `features`.

    Raises:
        ValueError: naming the option that is wrong.
    """
    if config.sweep is not None:
        return sweep_figures(config)
    if config.features is not None:
        check_is_no_result("output_dir", Path(config.output_dir))
    if config.pipeline is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected a single process to judge a pipeline")
        with claimed(Path(config.output_dir)):
            judge_pipeline(config)
    result = {}
    if config.features is not None:
        state = connect_processes(config.cpu)
        with stoppable_job(state), claimed(Path(config.output_dir), state):
            result = measure_samples(config, state)
    return result


def main(argv: Sequence[str]) -> None:
    """Measure what the command line names, print the figures and write the results."""
    evaluate(parse_run_config(EvaluateConfig, command="evaluate", argv=argv))
