"""Figures of a pipeline over a range of one sampling option: `nextblock evaluate --sweep guidance_scale=1,1.5,2 …`.

Each value has a folder of its own, which holds its samples and its result; what is finished there stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState

from nextblock.evaluation.features import load_features
from nextblock.evaluation.pictures import save_curves
from nextblock.evaluation.report import format_columns, format_number, write_json
from nextblock.files.claim import claimed
from nextblock.files.part_jobs import begin_job
from nextblock.files.regular import is_regular, read_json
from nextblock.training.processes import connect_processes

from .evaluate_config import EvaluateConfig
from .given_references import open_references
from .inputs import load_given_pipeline
from .measure_samples import FEATURES_EXPECTED, FIGURES, RESULT_NAME, measure_samples
from .mistakes import reading
from .sample import SampleConfig, sample
from .sample_conditions import drawn_of
from .stoppable import stoppable_job
from .sweep_config import DrawConfig, Sweep, sample_configs

TABLE_NAME, PICTURE_NAME, REFERENCE_NAME = "sweep.json", "sweep.png", "reference.npz"
_OF_TEXTS = ("prompts", "negative_prompt")
# What the picture shows, where it could be had, each in a panel of its own; fd is FID where that is not null.
_PANELS = ("fid", "fd", "inception_score", "precision", "recall")


def sweep_figures(config: EvaluateConfig) -> dict:
    """Draw and measure the samples of each value, and put the figures together.

    Args:
        config: with `sweep`, `pipeline` and `features`.

    Returns:
        What sweep.json holds; empty on all processes but the first, and where the work was stopped.

    Raises:
        ValueError: naming the option that is wrong, or if `output_dir` holds another sweep.
    """
    state, output_dir, sweep = connect_processes(config.cpu), Path(config.output_dir), Sweep.parse(config.sweep)
    shared = {name: getattr(config, name) for name in ("pipeline", "requires_own_tokenizer", "cpu")}
    jobs = sample_configs(sweep, config.draw, output_dir, **shared)
    with claimed(output_dir, state):
        begin_job(output_dir, _describe(config, sweep, jobs, state), state)
        results = []
        for job in jobs:
            if not sample(job):
                return {}
            done = f"{len(results)} of {len(jobs)} values are measured in {output_dir}"
            result = _measured(config, job, state, done)
            if result is None:
                return {}
            results.append(result)
        return _write(sweep, results, output_dir) if state.is_main_process else {}


def _describe(config: EvaluateConfig, sweep: Sweep, jobs: Sequence[SampleConfig], state: PartialState) -> dict:
    """All that the figures depend on but the values; what is wrong with it is said before anything is drawn."""
    options = {"requires_own_tokenizer": config.requires_own_tokenizer}
    pipe = load_given_pipeline("pipeline", config.pipeline, **options)
    for job in jobs:
        sampling = pipe.sampling.changed(**asdict(job.sampling))
        sampling.check_for(pipe.prior)
        drawn = drawn_of(pipe, job.class_labels, job.prompts, job.negative_prompt, sampling)
    # Where a file of prompts lies is no matter.
    texts = {} if config.draw.prompts is None else drawn.described()
    with reading("features", config.features, FEATURES_EXPECTED):
        extractor = load_features(config.features, variant=config.features_variant)
    reference, train = open_references(config, tuple(pipe.tokenizer.config.image_size))
    return {
        "sweep": sweep.option,
        "draw": {name: value for name, value in asdict(config.draw).items() if name not in _OF_TEXTS} | texts,
        **{name: value for name, value in extractor.record.items() if name != "features"},
        "reference_sha256": reference.sha256,
        "reference_crop": reference.crop,
        "training_images_sha256": None if train is None else train.sha256,
        **{name: getattr(config, name) for name in ("preset", "max_features", "seed", "num_threads")},
        "device": state.device.type,
    }


def _measured(config: EvaluateConfig, job: SampleConfig, state: PartialState, done: str) -> dict | None:
    """Return the result of a value, measured now where it is not there; None where that was stopped."""
    folder = Path(job.output_dir).parent
    if is_regular(folder / RESULT_NAME):
        return read_json(folder / RESULT_NAME)
    kept = config.reference_file or str(Path(config.output_dir, REFERENCE_NAME))
    changed = {"samples": job.output_dir, "output_dir": str(folder), "reference_file": kept}
    single = replace(config, **changed, sweep=None, draw=DrawConfig(), pipeline=None, requires_own_tokenizer=False)
    with stoppable_job(state) as stoppable, claimed(folder, state):
        stoppable.done = lambda: done
        return measure_samples(single, state)
    return None


def _write(sweep: Sweep, results: Sequence[Mapping], output_dir: Path) -> dict:
    """Write and print the table, and draw the picture."""
    rows = [{sweep.option: value} | result for value, result in zip(sweep.values, results, strict=True)]
    known = [name for name in FIGURES if any(isinstance(row.get(name), int | float) for row in rows)]
    shown = [{name: row.get(name) for name in (sweep.option, *known)} for row in rows]
    table = {"sweep": sweep.option, "values": list(sweep.values), "figures": shown, "results": rows}
    write_json(table, output_dir / TABLE_NAME)
    panels = {name: {sweep.option: _curve(sweep.option, name, shown)} for name in _PANELS if name in known}
    if "fid" in panels:
        panels.pop("fd")
    if panels:
        save_curves(panels, output_dir / PICTURE_NAME, over=sweep.option)
    print(format_columns([[sweep.option, *known]] + [[_cell(value) for value in row.values()] for row in shown]))
    print(f"table{' and picture' if panels else ''} in {output_dir}")
    return table


def _curve(option: str, name: str, rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    """Return the values of the option, ascending, and of a figure, where it could be had."""
    points = sorted((row[option], row[name]) for row in rows if isinstance(row[name], int | float))
    return [point[0] for point in points], [point[1] for point in points]


def _cell(value: float | str | None) -> str:
    """Write a figure of the table."""
    return format_number(value) if isinstance(value, int | float) else str(value or "-")
