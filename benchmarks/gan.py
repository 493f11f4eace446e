"""Tokenizer training on photographs with and without the discriminator: held-out PSNR, sharpness, codebook usage.

Needs scikit-image beside the package's own dependencies, for the photographs that it ships; nothing is downloaded.

    OMP_NUM_THREADS=1 python benchmarks/gan.py --output benchmarks/gan.json
"""

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor

from nextblock.command_line import parse_run_config
from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source
from nextblock.data.pixels import to_uint8
from nextblock.evaluation.metrics import psnr
from nextblock.evaluation.pictures import comparison_grid
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_tokenizer import train

SIDE = 64
HELD_OUT_SHARE = 0.25
MAX_TRAIN_PATCHES, MAX_TEST_PATCHES = 80, 10
CONFIGS = {"without": "tokenizer/photos-64", "with": "tokenizer/photos-64-gan"}
# What else scikit-image ships is drawn, printed, masked, or the same scene once more.
SKIMAGE_PHOTOGRAPHS = """
    astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png
    hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg
""".split()


def photographs() -> dict[str, np.ndarray]:
    """Return RGB photographs (H, W, 3) uint8 by name."""
    folder = Path(skimage.__file__).parent / "data"
    found = {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in SKIMAGE_PHOTOGRAPHS}
    samples = sklearn.datasets.load_sample_images()
    return found | {Path(name).name: image for name, image in zip(samples.filenames, samples.images, strict=True)}


def patches(region: np.ndarray, stride: int, max_count: int) -> list[np.ndarray]:
    """Return patches on a grid over a region, evenly thinned to at most a number."""
    height, width = region.shape[:2]
    corners = [(y, x) for y in range(0, height - SIDE + 1, stride) for x in range(0, width - SIDE + 1, stride)]
    chosen = np.linspace(0, len(corners) - 1, min(max_count, len(corners))).round().astype(int)
    return [region[y : y + SIDE, x : x + SIDE] for y, x in (corners[i] for i in chosen)]


def write_patches(root: Path) -> dict[str, int]:
    """Write training patches from the left of each photograph, held-out ones from the right; return their numbers."""
    counts = {"train": 0, "test": 0}
    for split in counts:
        (root / split).mkdir(parents=True)
    for name, image in photographs().items():
        border = image.shape[1] - max(round(HELD_OUT_SHARE * image.shape[1]), SIDE)
        parts = {
            "train": patches(image[:, :border], SIDE // 2, MAX_TRAIN_PATCHES),
            "test": patches(image[:, border:], SIDE, MAX_TEST_PATCHES),
        }
        for split, found in parts.items():
            for i, patch in enumerate(found):
                Image.fromarray(patch).save(root / split / f"{Path(name).stem}_{i:03d}.png")
            counts[split] += len(found)
    return counts


def sharpness(pixel_values: Tensor) -> Tensor:
    """Return each image's mean gradient magnitude of brightness, (B, 3, H, W) → (B,)."""
    brightness = pixel_values.mean(1)
    dy, dx = brightness.diff(dim=1)[:, :, :-1], brightness.diff(dim=2)[:, :-1]
    return (dy.square() + dx.square()).sqrt().flatten(1).mean(1)


def measure(run_dir: Path, data_dir: Path) -> dict:
    """Measure an exported tokenizer on the held-out patches, and its training by what it logged."""
    source = load_source(ImageDataConfig(source="folder", path=str(data_dir)), "test")
    images = ImageDataset(source, SIDE, TransformConfig(), seed=0)
    pixel_values = collate([images[i] for i in range(len(images))])["pixel_values"]
    tokenizer = VQVAE.from_pretrained(run_dir)
    idx_Bl = [tokenizer.img_to_idxBl(batch) for batch in pixel_values.split(32)]
    reconstruction = torch.cat([tokenizer.idxBl_to_img(blocks) for blocks in idx_Bl])
    used = torch.cat([idx.flatten() for blocks in idx_Bl for idx in blocks]).unique()
    shown = torch.arange(0, len(images), max(len(images) // 16, 1))[:16]
    grid = comparison_grid(to_uint8(pixel_values[shown]), to_uint8(reconstruction[shown]), num_columns=8)
    grid.save(run_dir / "held_out.png")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    values = [value for line in logged for name, value in line.items() if name.startswith("train/")]
    return {
        "held_out_psnr": round(psnr(reconstruction, pixel_values).mean().item(), 3),
        "held_out_sharpness": round((sharpness(reconstruction).sum() / sharpness(pixel_values).sum()).item(), 4),
        "held_out_codebook_usage": round(len(used) / tokenizer.config.vocab_size, 4),
        "lowest_training_codebook_usage_in_second_half": round(
            min(line["train/codebook/usage"] for line in logged[len(logged) // 2 :]), 4
        ),
        "highest_l2_in_second_half": round(max(line["train/l2"] for line in logged[len(logged) // 2 :]), 4),
        "lowest_l2_in_second_half": round(min(line["train/l2"] for line in logged[len(logged) // 2 :]), 4),
        "is_every_logged_value_finite": all(math.isfinite(value) for value in values),
        "curve": [
            {name.removeprefix("train/"): round(value, 5) for name, value in line.items()} for line in logged[4::5]
        ],
    }


def run_training(config_name: str, data_dir: Path, run_dir: Path, arguments: argparse.Namespace) -> dict:
    """Train one configuration and measure it."""
    options = ["--config", config_name, "--data.path", str(data_dir), "--output_dir", str(run_dir)]
    options += ["--loop.cpu", "true", "--loop.mixed_precision", "no", "--loop.tracker", "null"]
    options += ["--loop.seed", str(arguments.seed)]
    if arguments.num_steps is not None:
        options += ["--loop.num_steps", str(arguments.num_steps)]
    config = parse_run_config(TokenizerTrainConfig, command="gan.py", argv=options)
    # Of the processor: other work on the machine does not count.
    start = time.process_time()
    train(config)
    seconds = time.process_time() - start
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    results = {"config": config_name, "num_steps": config.loop.num_steps, "cpu_seconds": round(seconds, 1)}
    return results | measure(run_dir, data_dir)


def main() -> None:
    """Train both and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/gan.json")
    parser.add_argument("--num_steps", type=int, help="instead of the configurations' own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder that keeps patches and runs; none by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(arguments.keep or temporary)
        counts = write_patches(root / "photos")
        results = {
            "torch": torch.__version__,
            "scikit_image": skimage.__version__,
            "machine": platform.machine(),
            "num_threads": torch.get_num_threads(),
            "seed": arguments.seed,
            "num_patches": counts,
            "runs": {},
        }
        for name, config_name in CONFIGS.items():
            results["runs"][name] = run_training(config_name, root / "photos", root / name, arguments)
            print(name, {key: value for key, value in results["runs"][name].items() if key != "curve"}, flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
