"""What a GPU reaches: sampling VAR d16 beside the published loop, training steps of both stages, nearest-code search.

    python benchmarks/gpu.py                                                # everything; writes benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --depth 1 --image_size 16 --num_runs 1 --batch_sizes 1 --output /tmp/gpu.json

Weights and tokens are random: time does not depend on them. Operations are torch's count of a step's products and
convolutions; the peak is that of a large matrix product in the same type, measured in the same run. Sampling is a call
of the pipeline where diffusers is installed, else generation and decoding, and the result says which.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from published_loops import OPTIONS, build_models, var_loop
from torch.utils.flop_counter import FlopCounterMode

from nextblock.prior.building import build_prior
from nextblock.prior.families import BlockPriorOptions
from nextblock.prior.family import compile_step
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.training_data import PriorData
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.adversarial import DiscriminatorConfig
from nextblock.tokenizer.code_search import nearest_codes
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, VQVAEOptions, build_tokenizer
from nextblock.training.accelerator import build_accelerator
from nextblock.training.loop_config import LoopConfig
from nextblock.training.precision import set_tf32

NUM_CLASSES = 1000
SCALES = {256: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 16: [1]}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], num_runs: int, num_warmups: int = 2) -> float:
    """Return the median seconds of a call, after some that do not count."""
    times = []
    for number in range(num_warmups + num_runs):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        if number >= num_warmups:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_operations(device: str, size: int) -> dict[str, float]:
    """Return the operations a second of a large product, in bf16, float32 and, on CUDA, TF32."""
    peaks = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("tf32", torch.float32)):
        if name == "tf32" and device == "cpu":
            continue
        set_tf32(name == "tf32")
        a = torch.randn(size, size, device=device).to(dtype)
        peaks[name] = 2 * size**3 / seconds_of(lambda a=a: torch.mm(a, a), 10)
    set_tf32(False)
    return peaks


def sampling_call(prior, tokenizer) -> tuple[str, Callable[[torch.Tensor], object], Callable[[], object]]:
    """Return how images are sampled, a function that does it, and one that compiles it."""
    try:
        from nextblock.pipelines import ClassToImagePipeline
    except ModuleNotFoundError:
        options = asdict(OPTIONS["var"])

        def sample(class_labels):
            idx_Bl = prior.generate(class_labels, tokenizer.quantizer, **options)
            return ((tokenizer.idxBl_to_img(idx_Bl) + 1) / 2).cpu()

        def compile_all():
            compile_step(prior, captures_graphs=True)
            tokenizer.decoder.compile()

        return "generate and decode", sample, compile_all
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=OPTIONS["var"])
    pipe.set_progress_bar_config(disable=True)
    return "pipe(...)", lambda labels: pipe(labels.tolist(), output_type="pt"), pipe.compile


def measure_sampling(arguments: argparse.Namespace) -> list[dict]:
    """Time the published loop, the library and the compiled library in bf16, in turn at each batch size."""
    device, rows = arguments.device, []
    depth = arguments.depth
    models = build_models("var", hidden_size=64 * depth, num_layers=depth, num_heads=depth)
    prior, tokenizer = (model.to(device, torch.bfloat16) for model in models)
    call, sample, compile_all = sampling_call(prior, tokenizer)

    def published(class_labels):
        with torch.autocast(device, torch.bfloat16):
            return var_loop(prior, tokenizer, class_labels, OPTIONS["var"]).float().cpu()

    loops = {"published": published, "nextblock": sample}
    for is_compiled in (False, True):
        if is_compiled:
            start = time.perf_counter()
            compile_all()
            sample(torch.arange(arguments.batch_sizes[0], device=device))
            first_seconds = time.perf_counter() - start
            loops = {"nextblock, compiled": sample}
        for batch_size in arguments.batch_sizes:
            labels = torch.arange(batch_size, device=device)
            for name, function in loops.items():
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = seconds_of(lambda f=function, x=labels: f(x), arguments.num_runs)
                row = {"loop": name, "call": "a loop" if name == "published" else call, "batch_size": batch_size}
                row |= {"ms_an_image": 1000 * seconds / batch_size, "images_a_second": batch_size / seconds}
                if is_compiled:
                    row["seconds_to_compile"] = first_seconds
                if device == "cuda":
                    row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                rows.append(row)
                print(row, flush=True)
        if not arguments.compiles:
            break
    return rows


def run_config(folder: str, precision: str, device: str) -> LoopConfig:
    """Return the loop of a training that nobody logs."""
    return LoopConfig(num_steps=1000, mixed_precision=precision, tracker=None, cpu=device == "cpu")


def measure_steps(task, batch: dict[str, torch.Tensor], arguments: argparse.Namespace, peak: float) -> dict:
    """Time whole steps of a task, and compare the operations of one with the peak."""
    step = iter(range(1000))
    task.train_step([batch], next(step))
    with FlopCounterMode(display=False) as counter:
        task.train_step([batch], next(step))
    seconds = seconds_of(lambda: task.train_step([batch], next(step)), arguments.num_runs)
    operations = counter.get_total_flops()
    figures = {"ms_a_step": 1000 * seconds, "operations_a_step": operations}
    return figures | {"share_of_peak": operations / seconds / peak}


def tokenizer_options(image_size: int) -> dict:
    """Return the sizes of the published tokenizer at a resolution."""
    options = {"image_size": image_size, "autoencoder": "vqgan", "vocab_size": 4096, "embedding_dim": 32}
    options |= {"hidden_dim": 160 if image_size == 256 else 32, "num_res_blocks": 2, "quant_conv_kernel_size": 3}
    return options | {"layout": "scales", "scales": SCALES[image_size]}


def measure_prior_step(arguments: argparse.Namespace, peak: float) -> dict:
    """Time a training step of the prior in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        loop = run_config(folder, "bf16", arguments.device)
        D = 64 * arguments.depth
        model = {"hidden_size": D, "num_layers": arguments.depth, "num_heads": arguments.depth}
        config = PriorTrainConfig(
            tokens="",
            tokenizer="",
            output_dir=folder,
            pipeline_dir="",
            model=BlockPriorOptions(**model, use_normalized_attention=True),
            loop=loop,
        )
        accelerator = build_accelerator(loop, Path(folder))
        tokenizer = VQVAE(VQVAEConfig(**tokenizer_options(arguments.image_size))).eval().requires_grad_(False)
        names = [str(n) for n in range(NUM_CLASSES)]
        data = PriorData(train=range(1), heldout=None, collate=None, class_names=names)
        task = PriorTask(accelerator, config, build_prior(config, tokenizer, names), tokenizer, data, export=None)
        B, device = arguments.train_batch_size, arguments.device
        index = torch.arange(B, device=device)
        labels = torch.randint(4096, (B, tokenizer.layout.num_tokens), device=device)
        batch = {"labels": labels, "class_labels": index % NUM_CLASSES, "index": index}
        return {"stage": f"prior d{arguments.depth}", "batch_size": B} | measure_steps(task, batch, arguments, peak)


