"""Rows a second of shuffled batches from a folder of tokens, in memory and mapped, beside `datasets` itself.

    python benchmarks/reading.py
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.data.token_shards import write_shard
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.files.atomic import file_sha256

LAYOUTS = {
    256: BlockLayout.from_dict({"kind": "tiles", "tile": [4, 4], "grid": [16, 16]}),
    680: BlockLayout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
}


def write_folder(folder: Path, layout: BlockLayout, num_rows: int, rows_per_shard: int) -> None:
    """Write a folder of random tokens."""
    (folder / "data").mkdir()
    rng, shards = np.random.default_rng(0), []
    for start in range(0, num_rows, rows_per_shard):
        rows = np.arange(start, min(start + rows_per_shard, num_rows))
        file = f"data/train-{len(shards):05d}.parquet"
        idx = rng.integers(0, 4096, (len(rows), layout.num_tokens))
        write_shard(folder / file, idx, rows % 10, [str(row) for row in rows], 0 * rows, list("abcdefghij"), 4096)
        shards.append({"file": file, "num_rows": len(rows), "sha256": file_sha256(folder / file)})
    fields = {"layout": layout.to_dict(), "vocab_size": 4096, "embedding_dim": 32, "tokenizer_sha256": ""}
    fields |= {"image_size": [256, 256], "class_names": list("abcdefghij"), "data": {}, "transform": {}, "seed": 0}
    splits = {"train": {"num_images": num_rows, "num_views": 1, "shards": shards}}
    TokenManifest(**fields, num_augmented_views=0, splits=splits).save(folder)


def rows_per_second(read, num_rows: int, batch_size: int, num_batches: int) -> float:
    """Read shuffled batches and return rows a second, the best of three rounds."""
    order = np.random.default_rng(1).permutation(num_rows)[: num_batches * batch_size].reshape(-1, batch_size).tolist()
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for rows in order:
            read(rows)
        best = max(best, len(order) * batch_size / (time.perf_counter() - started))
    return best


def measure(num_tokens: int, num_rows: int, rows_per_shard: int, batch_size: int) -> dict:
    """Time every way of reading rows of one length."""
    with tempfile.TemporaryDirectory() as name:
        folder, datasets.config.HF_DATASETS_CACHE = Path(name), str(Path(name) / "cache")
        write_folder(folder, LAYOUTS[num_tokens], num_rows, rows_per_shard)
        in_memory = TokenDataset(folder, "train", max_memory=1 << 40).__getitems__
        mapped = TokenDataset(folder, "train", max_memory=0).__getitems__
        files = str(folder / "data" / "*.parquet")
        plain = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=name)
        plain = plain.select_columns(["idx", "label"]).with_format("torch")

        def naive(rows):
            batch = plain[rows]
            return torch.stack(list(batch["idx"])).long(), batch["label"]

        assert torch.equal(naive([5, 3])[0], mapped([5, 3])["labels"])
        forms = {"mapped": (mapped, 1000), "in_memory": (in_memory, 1000), "datasets_torch_format": (naive, 100)}
        speeds = {
            form: round(rows_per_second(read, num_rows, batch_size, min(batches, num_rows // batch_size)))
            for form, (read, batches) in forms.items()
        }
    return {"num_tokens": num_tokens, "num_rows": num_rows, "batch_size": batch_size, "rows_per_second": speeds}


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=100_000)
    parser.add_argument("--rows_per_shard", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", default="benchmarks/reading.json")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    results = {
        "datasets": datasets.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "rows": [],
    }
    for num_tokens in LAYOUTS:
        row = measure(num_tokens, arguments.num_rows, arguments.rows_per_shard, arguments.batch_size)
        results["rows"].append(row)
        print(row, flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
