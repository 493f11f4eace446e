"""Heads of a prior on the same tokens: one softmax against digits, on the handwritten digits of scikit-learn.

A small tokenizer of 8×8 binary FSQ codes (14 or 18 bits) is trained once; its tokens of augmented training images and
of the held-out ones are what every head learns from and is measured on. All held-out losses are negative logarithms of
probabilities that sum to one over all codes, in nats a token, so they can be compared. A row that the file of results
has is not measured again: a run that was stopped goes on.

    OMP_NUM_THREADS=1 python benchmarks/heads.py --num_steps 200
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SIDE, NUM_VIEWS, BATCH_SIZE = 32, 4, 32
SIZES = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "mlp_ratio": 2.0, "adaln_gamma_init": 0.5}
ROWS = {
    "masked_digits, 4 passes": {"head": "masked_digits", "head_passes": 4},
    "softmax": {},
    "digits": {"head": "digits"},
    "masked_digits, a pass a digit": {"head": "masked_digits"},
    "digits_in_turn, in pairs": {"head": "digits_in_turn"},
}
# The comparison that matters most first: rows come one by one.
CASES = [(bits, name) for name in ROWS for bits in (14, 18) if (bits, name) != (18, "softmax")]


def options(num_bits: int, name: str) -> dict:
    """Return a row's fields of the prior's configuration."""
    if name == "digits_in_turn, in pairs":
        return ROWS[name] | {"head_groups": [2] * (num_bits // 2)}
    return ROWS[name] | ({"head_passes": num_bits} if name == "masked_digits, a pass a digit" else {})


def datasets(views: int):
    """Return the training images in augmented views, and those held out, as pixels and labels."""
    import torch

    from nextblock.data.augment import TransformConfig
    from nextblock.data.images import ImageDataConfig, ImageDataset, collate, load_source

    varied = TransformConfig(max_shift=2.0, max_rotation=8.0, max_scale=0.06, max_shear=0.05)
    parts = {}
    for split, transform, epochs in (("train", varied, views), ("test", TransformConfig(), 1)):
        images = ImageDataset(load_source(ImageDataConfig(source="digits"), split), SIDE, transform, 0)
        batches = [
            collate(images.__getitems__([(epoch, index) for index in range(len(images))])) for epoch in range(epochs)
        ]
        parts[split] = tuple(torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "class_labels"))
    return parts


def make_tokens(num_bits: int, num_steps: int, folder: Path) -> None:
    """Train a tokenizer and keep it with its tokens."""
    import torch

    from nextblock.tokenizer import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    fsq = {"codebook": "fsq", "fsq_levels": [2] * num_bits, "vocab_size": 2**num_bits, "embedding_dim": num_bits}
    shape = {"image_size": SIDE, "autoencoder": "simple", "hidden_dim": 32, "num_res_blocks": 1, "layout": "tiles"}
    tokenizer = VQVAE(VQVAEConfig(tile=1, min_group_channels=2, **shape, **fsq))
    parts, generator = datasets(NUM_VIEWS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3, weight_decay=0.01)
    pixels = parts["train"][0]
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / num_steps)) / 2
        tokenizer(pixels[torch.randint(len(pixels), (64,), generator=generator)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.eval().save_pretrained(folder / "tokenizer")
    tokens = {}
    for split, (images, labels) in parts.items():
        tokens[split] = torch.cat([tokenizer.img_to_idx(part) for part in images.split(128)]), labels
    torch.save(tokens, folder / "tokens.pt")


def nats(model, tokenizer, tokens, labels) -> float:
    """Return the loss of tokens, in nats a token."""
    import torch

    losses = []
    with torch.no_grad():
        for idx, classes in zip(tokens.split(60), labels.split(60), strict=True):
            losses.append(model(tokenizer.idx_to_var_input(idx), classes, idx).token_loss.flatten())
    return torch.cat(losses).mean().item()


def train(model, tokenizer, tokens, num_steps: int) -> dict:
    """Train a prior and return what it took."""
    import torch

    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    idx, labels = tokens["train"]
    before, steps, best = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], math.inf
    for step in range(num_steps):
        rows, start = torch.randint(len(idx), (BATCH_SIZE,), generator=generator), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / num_steps)) / 2
        is_dropped = torch.rand(BATCH_SIZE, generator=generator) < 0.1
        classes = torch.where(is_dropped, 10, labels[rows])
        model(tokenizer.idx_to_var_input(idx[rows]), classes, idx[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.process_time() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if (step + 1) % max(num_steps // 4, 1) == 0:
            best = min(best, nats(model.eval(), tokenizer, *tokens["test"]))
            model.train()
    return {
        "heldout_nats_a_token": round(nats(model.eval(), tokenizer, *tokens["test"]), 3),
        "best_heldout_nats_a_token": round(best, 3),
        "training_cpu_ms_a_step": round(1e3 * sorted(steps)[len(steps) // 2], 1),
        "training_memory_mib": round(peak / 1024, 1),
    }


def sample(model, tokenizer, tokens) -> dict:
    """Draw a hundred digits and compare them with real ones."""
    import torch

    from nextblock.data.pixels import to_uint8
    from nextblock.evaluation.digits_judge import DigitSet, class_accuracy, fit_judge
    from nextblock.evaluation.metrics import frechet_distance

    asked, start = torch.arange(10).repeat(10), time.process_time()
    drawn = model.generate(asked, tokenizer.quantizer, generator=torch.Generator().manual_seed(1))
    seconds = (time.process_time() - start) / len(asked)
    sets = {"samples": DigitSet.from_images(to_uint8(tokenizer.idx_to_img(torch.cat(drawn, 1))), asked.numpy())}
    for split, (idx, labels) in tokens.items():
        images = to_uint8(tokenizer.idx_to_img(idx[:360]))
        sets[split] = DigitSet.from_images(images, labels[:360].numpy())
    distances = {name: frechet_distance(sets[name].features, sets["test"].features) for name in ("samples", "train")}
    return {
        "sampling_cpu_ms_an_image": round(1e3 * seconds, 1),
        "sample_class_accuracy": round(class_accuracy(fit_judge(sets["test"]), sets["samples"]), 3),
        "sample_frechet_ratio": round(distances["samples"] / distances["train"], 2),
    }


def measure(num_bits: int, name: str, num_steps: int, folder: Path) -> dict:
    """Train a prior and return its figures."""
    import torch

    from nextblock.prior import BlockPrior, BlockPriorConfig
    from nextblock.tokenizer import VQVAE

    tokenizer, tokens = VQVAE.from_pretrained(folder / "tokenizer").eval(), torch.load(folder / "tokens.pt")
    torch.manual_seed(0)
    codes = {"vocab_size": 2**num_bits, "embedding_dim": num_bits, "code_bases": [2] * num_bits}
    layout = {"layout": tokenizer.layout.to_dict(), "input_embedding": "codes"}
    model = BlockPrior(BlockPriorConfig(num_classes=10, **layout, **SIZES, **codes, **options(num_bits, name))).train()
    return {
        "bits": num_bits,
        "head": name,
        "steps": num_steps,
        "parameters_millions": round(model.num_parameters() / 1e6, 3),
        "guessing_nats_a_token": round(num_bits * math.log(2), 3),
        **train(model, tokenizer, tokens, num_steps),
        **sample(model, tokenizer, tokens),
    }


def main() -> None:
    """Measure every row that is missing, each in a process of its own, and write them down one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=200)
    parser.add_argument("--tokenizer_steps", type=int, default=200)
    parser.add_argument("--work_dir", default="out/benchmark-heads")
    parser.add_argument("--output", default="benchmarks/heads.json")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--is_for_tokens", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        num_bits, name = CASES[arguments.case]
        folder = Path(arguments.work_dir) / f"{num_bits}-bits-{arguments.tokenizer_steps}"
        if arguments.is_for_tokens:
            folder.mkdir(parents=True, exist_ok=True)
            make_tokens(num_bits, arguments.tokenizer_steps, folder)
        else:
            print(json.dumps(measure(num_bits, name, arguments.num_steps, folder)))
        return
    output = Path(arguments.output)
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    done = {(row["bits"], row["head"], row["steps"]) for row in rows}
    for case, (num_bits, name) in enumerate(CASES):
        if (num_bits, name, arguments.num_steps) in done:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(case)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        # In a process before: its memory would hide that of the row.
        if not (Path(arguments.work_dir) / f"{num_bits}-bits-{arguments.tokenizer_steps}" / "tokens.pt").exists():
            subprocess.run([*command, "--is_for_tokens"], env=environment, check=True)
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        notes = "held-out losses are exact likelihoods of each head's own sampling and comparable; CPU time, one thread"
        output.write_text(json.dumps({"notes": notes, "sizes": SIZES, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
