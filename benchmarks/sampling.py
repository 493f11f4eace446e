"""Time and memory of guided sampling by the pipeline's call beside the published loops, with the same weights.

VAR's d16 at 256 px; a raster of LlamaGen-B's shape (width 768, 12 layers, 16384 codes, 256 tokens) with the layers of
VAR; LlamaGen-B; and RAR-B (width 768, 24 layers, 1024 codes, 256 tokens). The loops run in processes of their own and
take turns, so that a drifting machine drifts for all:

- "published": VAR's, LlamaGen's or RAR's own loop, see published_loops.py; bfloat16 is autocast.
- "pipe": `pipe(…)`; "pipe, freed memory kept": as `nextblock sample` sets a CPU up; "pipe, compiled".

Weights are random: time does not depend on them. A part's results are put among those that are there:

    python benchmarks/sampling.py
    python benchmarks/sampling.py --only llamagen rar --images 1 8 --dtypes float32
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from contextlib import nullcontext

import published_loops
import torch
from published_loops import OPTIONS, build_models

from nextblock.cpu import keep_freed_memory
from nextblock.pipelines import ClassToImagePipeline

LOOPS = ("published", "pipe", "pipe, freed memory kept", "pipe, compiled")
MODELS = tuple(published_loops.LOOPS)


def build_pipeline(model: str) -> ClassToImagePipeline:
    """Return a pipeline with random weights."""
    prior, tokenizer = build_models(model)
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=OPTIONS[model])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampler(model: str, loop: str, dtype: torch.dtype, device: str):
    """Return a function of the number of images that samples them."""
    pipe = build_pipeline(model).to(device)
    if loop == "published":
        published_loop = published_loops.LOOPS[model]
        cast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

        def published(num_images: int):
            with cast:
                labels = torch.arange(num_images, device=device)
                return published_loop(pipe.prior, pipe.tokenizer, labels, OPTIONS[model])

        return published
    pipe.to(dtype)
    if loop == "pipe, freed memory kept":
        assert keep_freed_memory()
    if loop == "pipe, compiled":
        pipe.compile()
    return lambda num_images: pipe(list(range(num_images)), output_type="pt")


def serve(connection, model: str, loop: str, dtype_name: str, device: str) -> None:
    """Run one loop in a process of its own, whose memory is then that loop's; answer requests with seconds."""
    sample = sampler(model, loop, getattr(torch, dtype_name), device)
    while (num_images := connection.recv()) is not None:
        start = time.perf_counter()
        sample(num_images)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        connection.send((seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak))


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Return the operations a second of a large matrix product."""
    a, fastest = torch.randn(2048, 2048, device=device).to(dtype), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 2048**3 / fastest


def compare(arguments: argparse.Namespace, model: str, dtype_name: str, num_images: int) -> dict:
    """Let the loops take turns; return a row of results."""
    context, ends, processes = multiprocessing.get_context("spawn"), {}, []
    for loop in arguments.loops:
        ends[loop], other = context.Pipe()
        options = (other, model, loop, dtype_name, arguments.device)
        processes.append(context.Process(target=serve, args=options, daemon=True))
        processes[-1].start()
    answers = {loop: [] for loop in ends}
    for _ in range(arguments.num_runs + 1):
        for loop, end in ends.items():
            end.send(num_images)
            answers[loop].append(end.recv())
    for end, process in zip(ends.values(), processes, strict=True):
        end.send(None)
        process.join()
    row = {"model": model, "dtype": dtype_name, "num_images": num_images, "loops": {}}
    for loop, ((first, _), *later) in answers.items():
        seconds = [answer[0] for answer in later]
        row["loops"][loop] = {
            "first_call_seconds": round(first, 3),
            "seconds": round(statistics.median(seconds), 3),
            "fastest_seconds": round(min(seconds), 3),
            "peak_memory_gib": round(later[-1][1], 2),
        }
    reference = row["loops"][arguments.loops[0]]
    for figures in row["loops"].values():
        figures["speedup"] = round(reference["seconds"] / figures["seconds"], 2)
        figures["speedup_of_fastest"] = round(reference["fastest_seconds"] / figures["fastest_seconds"], 2)
    return row


def main() -> None:
    """Run the comparison and write it down, part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS[:3])
    parser.add_argument("--num_runs", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/sampling.json")
    arguments = parser.parse_args()
    results = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
    }
    peaks = {name: round(matmul_peak(getattr(torch, name), arguments.device) / 1e9) for name in arguments.dtypes}
    rows = []
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            earlier = json.load(file)
        if any(earlier.get(name) != value for name, value in results.items()):
            raise ValueError(f"output is {arguments.output}, of another machine or version; expected a new file")
        rows = earlier["rows"]
    names = ("model", "dtype", "num_images")
    for part in ((m, d, n) for m in arguments.only for d in arguments.dtypes for n in arguments.images):
        row = compare(arguments, *part) | {"matmul_gflops_a_second": peaks[part[1]]}
        print(json.dumps(row), flush=True)
        rows = [other for other in rows if tuple(other[name] for name in names) != part] + [row]
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(results | {"rows": rows}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