def measure_tokenizer_step(arguments: argparse.Namespace, peak: float) -> dict:
    """Time a training step of the tokenizer with its discriminator in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        loop = run_config(folder, "bf16", arguments.device)
        num_layers = 3 if arguments.image_size >= 64 else 1
        config = TokenizerTrainConfig(
            output_dir=folder,
            model=VQVAEOptions(**tokenizer_options(arguments.image_size), codebook_update="ema"),
            discriminator=DiscriminatorConfig(weight=0.5, num_layers=num_layers),
            loop=loop,
        )
        accelerator = build_accelerator(loop, Path(folder))
        task = TokenizerTask(accelerator, config, build_tokenizer(config), range(1), None)
        B, side = arguments.tokenizer_batch_size, arguments.image_size
        pixel_values = torch.rand(B, 3, side, side, device=arguments.device) * 2 - 1
        figures = measure_steps(task, {"pixel_values": pixel_values}, arguments, peak)
        return {"stage": f"tokenizer {side} px with discriminator", "batch_size": B} | figures


def measure_search(arguments: argparse.Namespace) -> list[dict]:
    """Time the search among 16 384 codes beside the bare product of features and codes."""
    rows = []
    N, V = (1 << 18, 1 << 14) if arguments.device == "cuda" else (1 << 10, 1 << 10)
    for C in (8, 32):
        features, codes = (torch.randn(n, C, device=arguments.device) for n in (N, V))
        codes_t, chunk = codes.t().contiguous(), features[: N // 64]
        seconds = seconds_of(lambda f=features, c=codes: nearest_codes(f, c), arguments.num_runs)
        bare = 64 * seconds_of(lambda f=chunk, c=codes_t: f @ c, arguments.num_runs)
        row = {"num_vectors": N, "num_codes": V, "num_channels": C, "seconds": seconds, "bare_product_seconds": bare}
        rows.append(row | {"vectors_a_second": N / seconds, "times_bare_product": seconds / bare})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure all, or what was asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sampling", "training", "search")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries this script out")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--image_size", type=int, choices=list(SCALES), default=256, help="of the trainings")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64], help="of sampling")
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--tokenizer_batch_size", type=int, default=16)
    parser.add_argument("--num_runs", type=int, default=10)
    parser.add_argument("--compiles", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", default="benchmarks/gpu.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA GPU here, so nothing was measured")
        return
    is_cuda = arguments.device == "cuda"
    peaks = peak_operations(arguments.device, 8192 if is_cuda else 256)
    results = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "peak_operations_a_second": peaks,
    }
    with torch.random.fork_rng(devices=()):
        if "search" in arguments.only:
            results["search"] = measure_search(arguments)
        if "training" in arguments.only:
            results["training"] = []
            for measure in (measure_prior_step, measure_tokenizer_step):
                results["training"].append(measure(arguments, peaks["bfloat16"]))
                print(results["training"][-1], flush=True)
        if "sampling" in arguments.only:
            results["sampling"] = measure_sampling(arguments)
    Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
