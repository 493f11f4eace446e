"""Draws images of many classes from a pipeline, on one process or several, into one file and one picture.

    python -m nextblock.pipelines.sample --config pipelines/sample-digits-scales
    accelerate launch -m nextblock.pipelines.sample --config pipelines/sample-digits-scales

Legend: N images, HxW pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextblock.training.config import parse_run_config, save_run_config
from nextblock.training.processes import connect_processes

_SAMPLES_NAME = "images.npz"
_PICTURE_NAME = "samples.png"
_PICTURE_COLUMNS = 10


@dataclass(kw_only=True)
class SampleConfig:
    """Draws images from a pipeline and writes images.npz, samples.png and the config used.

    images.npz holds `images`, (N, H, W, 3) uint8, and `class_labels`, (N,) int64, class after class. Each
    image depends on the seed, its class and its position alone, whatever the number of processes.
    """

    pipeline: str
    """Folder of the pipeline."""
    output_dir: str
    """Folder that the images go to."""
    class_labels: list[int | str] | None = None
    """Classes to draw, by number or by name; null draws every class, or an unconditional model's images."""
    num_images_per_label: int = 10
    """Images of each class."""
    guidance_scale: float = 1.25
    """Strength of classifier-free guidance; 1 is none."""
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = "constant"
    """Whether guidance is the same for all blocks or grows from none at the first to full at the last."""
    guidance_power: float = 1.0
    """Power of the schedule "power-cosine"; the larger, the later guidance sets in."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharpens the distribution of tokens."""
    top_k: int = 0
    """Draw each token among the k likeliest codes; 0 among all."""
    top_p: float = 1.0
    """Draw each token among the likeliest codes that hold this share of the probability; 1 among all."""
    min_p: float = 0.0
    """Draw each token among the codes at least this many times as likely as the likeliest; 0 among all."""
    seed: int = 0
    """Key of all random numbers."""
    batch_size: int = 100
    """Images drawn at a time by each process."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantizer stays in float32."""
    cpu: bool = False
    """Draw on the CPU even where there is a GPU."""

    def __post_init__(self):
        for name in ("num_images_per_label", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")
        if self.class_labels is not None and not self.class_labels:
            raise ValueError("class_labels is []; expected at least one class, or null for all")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected a non-negative integer")


def image_seed(seed: int, index: int) -> int:
    """Return the 63-bit seed of one image's generator, a hash of the run's seed and the image's position.

    Args:
        seed: the run's seed.
        index: position of the image among all that the run draws.

    Returns:
        An integer in [0, 2^63).
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the images that the command line asks for."""
    config = parse_run_config(SampleConfig, prog="python -m nextblock.pipelines.sample", argv=argv)
    import numpy as np
    import torch

    from nextblock.pipelines import ClassToImagePipeline

    state = connect_processes(config.cpu)
    pipe = ClassToImagePipeline.from_pretrained(config.pipeline)
    pipe = pipe.to(state.device, getattr(torch, config.dtype))
    pipe.set_progress_bar_config(disable=True)
    wanted = config.class_labels
    if wanted is None and pipe.prior.config.num_classes:
        wanted = list(range(pipe.prior.config.num_classes))
    class_labels = np.repeat(np.asarray(pipe.resolve_labels(wanted)), config.num_images_per_label)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # A run that fails must not leave the images of an earlier one behind as if they were its own.
    if state.is_main_process:
        (output_dir / _SAMPLES_NAME).unlink(missing_ok=True)
        save_run_config(config, output_dir / "config.yaml")
    _draw_part(pipe, class_labels, config, state, _part_path(output_dir, state.process_index))
    state.wait_for_everyone()
    if state.is_main_process:
        _merge_parts(output_dir, class_labels, state.num_processes)
        processes = f"{state.num_processes} process" + "es" * (state.num_processes > 1)
        print(f"{len(class_labels)} images drawn by {processes}: {output_dir / _SAMPLES_NAME}")


def _draw_part(pipe, class_labels, config: SampleConfig, state, path: Path) -> None:
    """Draw this process's batches and write them with their positions."""
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    # Whole batches are dealt out: a batch is of one shape, and rounds alike, for any number of processes.
    starts = range(0, len(class_labels), config.batch_size)[
        state.process_index :: state.num_processes
    ]
    is_conditional = pipe.prior.config.num_classes > 0
    indices, images = [], []
    for start in tqdm(starts, desc="sampling", unit="batch", disable=not state.is_main_process):
        batch = range(start, min(start + config.batch_size, len(class_labels)))
        labels = class_labels[batch.start : batch.stop].tolist()
        drawn = pipe(
            class_labels=labels if is_conditional else None,
            num_images_per_label=1 if is_conditional else len(labels),
            guidance_scale=config.guidance_scale,
            guidance_schedule=config.guidance_schedule,
            guidance_power=config.guidance_power,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            generator=[torch.Generator().manual_seed(image_seed(config.seed, index)) for index in batch],
            batch_size=config.batch_size,
            output_type="np",
        ).images
        indices.append(np.arange(batch.start, batch.stop))
        images.append(np.round(np.asarray(drawn) * 255).astype(np.uint8))
    height, width = pipe.tokenizer.config.image_size
    np.savez(
        path,
        indices=np.concatenate([np.zeros(0, dtype=np.int64), *indices]),
        images=np.concatenate([np.zeros((0, height, width, 3), dtype=np.uint8), *images]),
    )


def _merge_parts(output_dir: Path, class_labels, num_processes: int) -> None:
    """Join what the processes wrote and draw the picture."""
    import numpy as np

    from nextblock.evaluation.pictures import class_grid

    paths = [_part_path(output_dir, process_index) for process_index in range(num_processes)]
    parts = [np.load(path) for path in paths]
    order = np.argsort(np.concatenate([part["indices"] for part in parts]))
    images = np.concatenate([part["images"] for part in parts])[order]
    assert len(images) == len(class_labels), "every image is drawn once"
    temporary = output_dir / f"unfinished-{_SAMPLES_NAME}"
    np.savez(temporary, images=images, class_labels=class_labels)
    os.replace(temporary, output_dir / _SAMPLES_NAME)
    class_grid(images, class_labels, num_columns=_PICTURE_COLUMNS).save(output_dir / _PICTURE_NAME)
    for part, path in zip(parts, paths, strict=True):
        part.close()
        path.unlink()


def _part_path(output_dir: Path, process_index: int) -> Path:
    """Where a process leaves its images for the first one."""
    return output_dir / f"part-{process_index:05d}.npz"


if __name__ == "__main__":
    main()
