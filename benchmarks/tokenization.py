"""Images a second of a tokenization job, end to end and by part, beside the naive loop.

The job runs on several processes of one thread each; its speed is that between the first batch and the last shard, with
models and images loaded. The parts are CPU-seconds for one image in one process. The naive loop encodes one image at a
time and writes a file for each. Speed and parts are the best of three rounds. The job and its parts keep freed memory,
as jobs do; the naive loop gives it back, as the C library does by default.

    python benchmarks/tokenization.py --num_processes 2
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import datasets  # noqa: F401  the shard writer imports it, which the clock should not see
import numpy as np
import torch
from PIL import Image

from nextblock.command_line import parse_run_config
from nextblock.cpu import keep_freed_memory
from nextblock.data.augment import TransformConfig
from nextblock.data.image_folder import scan_image_folder
from nextblock.data.token_jobs import RowDataset, Shard
from nextblock.data.views import ViewSet
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.encoder import Encoder, write_rows, write_shards
from nextblock.tokenizer.task import TokenizerTrainConfig

VQGAN = {
    "image_size": 256,
    "autoencoder": "vqgan",
    "hidden_dim": 32,
    "num_res_blocks": 1,
    "vocab_size": 4096,
    "embedding_dim": 32,
    "layout": "scales",
    "scales": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
}
# Options or a shipped config, images, batch size, size of the JPEGs.
CASES = {"digits": ("tokenizer/digits-scales", 20000, 128, (40, 40)), "vqgan": (VQGAN, 64, 4, (400, 300))}


class NoProgress:
    """Counts nothing."""

    def add(self, num_rows: int) -> None:
        """Pass."""


def write_images(folder: Path, num_images: int, size: tuple[int, int]) -> None:
    """Write JPEGs of smooth noise."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def build(options: dict, images: Path, batch_size: int) -> tuple[RowDataset, Encoder]:
    """Return the data and a tokenizer with random weights."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(**options)).eval()
    views = ViewSet(TransformConfig())
    dataset = RowDataset(scan_image_folder(images, "train"), views, 1, model.config.image_size, 1, batch_size)
    return dataset, Encoder(model, False, False, False)


def apart(function: Callable, *arguments) -> dict | float:
    """Return what a function returns in a process of its own, which starts with fresh memory."""
    results = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(results[1], json.dumps(function(*arguments)).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads(os.read(results[0], 1 << 16))


def seconds_of_parts(dataset: RowDataset, encoder: Encoder, output: Path) -> dict[str, float]:
    """CPU-seconds an image of decoding, encoding, quantizing and writing, each over all images."""
    keep_freed_memory()
    (shard,) = Shard.plan("train", len(dataset), len(dataset))
    encoder(dataset.__getitems__(list(range(dataset.batch_size)))["pixels"])
    seconds, idx = dict.fromkeys(("decode", "encode", "quantize", "write"), 0.0), []
    for rows in shard.batches(dataset.batch_size):
        marks = [time.process_time()]
        batch = dataset.__getitems__(rows)
        marks.append(time.process_time())
        features = encoder.features(batch["pixels"])
        marks.append(time.process_time())
        idx.append(encoder.quantize(features)[: len(rows)])
        marks.append(time.process_time())
        for part, (start, end) in zip(("decode", "encode", "quantize"), pairwise(marks), strict=True):
            seconds[part] += end - start
    started = time.process_time()
    write_rows(output / "parts.parquet", np.arange(len(dataset)), np.concatenate(idx), [], dataset, encoder.model)
    seconds["write"] = time.process_time() - started
    return {part: value / len(dataset) for part, value in seconds.items()}


def job_speed(dataset: RowDataset, encoder: Encoder, output: Path, num_processes: int) -> float:
    """Images a second of processes that write a shard each, all ready before the clock starts."""
    shards = Shard.plan("train", len(dataset), -(-len(dataset) // num_processes))
    ready, go = os.pipe(), os.pipe()
    pids = []
    for shard in shards:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                keep_freed_memory()
                encoder(dataset.__getitems__(list(shard.rows[: dataset.batch_size]))["pixels"])
                os.write(ready[1], b"r")
                os.read(go[0], 1)
                write_shards(output, [shard], dataset, encoder, NoProgress(), num_workers=0, skips_errors=False)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in pids:
        os.read(ready[0], 1)
    started = time.perf_counter()
    os.write(go[1], b"g" * len(pids))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids), codes
    return len(dataset) / (time.perf_counter() - started)


@torch.no_grad()
def naive_speed(dataset: RowDataset, encoder: Encoder, output: Path, num_images: int) -> float:
    """Images a second, one at a time, one file an image."""
    started = time.perf_counter()
    for index in range(num_images):
        pixels = dataset.views.render(dataset.source.image(index), dataset.image_size, 0, index)
        idx = encoder(torch.from_numpy(pixels.copy())[None])
        np.save(output / f"{index}.npy", idx[0])
    return num_images / (time.perf_counter() - started)


def measure(name: str, num_processes: int) -> dict:
    """Run one case."""
    options, num_images, batch_size, size = CASES[name]
    if isinstance(options, str):
        parsed = parse_run_config(TokenizerTrainConfig, command="bench", argv=[f"--config={options}", "--output_dir=x"])
        options = {k: v for k, v in asdict(parsed.model).items() if v is not None}
    with tempfile.TemporaryDirectory() as folder:
        images, output = Path(folder, "images"), Path(folder, "output")
        images.mkdir()
        output.mkdir()
        write_images(images, num_images, size)
        dataset, encoder = build(options, images, batch_size)
        rounds = []
        for _ in range(3):
            speed = job_speed(dataset, encoder, output, num_processes)
            rounds.append((speed, apart(seconds_of_parts, dataset, encoder, output)))
        naive = apart(naive_speed, dataset, encoder, output, min(num_images, 200))
    speed = max(speed for speed, _ in rounds)
    parts = min((parts for _, parts in rounds), key=lambda seconds: sum(seconds.values()))
    ideal = num_processes / sum(parts.values())
    return {
        "tokenizer": name,
        "options": options,
        "num_images": num_images,
        "batch_size": batch_size,
        "cpu_milliseconds_per_image": {part: round(1000 * value, 3) for part, value in parts.items()},
        "images_per_second": round(speed, 2),
        "share_of_ideal": round(speed / ideal, 3),
        "naive_images_per_second_one_process": round(naive, 2),
    }


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--tokenizers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", default="benchmarks/tokenization.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "num_processes": arguments.num_processes,
        "num_threads": 1,
        "load_average_before": round(os.getloadavg()[0], 2),
        "rows": [],
    }
    for name in arguments.tokenizers:
        results["rows"].append(measure(name, arguments.num_processes))
        print(results["rows"][-1], flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
