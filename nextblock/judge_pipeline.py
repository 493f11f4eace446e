"""Judges a trained pipeline: reconstruction, codebook, samples, memorisation, diversity, size and time.

A part of `nextblock evaluate`. Writes report.json, reconstructions.png, samples.png and curves.png, and prints the
figures beside their aims.
Legend: N images, K blocks, V codes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataset, collate
from nextblock.data.pixels import to_uint8
from nextblock.data.usable import open_usable
from nextblock.evaluation.codebook import codebook_summary
from nextblock.evaluation.digits_judge import DigitSet, digit_figures
from nextblock.evaluation.pictures import class_grid, comparison_grid, save_curves, save_picture
from nextblock.evaluation.reconstruction import reconstruct
from nextblock.evaluation.report import Aim, Row, environment, format_number, format_table, write_json
from nextblock.evaluation.training_log import last_value, loss_curves, read_log
from nextblock.files.regular import read_yaml
from nextblock.pipelines import ClassToImagePipeline
from nextblock.pipelines.sample_files import NPZ_NAME, read_samples

from .evaluate_config import LABELS, EvaluateConfig
from .inputs import load_given
from .mistakes import reading
from .run_data import data_of_run

_PICTURE_COLUMNS = 10


def layout_name(layout) -> str:
    """Name a block layout as the configs do.

    Args:
        layout: a `BlockLayout`.

    Returns:
        "scales", "raster" (single tokens), "rows", "quadrants" or, for any other tiles, "tiles".
    """
    if layout.is_scales:
        return "scales"
    (height, width), (tile_height, tile_width) = layout.grid, layout.shapes[0]
    if (tile_height, tile_width) == (1, 1):
        return "raster"
    if (tile_height, tile_width) == (1, width):
        return "rows"
    if (2 * tile_height, 2 * tile_width) == (height, width):
        return "quadrants"
    return "tiles"


def judge_pipeline(config: EvaluateConfig) -> None:
    """Judge a pipeline by its samples and by held-out images.

    Args:
        config: what is judged, and by what.

    Raises:
        ValueError: naming the option that is wrong.
    """
    if config.data.source is None:
        config = replace(config, data=data_of_run(config.run_dirs[0] if config.run_dirs else None)[0])
    device = "cuda" if torch.cuda.is_available() and not config.cpu else "cpu"
    logs = _read_logs(config)
    images, class_labels, sampling = _read_samples(Path(config.samples))
    options = {"requires_own_tokenizer": config.requires_own_tokenizer}
    pipe = load_given("pipeline", config.pipeline, ClassToImagePipeline, **options).to(device)
    _check_samples(config.samples, images, class_labels, pipe)
    heldout = _reconstruct_heldout(pipe.tokenizer, config)
    figures = heldout.figures()
    if "prior" in logs:
        figures |= _prior_figures(logs["prior"], pipe.tokenizer.config.vocab_size)
    if config.data.source == "digits":
        figures |= _judge_digits(pipe.tokenizer, config, heldout, images, class_labels)

    report = _build_report(config, pipe, heldout, logs)
    layout = report["layout"]["name"]
    rows = _table_rows(figures, config.aims.get(layout, {}))
    report |= {
        "samples": {"num_images": len(images), "sampling": sampling},
        "figures": figures,
        "aims": {
            row.figure: {"value": row.value, "aim": str(row.aim), "is_met": row.aim.is_met(row.value)}
            for row in rows
            if row.aim is not None
        },
        "notes": _notes(config, figures),
    }
    output_dir = Path(config.output_dir)
    _draw_pictures(output_dir, config, heldout, logs, images, class_labels)
    write_json(report, output_dir / "report.json")
    print(f"layout: {layout}")
    print(format_table(rows))
    _print_footer(report, output_dir)


def _read_logs(config: EvaluateConfig) -> dict[str, list[dict]]:
    """Read the logs of the trainings that the config names."""
    if not config.run_dirs:
        return {}
    with reading("run_dirs", config.run_dirs, "the output folders of two trainings"):
        return {stage: read_log(folder) for stage, folder in zip(("tokenizer", "prior"), config.run_dirs, strict=True)}


def _read_samples(folder: Path) -> tuple:
    """Return the images, their classes and the config they were drawn with."""
    images_path, config_path = (folder / name for name in (NPZ_NAME, "config.yaml"))
    for path in (images_path, config_path):
        if not path.is_file():
            expected = "what `nextblock sample` writes with output_format npz"
            raise ValueError(f"samples: {path} does not exist; expected {expected}")
    with reading("samples", folder, "what `nextblock sample` writes with output_format npz"):
        return *read_samples(images_path), read_yaml(config_path)


def _check_samples(folder: str, images: np.ndarray, class_labels: np.ndarray, pipe: ClassToImagePipeline) -> None:
    """Refuse samples that another pipeline drew."""
    if not len(images):
        raise ValueError(f"samples: {folder} has no images; expected at least 1")
    expected, given = ("x".join(map(str, size)) for size in (pipe.tokenizer.config.image_size, images.shape[1:3]))
    if expected != given:
        raise ValueError(f"samples: {folder} has images of {given}; expected {expected}, the pipeline's image size")
    num_classes = max(1, pipe.prior.conditions.num_classes)
    if not np.isin(class_labels, np.arange(num_classes)).all():
        raise ValueError(
            f"samples: {folder} has the classes {np.unique(class_labels)[:10]}; expected 0 to {num_classes - 1}, "
            "the pipeline's"
        )


def _open_split(tokenizer, config: EvaluateConfig, split: str):
    """Load one split's images at the tokenizer's size, unaugmented, in batches."""
    source = open_usable(config.data, split, print)
    dataset = ImageDataset(source, tuple(tokenizer.config.image_size), TransformConfig(), seed=0)
    return DataLoader(dataset, batch_size=config.batch_size, collate_fn=collate)


def _reconstruct_heldout(tokenizer, config: EvaluateConfig):
    """Encode and decode the held-out images; the digits' judge wants all the pictures."""
    num_kept = None if config.data.source == "digits" else config.num_pictures
    batches = _open_split(tokenizer, config, config.data.eval_split)
    return reconstruct(tokenizer, batches, tokenizer.config.vocab_size, num_kept=num_kept)


