"""Figures of a set of samples by features, on any number of processes: a part of `nextblock evaluate`.

Each process makes the features of its share; the first puts them together and computes. Legend: N images.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from nextblock.data.unreadable import UnreadableImageError
from nextblock.evaluation.distribution import SPLIT_SIZE, InceptionScore, inception_score
from nextblock.evaluation.feature_sets import FeatureSet, embed, gathered, save_part
from nextblock.evaluation.features import FeatureExtractor, load_features
from nextblock.evaluation.figures import memorisation_figures, sample_figures
from nextblock.evaluation.presets import check_features, check_reference, check_samples
from nextblock.evaluation.references import (
    OpenedReference,
    Reference,
    is_kept,
    provenance_of,
    read_statistics,
    save_reference,
)
from nextblock.evaluation.report import Row, environment, format_table, write_json
from nextblock.evaluation.sample_sets import SampleSet, is_of_prompts, open_samples
from nextblock.files.atomic import write_whole
from nextblock.files.regular import is_regular, read_yaml

from .cpu import fixed_threads, keep_freed_memory
from .evaluate_config import EvaluateConfig
from .given_references import open_references
from .mistakes import reading
from .progress import Progress
from .result_pictures import draw_result

FEATURES_EXPECTED = "a file of Inception's weights, or a vision model of transformers"
RESULT_NAME, NEAREST_NAME = "result.json", "nearest.npz"
REFERENCE_NAME, CLASSES_NAME = "reference.npz", "per_class.json"
_PARTS = "parts"
_MAX_LISTED = 32
# What the table shows, in its order; the result holds more.
FIGURES = {
    "fid": "FID",
    "fd": "Frechet distance of features",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "fd_per_class_mean": "Frechet distance by class, mean",
    "nearest_train_p1_ratio": "nearest training image, samples over real",
}


def measure_samples(config: EvaluateConfig, state: PartialState) -> dict:
    """Measure samples beside a reference, and write result.json and what belongs to it.

    Args:
        config: with `features`.
        state: every process must call this; the first has claimed `output_dir`.

    Returns:
        What result.json holds; empty on all processes but the first.

    Raises:
        ValueError: naming the option that is wrong.
    """
    with reading("samples", config.samples, "images of one size, as a folder or an .npz file"):
        samples = open_samples(config.samples)
    if config.preset is not None:
        check_samples(config.preset, samples)
    with reading("features", config.features, FEATURES_EXPECTED):
        extractor = load_features(config.features, variant=config.features_variant, device=state.device)
    if config.preset is not None:
        check_features(config.preset, extractor.record)
    reference, train = open_references(config, samples.image_size)
    if config.preset is not None:
        check_reference(config.preset, reference)
    with fixed_threads(config.num_threads):
        work = _Work(config, state, extractor, reference)
        own, score = _scored(samples, work.features_of("samples", samples, keeps_classes=True))
        measured = work.reference()
        learned = None if train is None else work.features_of("training_images", train.images)
        if not state.is_main_process:
            return {}
        work.clean_up()
        result = _result(config, own, score, measured, learned, state)
    result |= {"inception_score_split_size": SPLIT_SIZE, "inception_score_order": _score_order(samples)}
    result |= _fid(result, extractor.record["features_are_inception"])
    result |= _settings(config, state, samples, reference, train, extractor)
    among = (train or reference).images
    draw_result(Path(config.output_dir), result, FIGURES, samples, among, nearest_name=NEAREST_NAME)
    write_json(result, Path(config.output_dir) / RESULT_NAME)
    _print(result, config)
    return result


class _Work:
    """Makes features on all processes, each its share, which the first puts together."""

    def __init__(
        self, config: EvaluateConfig, state: PartialState, extractor: FeatureExtractor, reference: OpenedReference
    ):
        self._config, self._state, self._extractor, self._opened = config, state, extractor, reference
        self._parts = Path(config.output_dir) / _PARTS
        self._file = Path(config.reference_file or Path(config.output_dir, REFERENCE_NAME))
        side = extractor.side
        self._num_features = extractor(np.zeros((1, side, side, 3), np.uint8)).features.shape[1]
        self._statistics = self._read_statistics()
        with reading("reference_file", str(self._file), "a file that an evaluation has kept, or none yet"):
            self._is_kept = is_kept(self._file, self._provenance())
        if state.device.type == "cpu":
            keep_freed_memory()
        # Nobody writes before everybody has looked.
        state.wait_for_everyone()
        if state.is_main_process:
            # Of a command that was killed.
            self.clean_up()
        state.wait_for_everyone()

    def clean_up(self) -> None:
        """Remove the processes' shares."""
        if self._parts.is_dir():
            shutil.rmtree(self._parts)

    def features_of(self, name: str, images: SampleSet, *, keeps_classes: bool = False) -> FeatureSet | None:
        """Make the features of a set; None on all processes but the first."""
        state, config = self._state, self._config
        progress = Progress(state, f"features, {name}", len(images), 0)
        sizes = {"batch_size": config.batch_size, "max_features": config.max_features}
        share = {"rank": state.process_index, "world_size": state.num_processes, "on_batch": progress.add}
        try:
            arrays = embed(images, self._extractor, keeps_classes=keeps_classes, **sizes, **share)
        except UnreadableImageError as error:
            progress.close()
            raise ValueError(f"{name}: {images.path} holds what is no picture in order: {error}") from error
        parts = [arrays]
        if state.num_processes > 1:
            parts = [self._parts / f"{name}-{rank}.npz" for rank in range(state.num_processes)]
            self._parts.mkdir(exist_ok=True)
            save_part(parts[state.process_index], arrays)
        del arrays
        progress.finish_share()
        if state.is_main_process and state.num_processes > 1:
            progress.wait_for_files(lambda: next((str(part) for part in parts if not part.is_file()), None))
        progress.close()
        labels = None if is_of_prompts(images.job) else images.class_labels
        return gathered(parts, labels, config.max_features) if state.is_main_process else None

    def reference(self) -> Reference | None:
        """Make or take up the reference's features and moments; None on all processes but the first."""
        opened, statistics = self._opened, self._statistics
        if self._is_kept:
            if not self._state.is_main_process:
                return None
            print(f"features of the reference: those kept in {self._file}")
            return read_statistics(self._file, self._num_features)
        if opened.images is None:
            return statistics
        features = self.features_of("reference", opened.images)
        if not self._state.is_main_process:
            return None
        if statistics is None:
            found = Reference(features.num_items, features.moments, features.spatial_moments, features)
        else:
            found = replace(statistics, features=features)
        if found.moments is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_reference(self._file, found, self._provenance())
        return found

    def _read_statistics(self) -> Reference | None:
        """Read the reference's file of statistics, where it is one; refuse one that was made in another way."""
        opened = self._opened
        if opened.statistics is None:
            return None
        with reading("reference", opened.name, "statistics as mu and sigma, of the samples' features"):
            statistics = read_statistics(opened.statistics, self._num_features)
            _check_made_alike(opened.statistics, self._provenance())
        return statistics

    def _provenance(self) -> dict:
        """All that the reference's figures depend on."""
        record = {name: value for name, value in self._extractor.record.items() if name != "features"}
        return {
            **record,
            "reference_sha256": self._opened.sha256,
            "reference_crop": self._opened.crop,
            "max_features": self._config.max_features,
            "device": self._state.device.type,
            "num_threads": self._config.num_threads,
        }


