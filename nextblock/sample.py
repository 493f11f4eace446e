"""Draw many images from a pipeline; a killed job goes on where it was when it is started again.

    nextblock sample --config pipelines/sample-digits-scales --pipeline DIR …
    accelerate launch -m nextblock sample --config pipelines/sample-digits-scales --pipeline DIR …

Legend: N images, n of a batch, HxW pixels.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState

from nextblock.evaluation.pictures import class_grid, save_picture
from nextblock.evaluation.sample_order import IN_TURN, turn_order
from nextblock.files.claim import claimed
from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.part_jobs import JOB_NAME, begin_job
from nextblock.files.regular import read_json
from nextblock.pipelines.sample_files import LOSSY_FORMATS, NpzFile, PictureFolder
from nextblock.pipelines.sampling_loop import run
from nextblock.pipelines.token_pipeline import TokenPipeline
from nextblock.prior.orders import RASTER
from nextblock.prior.sampling import GivenSamplingOptions, SamplingOptions
from nextblock.training.processes import connect_processes
from nextblock.training.run_config import save_run_config

from .command_line import parse_run_config
from .cpu import MAX_THREADS, fixed_threads, keep_freed_memory
from .inputs import load_given_pipeline
from .progress import Progress
from .sample_conditions import DrawnClasses, DrawnPrompts, drawn_of, write_prompts
from .stoppable import Job, stoppable_job

_PICTURE_NAME = "samples.png"
_PICTURE_COLUMNS, _PICTURE_ROWS = 10, 10
_NUM_WRITERS = 4
Drawn = DrawnClasses | DrawnPrompts
# Their classes alone take gigabytes beyond; a mistyped number must not begin to.
_MAX_IMAGES = 10**8


@dataclass(kw_only=True)
class SampleConfig:
    """Draws images from a pipeline and writes them, a grid of the first ones and the config used.

    Images are numbered class by class. Each depends on the seed, its class and its number alone, whatever the number of
    processes. A job that was killed goes on when it is started again.
    """

    pipeline: str
    """Folder of the pipeline."""
    requires_own_tokenizer: bool = False
    """Refuse a pipeline whose tokenizer is not the one whose tokens its prior has learned, instead of warning."""
    output_dir: str
    """Folder that the images go to; an unfinished one is finished, one of another job refused."""
    output_format: Literal["npz", "png", "jpeg", "webp"] = "npz"
    """"npz" writes images.npz as ADM's evaluator reads it: `arr_0`, (N, H, W, 3) uint8, and `arr_1`, (N,) int64, the
    classes; classes take turns there, in an order keyed by the seed, and `index`, (N,) int64, says which image is
    where. The others write images/CLASS/NUMBER.png and so on."""
    image_quality: int = 95
    """Quality of JPEG and WebP, 1 to 100."""
    class_labels: list[int | str] | int | str | None = None
    """Class or classes to draw, by number or by name; null draws every class, or an unconditional model's images."""
    prompts: str | None = None
    """File with a prompt a line, for a pipeline of texts; the number of a prompt, from 0, stands for a class."""
    negative_prompt: str | None = None
    """What guidance leads away from, of a pipeline of texts; null leads away from no text."""
    num_images_per_label: int = 10
    """Images of each class or prompt."""
    sampling: GivenSamplingOptions = field(default_factory=GivenSamplingOptions)
    """How tokens are drawn; null takes what the pipeline was saved with."""
    seed: int = 0
    """Key of all random numbers."""
    batch_size: int = 100
    """Images drawn at a time by each process; part of the job, because rounding depends on it."""
    num_threads: int = 1
    """CPU threads that each process computes with; part of the job, because rounding depends on it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the models; the quantizer stays in float32."""
    cpu: bool = False
    """Draw on the CPU even where there is a GPU."""

    def __post_init__(self):
        for name in ("num_images_per_label", "batch_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")
        if self.num_threads > MAX_THREADS:
            raise ValueError(f"num_threads is {self.num_threads}; expected at most {MAX_THREADS}")
        if isinstance(self.class_labels, int | str):
            self.class_labels = [self.class_labels]
        if self.class_labels is not None and not self.class_labels:
            raise ValueError("class_labels is []; expected at least one class, or null for all")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected a non-negative integer")
        if not 1 <= self.image_quality <= 100:
            raise ValueError(f"image_quality is {self.image_quality}; expected 1 to 100")


