"""Measures a tokenizer on held-out images: reconstruction, use of the codebook, bits.

    nextblock evaluate-tokenizer --config tokenizer/evaluate-digits
    accelerate launch -m nextblock evaluate-tokenizer --config tokenizer/evaluate-digits --features FILE

Legend: N images, n of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from nextblock.data.adm_crop import AdmCropped
from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate
from nextblock.data.usable import open_usable, source_fingerprint
from nextblock.evaluation.codebook import codebook_summary, digit_entropies, num_dead_codes
from nextblock.evaluation.features import VARIANTS, FeatureExtractor, load_features
from nextblock.evaluation.pictures import comparison_grid, save_picture
from nextblock.evaluation.presets import check_features, preset_of
from nextblock.evaluation.reconstruction import Reconstructions, merged, reconstruct
from nextblock.evaluation.report import Row, environment, format_table, write_json
from nextblock.evaluation.result_page import write_result_page
from nextblock.evaluation.similarity import (
    MIN_SSIM_SIDE,
    Measured,
    SimilarityMeter,
    bit_figures,
    similarity_figures,
)
from nextblock.evaluation.source_sets import CROPS
from nextblock.files.claim import claimed
from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.perceptual import load_lpips
from nextblock.training.processes import connect_processes

from .command_line import parse_run_config
from .cpu import MAX_THREADS, fixed_threads
from .inputs import load_given
from .mistakes import reading
from .progress import Progress
from .run_data import data_of_run

RESULT_NAME = "result.json"
_FIGURES = {
    "psnr": "peak signal-to-noise ratio, dB, mean over images",
    "psnr_of_mean_error": "peak signal-to-noise ratio of the mean error, dB",
    "ssim": "structural similarity",
    "lpips": "LPIPS",
    "rfid": "Frechet distance of Inception's features, reconstructions to originals",
    "fd": "Frechet distance of the given features",
    "code_usage": "share of codes used",
    "code_perplexity": "perplexity of codes",
    "num_dead_codes": "codes never used",
    "digit_entropy": "how evenly digits of a product codebook take their values, mean",
    "lowest_digit_entropy": "the same of the least even digit",
    "bits_per_token": "bits of a token",
    "bits_per_pixel": "bits of the tokens over pixels",
    "code_entropy_bits_per_token": "bits of a token if codes are written by their frequencies",
}

@dataclass(kw_only=True)
class EvaluateTokenizerConfig:
    """Measures a tokenizer on one split of a data set; writes result.json, report.html and .json, reconstructions.png.

    result.json has every figure under a name of its own; what could not be had is null, and NAME_reason says why.
    """

    tokenizer: str
    """Folder of the tokenizer."""
    output_dir: str
    """Folder that the results and the picture go to."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Images to measure on. Not given: what the tokenizer was trained on, and held out."""
    split: str | None = None
    """Split of the data; by default the one that the data configuration holds out (`data.eval_split`)."""
    crop: Literal[CROPS] | None = None
    """How images are brought to size: "center" as in training without its variations (Lanczos); "adm" as ADM's loader
    does, by halving and bicubic, for square images alone. Null is the preset's, or "center"."""
    preset: Literal["rfid-imagenet-256"] | None = None
    """A published protocol; a tokenizer, images or features that break it are refused."""
    features: str | None = None
    """Network whose features the Fréchet distance of reconstructions and originals is taken of (rFID): a file of
    Inception's weights of 2015, or a vision model of transformers, by its folder or its id on the hub; null leaves it
    out."""
    features_variant: Literal[VARIANTS] | None = None
    """How pictures are resized for it; null takes the way of its own evaluator."""
    lpips_network: Literal["vgg", "alex", "squeeze"] | None = None
    """Network of LPIPS, of torchvision; null leaves LPIPS out."""
    batch_size: int = 100
    """Images encoded at a time by each process."""
    num_threads: int = 1
    """CPU threads that each process computes with; rounding depends on it."""
    num_pictures: int = 10
    """Originals shown above their reconstructions."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""
    def __post_init__(self):
        if self.split is None and self.data.eval_split is None:
            raise ValueError(
                "split and data.eval_split are both null; expected the name of a split to measure on"
            )
        for name in ("batch_size", "num_threads", "num_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")
        if self.num_threads > MAX_THREADS:
            raise ValueError(f"num_threads is {self.num_threads}; expected at most {MAX_THREADS}")
        for name in ("features_variant", "preset"):
            if getattr(self, name) is not None and self.features is None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but features is null; expected both")


def main(argv: Sequence[str]) -> None:
    """Measure the tokenizer that the command line names, print the figures and write the results."""
    evaluate_tokenizer(parse_run_config(EvaluateTokenizerConfig, command="evaluate-tokenizer", argv=argv))


def evaluate_tokenizer(config: EvaluateTokenizerConfig) -> dict:
    """Measure a tokenizer, each process on its own batches.

    Args:
        config: what is measured, and on what.

    Returns:
        What result.json holds; empty on all processes but the first.

    Raises:
        ValueError: naming the option that is wrong.
    """
    state = connect_processes(config.cpu)
    with claimed(Path(config.output_dir), state):
        return _evaluate(config, state)


def _evaluate(config: EvaluateTokenizerConfig, state: PartialState) -> dict:
    """Do the work."""
    if config.data.source is None:
        config = replace(config, data=data_of_run(config.tokenizer)[0])
    split = config.split or config.data.eval_split
    source = open_usable(config.data, split, print if state.is_main_process else _say_nothing)
    tokenizer = load_given("tokenizer", config.tokenizer, VQVAE).to(state.device).eval()
    image_size = tokenizer.config.image_size
    if config.preset is not None:
        _check_preset(config, image_size, len(source))
    crop = config.crop or (preset_of(config.preset).crop if config.preset is not None else None) or "center"
    if crop == "adm":
        if image_size[0] != image_size[1]:
            raise ValueError(f"crop is 'adm', which is for square images; the tokenizer's are {list(image_size)}")
        source = AdmCropped(source, image_size[0])
    dataset = ImageDataset(source, image_size, TransformConfig(), seed=0)
    extractor, lpips = _load_networks(config, image_size, state)
    meter = SimilarityMeter(len(dataset), lpips, extractor)
    with fixed_threads(config.num_threads):
        own = _measure(config, tokenizer, dataset, meter, state)
    gathered = gather_object(own)
    if not state.is_main_process:
        return {}
    numbers, parts, measured = zip(*gathered, strict=True)
    whole = merged(parts, numbers)
    is_inception = extractor is not None and extractor.record["features_are_inception"]
    with fixed_threads(config.num_threads):
        figures = _figures(whole, similarity_figures(measured, numbers), tokenizer, is_inception)
    report = {
        "tokenizer": config.tokenizer,
        "data": asdict(config.data) | {"measured_split": split, "num_images": len(dataset)},
        "figures": whole.figures(),
        "codebook": codebook_summary(whole.code_counts, digits=tokenizer.quantizer.digits),
        "parameters": {"tokenizer": tokenizer.num_parameters()},
        "precision": {"dtype": str(tokenizer.dtype), "device": state.device.type, "threads": config.num_threads},
        "versions": environment(),
    }
    settings = {
        **_flat({name: report[name] for name in ("tokenizer", "data", "parameters", "precision")}),
        "tokenizer_sha256": model_fingerprint(tokenizer),
        "image_size": list(image_size),
        "num_tokens": sum(tokenizer.layout.block_lengths),
        "image_names_sha256": source_fingerprint(source),
        "crop": crop,
        "preset": config.preset,
        "batch_size": config.batch_size,
        "num_processes": state.num_processes,
        "lpips_network": config.lpips_network,
        **({"features": None} if extractor is None else extractor.record),
        **{f"version_{name}": version for name, version in report["versions"].items()},
    }
    result = figures | settings
    _write(config, report, result, whole)
    return result


def _measure(
    config: EvaluateTokenizerConfig,
    tokenizer: VQVAE,
    dataset: ImageDataset,
    meter: SimilarityMeter,
    state: PartialState,
) -> list[tuple[np.ndarray, Reconstructions, Measured]]:
    """Measure this process's images; an empty list where it has none."""
    progress = Progress(state, "evaluate-tokenizer", len(dataset), 0)

    def observe(reconstructions: torch.Tensor, originals: torch.Tensor) -> None:
        meter(reconstructions, originals)
        progress.add(len(originals))

    starts = range(config.batch_size * state.process_index, len(dataset), config.batch_size * state.num_processes)
    # Whole batches are dealt out: a batch is of one shape, and rounds alike, for any number of processes.
    batches = [[*range(start, min(start + config.batch_size, len(dataset)))] for start in starts]
    own = []
    if batches:
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
        kept = config.num_pictures
        found = reconstruct(tokenizer, loader, tokenizer.config.vocab_size, num_kept=kept, observe=observe)
        own = [(np.concatenate(batches), found, meter.measured())]
    progress.close()
    return own