def _check_made_alike(file: Path, wanted: dict) -> None:
    """Refuse statistics that say that another network, or another way of resizing, made them."""
    made = provenance_of(file) or {}
    for name in ("features_sha256", "features_variant", "features_side"):
        if name in made and made[name] != wanted[name]:
            raise ValueError(f"{file} was made with {name} {made[name]}; expected {wanted[name]}, the samples'")


def _score_order(samples: SampleSet) -> str:
    """Name the order of the inception score's splits: pictures in a folder have none that means anything."""
    return "as stored" if samples.format == "npz" or samples.job is not None else "by content"


def _scored(samples: SampleSet, own: FeatureSet | None) -> tuple[FeatureSet | None, InceptionScore | None]:
    """Take the inception score, and let go of the class probabilities, which are large."""
    if own is None or own.class_probabilities is None:
        return own, None
    order = None if _score_order(samples) == "as stored" else own.content_order
    return replace(own, class_probabilities=None), inception_score(own.class_probabilities, order=order)


def _result(
    config: EvaluateConfig,
    own: FeatureSet,
    score: InceptionScore | None,
    reference: Reference,
    train: FeatureSet | None,
    state: PartialState,
) -> dict:
    """Compute all figures, and write what is not flat to files of its own."""
    output_dir = Path(config.output_dir)
    for name in (CLASSES_NAME, NEAREST_NAME):
        # Of an evaluation here before, which may have had figures that this one has not.
        (output_dir / name).unlink(missing_ok=True)
    figures = sample_figures(own, reference, score=score, seed=config.seed, device=state.device)
    real = None if train is None else reference.features
    among = reference.features if train is None else train
    remembered, found = memorisation_figures(own, among, real, state.device)
    figures |= remembered
    per_class = figures.pop("fd_per_class", None)
    if per_class is not None:
        write_json({"fd": per_class}, output_dir / CLASSES_NAME)
    if found is not None:
        arrays = {
            "sample_numbers": own.numbers.numpy(),
            "train_numbers": among.numbers[found.indices].numpy(),
            "distances": found.distances.numpy(),
        }
        write_whole(output_dir / NEAREST_NAME, partial(np.savez, **arrays))
    figures["nearest_train_is_reference"] = train is None
    figures["notes"] = _notes(own, reference)
    return figures