def _prior_figures(log: list[dict], num_codes: int) -> dict[str, float]:
    """Return the prior's last held-out loss and by how much it beats guessing all codes alike."""
    loss = last_value(log, "eval/loss")
    if loss is None:
        return {}
    return {"prior_heldout_loss": loss, "prior_gain_nats": math.log(num_codes) - loss}


def _judge_digits(tokenizer, config: EvaluateConfig, heldout, images, class_labels) -> dict[str, float]:
    """Measure samples and reconstructions against the real digits."""
    batches = list(_open_split(tokenizer, config, config.data.split))
    train_images = np.concatenate([to_uint8(batch["pixel_values"]) for batch in batches])
    train_labels = np.concatenate([batch["class_labels"].numpy() for batch in batches])
    return digit_figures(
        train=DigitSet.from_images(train_images, train_labels),
        heldout=DigitSet.from_images(heldout.originals, heldout.class_labels),
        reconstructions=DigitSet.from_images(heldout.reconstructions, heldout.class_labels),
        samples=DigitSet.from_images(images, class_labels),
    )


def _table_rows(figures: dict[str, float], aims: dict[str, str]) -> list[Row]:
    """Return the table's lines, each figure with what it is to be read against."""
    beside = {
        "reconstruction_psnr": "{reconstruction_psnr_of_mean_error} of the mean error",
        "prior_gain_nats": "loss {prior_heldout_loss}",
        "class_accuracy_samples": "{class_accuracy_heldout} of the real held-out",
        "frechet_samples_ratio": (
            "samples {frechet_samples}, floor {frechet_train}, reconstructions {frechet_reconstructions}"
        ),
        "nearest_train_p1_ratio": "1st percentiles {nearest_train_p1_samples} and {nearest_train_p1_heldout}",
        "diversity_ratio": "means {within_class_distance_samples} and {within_class_distance_heldout}",
    }
    numbers = {name: format_number(value) for name, value in figures.items()}
    return [
        Row(
            name,
            label,
            figures[name],
            Aim.parse(aims[name]) if name in aims else None,
            beside.get(name, "").format_map(numbers),
        )
        for name, label in LABELS.items()
        if name in figures
    ]


def _notes(config: EvaluateConfig, figures: dict[str, float]) -> list[str]:
    """Say which figures of the table there are not, and why."""
    notes = []
    if "prior_gain_nats" not in figures:
        notes.append("The prior's held-out loss is not reported: no training that logged it is named.")
    if config.data.source != "digits":
        notes.append(
            "Class accuracy, Frechet distance, memorisation and diversity are not reported: "
            f"they are judged for the digits only, and data.source is {config.data.source!r}."
        )
    return notes


def _build_report(config: EvaluateConfig, pipe, heldout, logs: dict[str, list[dict]]) -> dict:
    """Collect what the report says besides the figures."""
    models = {"tokenizer": pipe.tokenizer, "prior": pipe.prior}
    return {
        "pipeline": config.pipeline,
        "layout": {"name": layout_name(pipe.tokenizer.layout), **pipe.tokenizer.layout.to_dict()},
        "data": asdict(config.data) | {"num_heldout_images": len(heldout.class_labels)},
        "codebook": codebook_summary(heldout.code_counts, digits=pipe.tokenizer.quantizer.digits),
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "training_seconds": {stage: last_value(log, "time/total") for stage, log in logs.items()},
        "precision": {
            "dtypes": {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()},
            "device": str(pipe.device),
            "num_threads": torch.get_num_threads(),
        },
        "versions": environment(),
    }


def _draw_pictures(output_dir: Path, config: EvaluateConfig, heldout, logs, images, class_labels) -> None:
    """Save reconstructions, samples and, where a training was named, its loss curves."""
    num_pictures = config.num_pictures
    shown = heldout.originals[:num_pictures], heldout.reconstructions[:num_pictures]
    save_picture(comparison_grid(*shown, num_columns=_PICTURE_COLUMNS), output_dir / "reconstructions.png")
    save_picture(class_grid(images, class_labels, num_columns=_PICTURE_COLUMNS), output_dir / "samples.png")
    if logs:
        panels = {f"{stage} loss": loss_curves(log) for stage, log in logs.items()}
        save_curves(panels, output_dir / "curves.png")


def _print_footer(report: dict, output_dir: Path) -> None:
    """Print sizes, times, remarks and where the files are."""
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items()))
    seconds = {stage: taken for stage, taken in report["training_seconds"].items() if taken is not None}
    if seconds:
        print("training time: " + ", ".join(f"{stage} {taken:.0f} s" for stage, taken in seconds.items()))
    for note in report["notes"]:
        print(note)
    print(f"report and pictures in {output_dir}")