def _check_preset(config: EvaluateTokenizerConfig, image_size: tuple[int, int], num_images: int) -> None:
    """Refuse a tokenizer and images that break a protocol, naming all that does."""
    preset, problems = preset_of(config.preset), []
    if tuple(image_size) != preset.image_size:
        given, wanted = ("x".join(map(str, size)) for size in (image_size, preset.image_size))
        problems.append(f"the tokenizer's images are {given}; expected {wanted}")
    if num_images != preset.num_reference_images:
        problems.append(f"there are {num_images} images; expected {preset.num_reference_images}")
    if config.crop not in (None, preset.crop):
        problems.append(f"crop is {config.crop!r}; expected {preset.crop!r}")
    if problems:
        raise ValueError(
            f"preset is {config.preset!r}, which is broken: {'; '.join(problems)}; expected {preset.reference_name}"
        )


def _say_nothing(line: str) -> None:
    """Leave a line to the first process."""


def _load_networks(
    config: EvaluateTokenizerConfig, image_size: tuple[int, int], state: PartialState
) -> tuple[FeatureExtractor | None, torch.nn.Module | None]:
    """Load what pictures are compared by, where it is asked for."""
    extractor = lpips = None
    if config.features is not None:
        with reading("features", config.features, "a file of Inception's weights, or a vision model of transformers"):
            extractor = load_features(config.features, variant=config.features_variant, device=state.device)
    if config.preset is not None:
        check_features(config.preset, extractor.record)
    if config.lpips_network is not None:
        lpips = load_lpips(config.lpips_network, "lpips_network", "null leaves LPIPS out").to(state.device)
        blank = torch.zeros(1, 3, *image_size, device=state.device)
        with reading("lpips_network", config.lpips_network, f"one that takes images of {list(image_size)}"):
            lpips(blank, blank)
    return extractor, lpips


