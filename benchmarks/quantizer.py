"""Nearest-code search beside the one-hot form, torch.cdist and the bare matrix product, each in a process of its own.

    python benchmarks/quantizer.py --num_threads 1 2

Times are the least of several runs; those of the bare matrix product are the better of two chunk sizes. Peak
memory is what a process holds at most beyond what it held before.
The one-hot form of the original quantizer needs N·V floats three times over and runs on fewer vectors; its time and
memory are then scaled up, and the result says so.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial

import torch

from nextblock.tokenizer import code_search
from nextblock.tokenizer.code_search import nearest_codes

# Runs of each form: the first two are compared, so they had better be undisturbed.
FORMS = {"bare_matmul": 20, "nextblock": 30, "cdist": 3, "one_hot": 3}
TRIAL_VECTORS = 256


def one_hot(features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Quantize with a one-hot matrix, as the original class does."""
    distances = features.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * features @ codes.t()
    idx = distances.argmin(1, keepdim=True)
    encodings = torch.zeros(len(features), len(codes)).scatter_(1, idx, 1)
    encodings @ codes
    return idx[:, 0]


def cdist(features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Search with a library's distance matrix."""
    return torch.cdist(features, codes).argmin(1)


def bare_matmul(features: torch.Tensor, codes: torch.Tensor, chunk_bytes: int) -> None:
    """Multiply in chunks and do nothing with the products."""
    rows = max(1, chunk_bytes // (len(codes) * 4))
    products, codes_t = torch.empty(rows, len(codes)), codes.t().contiguous()
    for start in range(0, len(features), rows):
        chunk = features[start : start + rows]
        torch.mm(chunk, codes_t, out=products[: len(chunk)])


def measure(form: str, num_threads: int, num_vectors: int, num_codes: int, num_channels: int) -> dict:
    """Time one form in this process."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_vectors, num_channels, generator=generator)
    codes = torch.randn(num_codes, num_channels, generator=generator)
    functions = {"nextblock": [nearest_codes], "cdist": [cdist], "one_hot": [one_hot]}
    chunks = (code_search._CPU_CHUNK_BYTES, 4 * code_search._CPU_CHUNK_BYTES)
    functions["bare_matmul"] = [partial(bare_matmul, chunk_bytes=chunk_bytes) for chunk_bytes in chunks]
    for function in functions[form]:
        function(features[:TRIAL_VECTORS], codes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs = []
    for function in functions[form] * FORMS[form]:
        started, cpu_started = time.perf_counter(), time.process_time()
        idx = function(features, codes)
        runs.append((time.perf_counter() - started, time.process_time() - cpu_started))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    seconds, cpu_seconds = min(runs)
    result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak}
    if idx is not None:
        result |= exactness(features, codes, idx)
    return result


def exactness(features: torch.Tensor, codes: torch.Tensor, idx: torch.Tensor) -> dict:
    """Compare a part of the indices with a search in float64."""
    features, codes, idx = features[:2048].double(), codes.double(), idx[:2048]
    distances = torch.cdist(features, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    best = distances.min(1).values
    excess = distances.gather(1, idx[:, None])[:, 0] - best
    return {"checked": len(idx), "not_nearest": int((excess > 0).sum()), "largest_excess": excess.max().item()}


def measure_apart(*options: str | int) -> dict:
    """Time one form in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(options)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(num_threads: int, num_channels: int, arguments: argparse.Namespace) -> list[dict]:
    """Time all forms, the bare matrix product first."""
    rows = []
    for form in FORMS:
        num_vectors = min(arguments.num_vectors, arguments.one_hot_vectors if form == "one_hot" else sys.maxsize)
        scale = arguments.num_vectors / num_vectors
        measured = measure_apart(form, num_threads, num_vectors, arguments.num_codes, num_channels)
        measured |= {name: measured[name] * scale for name in ("seconds", "cpu_seconds", "peak_gb")}
        row = {"num_threads": num_threads, "num_channels": num_channels, "form": form, "measured_vectors": num_vectors}
        rows.append(row | {"is_extrapolated": scale > 1} | measured)
        rows[-1]["times_bare_matmul"] = measured["seconds"] / rows[0]["seconds"]
    return [{name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_vectors", type=int, default=65536)
    parser.add_argument("--num_codes", type=int, default=16384)
    parser.add_argument("--num_channels", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num_threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one_hot_vectors", type=int, default=8192, help="vectors that the one-hot form runs on")
    parser.add_argument("--output", default="benchmarks/quantizer.json")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    results = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "num_vectors": arguments.num_vectors,
        "num_codes": arguments.num_codes,
        "rows": [],
    }
    for num_threads in arguments.num_threads:
        for num_channels in arguments.num_channels:
            results["rows"] += compare(num_threads, num_channels, arguments)
            print(*results["rows"][-len(FORMS) :], sep="\n", flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