def _notes(own: FeatureSet, reference: Reference) -> list[str]:
    """Say what readers of the figures should know."""
    notes, num_features = [], own.features.shape[1]
    for name, num_items in (("samples", own.num_items), ("images of the reference", reference.num_items)):
        if num_items is not None and num_items <= num_features:
            notes.append(
                f"{num_items} {name} are too few for a covariance of {num_features} features: the Frechet distance is "
                "too large, and to be compared only with distances of as many"
            )
    for name, kept, num_items in (
        ("samples", own, own.num_items),
        ("images of the reference", reference.features, reference.num_items),
    ):
        if kept is not None and num_items is not None and len(kept.features) < num_items:
            notes.append(f"{len(kept.features)} of {num_items} {name} are compared one by one")
    return notes


def _fid(result: dict, is_inception: bool) -> dict:
    """Return the Fréchet distance under FID's own name, which is for Inception's features alone."""
    if is_inception:
        return {"fid": result["fd"]} | ({"fid_reason": result["fd_reason"]} if result["fd"] is None else {})
    return {"fid": None, "fid_reason": "the features are not Inception's of 2015; their distance is fd"}


def _settings(
    config: EvaluateConfig,
    state: PartialState,
    samples: SampleSet,
    reference: OpenedReference,
    train: OpenedReference | None,
    extractor: FeatureExtractor,
) -> dict:
    """All that is needed to take the figures again."""
    has_no_classes = samples.class_labels is None or is_of_prompts(samples.job)
    return {
        "preset": config.preset,
        "samples": config.samples,
        "samples_sha256": samples.sha256(),
        "samples_format": samples.format,
        "samples_num_classes": None if has_no_classes else len(np.unique(samples.class_labels)),
        "image_size": list(samples.image_size),
        "reference": reference.name,
        "reference_kind": reference.kind,
        "reference_sha256": reference.sha256,
        "reference_crop": reference.crop,
        "training_images": None if train is None else train.name,
        "training_images_sha256": None if train is None else train.sha256,
        **extractor.record,
        "max_features": config.max_features,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "num_threads": config.num_threads,
        "num_processes": state.num_processes,
        "device": state.device.type,
        "device_name": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else None,
        **_sampling(config, samples),
        **{f"version_{name}": version for name, version in environment().items()},
    }


def _sampling(config: EvaluateConfig, samples: SampleSet) -> dict:
    """What the samples' own folder says of how they were drawn."""
    settings = samples.job
    options = Path(config.samples, "config.yaml")
    if settings is None and is_regular(options):
        settings = read_yaml(options)
    if not isinstance(settings, dict):
        return {"sampling_reason": "the samples' folder has no job.json or config.yaml"}
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"sampling_{name}_{inner}": entry for inner, entry in value.items()}
        elif isinstance(value, list) and len(value) > _MAX_LISTED:
            flat[f"sampling_num_{name}"] = len(value)
        else:
            flat[f"sampling_{name}"] = value
    return flat


def _print(result: dict, config: EvaluateConfig) -> None:
    """Print the figures, and why others are missing."""
    shown = [Row(name, label, result[name]) for name, label in FIGURES.items() if result.get(name) is not None]
    print(format_table(shown))
    for name in FIGURES:
        if result.get(name) is None:
            print(f"no {name}: {result.get(f'{name}_reason')}")
    for note in result["notes"]:
        print(note)
    num_reference = result["num_reference"] if result["num_reference"] is not None else "an unknown number of"
    print(f"{result['num_samples']} samples beside {num_reference} images; result in {config.output_dir}")