def _figures(
    whole: Reconstructions, similarity: dict[str, float | None], tokenizer: VQVAE, is_inception: bool
) -> dict:
    """Return the figures by name; those that could not be had are None, and a reason stands beside them."""
    found, counts = whole.figures(), whole.code_counts
    no_distance = "features is null" if len(whole.class_labels) > 1 else "a single image has no covariance"
    is_other = similarity["fd"] is not None and not is_inception
    why = {
        "ssim": f"images have fewer than {MIN_SSIM_SIDE} pixels a side",
        "lpips": "lpips_network is null",
        "rfid": "features are not Inception's of 2015; their distance is fd" if is_other else no_distance,
        "fd": no_distance,
    }
    compared = {**similarity, "rfid": similarity["fd"] if is_inception else None}
    return {
        "psnr": found["reconstruction_psnr"],
        "psnr_of_mean_error": found["reconstruction_psnr_of_mean_error"],
        **{name: compared[name] for name in why},
        "code_usage": found["code_usage"],
        "code_perplexity": found["code_perplexity"],
        "num_dead_codes": num_dead_codes(counts.sum(dim=0)).item(),
        **_digit_figures(whole, tokenizer),
        **bit_figures(counts, sum(tokenizer.layout.block_lengths), tokenizer.config.image_size),
        **{f"{name}_reason": reason for name, reason in why.items() if compared[name] is None},
    }


def _digit_figures(whole: Reconstructions, tokenizer: VQVAE) -> dict[str, float]:
    """Return how evenly a product codebook's digits take their values, on average and the least even of them."""
    if tokenizer.quantizer.digits is None:
        return {}
    entropies = digit_entropies(whole.code_counts, tokenizer.quantizer.digits)
    return {"digit_entropy": entropies.mean().item(), "lowest_digit_entropy": entropies.amin().item()}


def _flat(content: dict) -> dict:
    """Write nested entries as one level, names joined by "_"."""
    flat = {}
    for name, value in content.items():
        inner = {f"{name}_{key}": entry for key, entry in _flat(value).items()} if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else inner
    return flat


def _write(config: EvaluateTokenizerConfig, report: dict, result: dict, whole: Reconstructions) -> None:
    """Write the results and the picture, and print the figures."""
    output_dir = Path(config.output_dir)
    write_json(report, output_dir / "report.json")
    picture = comparison_grid(whole.originals, whole.reconstructions, num_columns=config.num_pictures)
    save_picture(picture, output_dir / "reconstructions.png")
    write_json(result, output_dir / RESULT_NAME)
    pictures = {"reconstructions.png": "Originals above their reconstructions"}
    known = {name: words for name, words in _FIGURES.items() if name in result}
    write_result_page(output_dir, result, known, pictures)
    shown = {name: words for name, words in known.items() if result[name] is not None}
    print(format_table([Row(name, words, result[name]) for name, words in shown.items()]))
    split, num_images = report["data"]["measured_split"], report["data"]["num_images"]
    print(f"{num_images} images of split {split!r}; results, report and picture in {output_dir}")