def image_seed(seed: int, index: int) -> int:
    """Return the 63-bit seed of one image's generator, a hash of the run's seed and the image's number.

    Args:
        seed: the run's seed.
        index: number of the image among all that the run draws, class by class.

    Returns:
        An integer in [0, 2^63).
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample(config: SampleConfig) -> bool:
    """Draw images, each process its own batches, and put them together once all are there.

    Batches that are there already stay, whatever number of processes drew them; the result is the same to the byte.
    SIGTERM or SIGINT at any process stops all of them at once.

    Args:
        config: the job.

    Returns:
        Whether the job was not stopped.

    Raises:
        ValueError: if the output folder holds another job, the configuration does not fit the pipeline, or the folder
            does not hold exactly the images of the job at the end.
    """
    state = connect_processes(config.cpu)
    with stoppable_job(state) as stoppable, claimed(Path(config.output_dir), state):
        _sample(config, state, stoppable)
        return True
    return False


def _sample(config: SampleConfig, state: PartialState, stoppable: Job) -> None:
    """Do the job."""
    folder = Path(config.output_dir)
    options = {"requires_own_tokenizer": config.requires_own_tokenizer}
    pipe = load_given_pipeline("pipeline", config.pipeline, **options)
    pipe.set_progress_bar_config(disable=True)
    sampling = pipe.sampling.changed(**asdict(config.sampling))
    sampling.check_for(pipe.prior)
    drawn = drawn_of(pipe, config.class_labels, config.prompts, config.negative_prompt, sampling)
    labels = _check_number(drawn.labels, config.num_images_per_label)
    # What is written down beside the images says how they were drawn, whoever chose it.
    config = replace(config, sampling=GivenSamplingOptions(**asdict(sampling)))
    job, index = _describe(config, pipe, drawn, state), None
    N = len(labels) * config.num_images_per_label
    if _is_sorted_by_class(folder):
        job.pop("class_order")
    else:
        index = turn_order(config.seed, len(labels), config.num_images_per_label)
    numbers = np.arange(N) if index is None else index
    class_labels = np.asarray(labels, np.int64)[numbers // config.num_images_per_label]
    files = _open_files(config, pipe, drawn, class_labels, index)
    batches = [range(start, min(start + config.batch_size, N)) for start in range(0, N, config.batch_size)]
    begin_job(folder, job, state)
    for problem in files.remove_damaged(batches[state.process_index :: state.num_processes]):
        print(f"{problem}: drawn again")
    # Nobody looks before what is damaged is gone.
    state.wait_for_everyone()
    stoppable.done = lambda: f"{sum(len(b) for b in batches if files.has(b))} of {N} images are in {folder}"
    missing = [batch for batch in batches if not files.has(batch)]
    is_finished = not missing and (folder / _PICTURE_NAME).is_file()
    # Nobody writes before everybody has looked.
    state.wait_for_everyone()
    if not is_finished:
        if state.is_main_process:
            save_run_config(config, folder / "config.yaml")
            write_prompts(drawn, folder)
        if state.device.type == "cpu":
            keep_freed_memory()
        pipe.to(state.device, getattr(torch, config.dtype))
        with fixed_threads(config.num_threads):
            draw = partial(_draw, pipe, config, sampling, drawn, class_labels, numbers)
            _draw_missing(draw, missing, N, files, state)
    if state.is_main_process:
        if not is_finished:
            files.assemble(batches)
        files.check()
        if not is_finished:
            _draw_picture(folder / _PICTURE_NAME, files, class_labels, np.argsort(numbers))
        processes = f"{state.num_processes} process" + "es" * (state.num_processes > 1)
        drawn = f"{sum(map(len, missing))} of them drawn now by {processes}"
        print(f"{files.path}: {N} images, {'all there already' if is_finished else drawn}")


def _check_number(labels: list[int], num_images_per_label: int) -> list[int]:
    """Return the labels, of which no more images are wanted than any job draws."""
    if len(labels) * num_images_per_label > _MAX_IMAGES:
        raise ValueError(
            f"num_images_per_label is {num_images_per_label}, of {len(labels)} labels; expected at most "
            f"{_MAX_IMAGES} images in all"
        )
    return labels


def _describe(config: SampleConfig, pipe: TokenPipeline, drawn: Drawn, state: PartialState) -> dict:
    """All that the bytes of the images depend on."""
    fields = ("num_images_per_label", "seed", "batch_size", "num_threads", "dtype", "output_format")
    return {
        "tokenizer_sha256": model_fingerprint(pipe.tokenizer),
        "prior_sha256": model_fingerprint(pipe.prior),
        **{name: getattr(config, name) for name in fields},
        # Jobs begun before there were orders do not name theirs.
        **{name: value for name, value in asdict(config.sampling).items() if (name, value) != ("order", RASTER)},
        "image_quality": config.image_quality if config.output_format in LOSSY_FORMATS else None,
        "device": state.device.type,
        **drawn.described(),
        "class_order": IN_TURN,
    }


def _is_sorted_by_class(folder: Path) -> bool:
    """Tell whether a job was begun here by an earlier version, which wrote images class by class and said nothing."""
    try:
        found = read_json(folder / JOB_NAME) if (folder / JOB_NAME).is_file() else None
    except ValueError:  # It is damaged, which is said when the job begins.
        return False
    return isinstance(found, dict) and "class_order" not in found


def _open_files(
    config: SampleConfig, pipe: TokenPipeline, drawn: Drawn, class_labels: np.ndarray, index: np.ndarray | None
) -> NpzFile | PictureFolder:
    """Return what the images are written to."""
    folder = Path(config.output_dir)
    if config.output_format == "npz":
        return NpzFile(folder, class_labels, pipe.tokenizer.config.image_size, index)
    return PictureFolder(folder, class_labels, *drawn.folders, config.output_format, config.image_quality, index)


def _draw_missing(
    draw: Callable[[range], np.ndarray],
    missing: list[range],
    num_images: int,
    files: NpzFile | PictureFolder,
    state: PartialState,
) -> None:
    """Draw this process's share of the missing batches; the main process then waits for the others'."""
    progress = Progress(state, "sample", num_images, num_images - sum(map(len, missing)))
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(_NUM_WRITERS) as executor:
        # Whole batches are dealt out: a batch is of one shape, and rounds alike, for any number of processes.
        for batch in missing[state.process_index :: state.num_processes]:
            images = draw(batch)
            if len(writing) == _NUM_WRITERS:
                writing.popleft().result()
            writing.append(executor.submit(files.write, batch, images))
            progress.add(len(batch))
        while writing:
            writing.popleft().result()
    progress.finish_share()
    if state.is_main_process:
        awaited = [
            (batch, f"{files.path}: the batch from image {batch.start} on, of rank {number % state.num_processes},")
            for number, batch in enumerate(missing)
        ]
        progress.wait_for_files(lambda: next((text for batch, text in awaited if not files.has(batch)), None))
    progress.close()


def _draw(
    pipe: TokenPipeline,
    config: SampleConfig,
    sampling: SamplingOptions,
    drawn: Drawn,
    class_labels: np.ndarray,
    numbers: np.ndarray,
    batch: range,
) -> np.ndarray:
    """Draw one batch, (n, H, W, 3) uint8."""
    seeds = [image_seed(config.seed, number) for number in numbers[batch.start : batch.stop].tolist()]
    labels, generators = class_labels[batch.start : batch.stop], [torch.Generator().manual_seed(seed) for seed in seeds]
    request = drawn.request(labels, generators, sampling, config.batch_size)
    return np.stack([np.asarray(image) for image in run(pipe, request, "pil")])


def _draw_picture(path: Path, files: NpzFile | PictureFolder, class_labels: np.ndarray, places: np.ndarray) -> None:
    """Show the first images of the first classes; image i is at `places[i]`."""
    class_labels = class_labels[places]
    shown = list(dict.fromkeys(class_labels.tolist()))[:_PICTURE_ROWS]
    chosen = np.concatenate([np.flatnonzero(class_labels == label)[:_PICTURE_COLUMNS] for label in shown])
    grid = class_grid(files.read(places[chosen].tolist()), class_labels[chosen], num_columns=_PICTURE_COLUMNS)
    save_picture(grid, path)


def main(argv: Sequence[str]) -> None:
    """Draw the images that the command line asks for."""
    sample(parse_run_config(SampleConfig, command="sample", argv=argv))
