"""Training throughput of `fit` and the prior's task beside a plain PyTorch loop of the same model in the same run.

The two take turns, a segment of steps each. The plain loop does what a script of fifty lines does: a DataLoader, class
dropout, forward, cross-entropy, backward, clipping, fused AdamW, a weight average, and its loss every 50 steps. On the
CPU, on one thread, the processor's time is counted as well: other work on the machine then counts for neither.

    OMP_NUM_THREADS=1 python benchmarks/training.py --sizes digits wide
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from nextblock.data.tokens import collate_tokens
from nextblock.prior.building import build_prior
from nextblock.prior.families import BlockPriorOptions
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.training_data import PriorData
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.accelerator import build_accelerator
from nextblock.training.loop import fit
from nextblock.training.loop_config import LoopConfig
from nextblock.training.optim import OptimizerConfig, build_optimizer

SIZES = {
    "digits": {"hidden_size": 128, "num_layers": 4, "num_heads": 4},
    "wide": {"hidden_size": 256, "num_layers": 6, "num_heads": 8},
}
NUM_ROWS, NUM_CLASSES, BATCH_SIZE, EMA_DECAY, CLASS_DROPOUT = 4096, 10, 32, 0.99, 0.1
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant")


class RandomRows(Dataset):
    """Random tokens, handed out in batches as `TokenDataset` does."""

    def __init__(self, num_tokens: int, vocab_size: int):
        generator = np.random.default_rng(0)
        self.idx = generator.integers(vocab_size, size=(NUM_ROWS, num_tokens), dtype=np.uint16)
        self.class_labels = generator.integers(NUM_CLASSES, size=NUM_ROWS)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitems__(self, keys: list) -> dict[str, torch.Tensor]:
        rows = np.array([key[1] if isinstance(key, tuple) else key for key in keys])
        return {
            "labels": torch.from_numpy(self.idx[rows].astype(np.int64)),
            "class_labels": torch.from_numpy(self.class_labels[rows]),
            "index": torch.from_numpy(rows),
        }


class PlainLoop:
    """The loop to compare with, `run` steps of it at a time."""

    def __init__(self, model, tokenizer: VQVAE, rows: Dataset, device: torch.device):
        self.model, self.tokenizer, self.device = model.to(device).train(), tokenizer, device
        self.optimizer = build_optimizer(model, OPTIMIZER, model.no_decay)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
        loader = DataLoader(rows, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_tokens)
        self.batches = chain.from_iterable(repeat(loader))
        self.num_done = 0

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(self.batches).items()}
            labels, class_labels = batch["labels"], batch["class_labels"]
            is_dropped = torch.rand(len(class_labels), device=self.device) < CLASS_DROPOUT
            class_labels = torch.where(is_dropped, NUM_CLASSES, class_labels)
            var_input = self.tokenizer.idxBl_to_var_input(self.model.layout.split(labels))
            logits = self.model(var_input, class_labels).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            self.num_done += 1
            if self.num_done % 50 == 0:
                loss.item()


class TimedTask(PriorTask):
    """The prior's task, which lets the plain loop run and looks at the clocks between segments of `fit`'s steps."""

    def compare_with(self, plain: PlainLoop, segment: int) -> None:
        self.plain, self.segment = plain, segment
        self.times: dict[str, list] = {"nextblock": [], "plain": []}
        self.since = None

    def start(self) -> None:
        """Leave the check of the tokens out."""

    def train_step(self, micro_batches, step):
        if step % self.segment == 0:
            if self.since is not None:
                self.times["nextblock"].append(clocks() - self.since)
            start = clocks()
            self.plain.run(self.segment)
            self.times["plain"].append(clocks() - start)
            self.since = clocks()
        return super().train_step(micro_batches, step)

    def evaluate(self, model):
        return {}, {}

    def export(self, model, metrics) -> Path:
        """Keep nothing."""
        return Path(self.config.output_dir)


def clocks() -> np.ndarray:
    """Return wall and processor seconds, once a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def compare(size: str, num_segments: int, segment: int, folder: Path) -> dict:
    """Run both loops in turn and return their figures."""
    config = PriorTrainConfig(
        tokens="",
        tokenizer="",
        output_dir=str(folder),
        pipeline_dir="",
        model=BlockPriorOptions(**SIZES[size]),
        optimizer=OPTIMIZER,
        class_dropout=CLASS_DROPOUT,
        loop=LoopConfig(
            # One more step than counts, which ends the last segment.
            num_steps=num_segments * segment + 1,
            batch_size=BATCH_SIZE,
            mixed_precision="no",
            ema_decay=EMA_DECAY,
            tracker=None,
        ),
    )
    layout = {"layout": "scales", "scales": [1, 2, 4, 8]}
    tokenizer = VQVAE(VQVAEConfig(image_size=32, vocab_size=512, embedding_dim=32, **layout))
    tokenizer.eval().requires_grad_(False)
    rows, names = RandomRows(tokenizer.layout.num_tokens, 512), [str(n) for n in range(NUM_CLASSES)]
    accelerator = build_accelerator(config.loop, folder)
    data = PriorData(train=rows, heldout=None, collate=collate_tokens, class_names=names)
    task = TimedTask(accelerator, config, build_prior(config, tokenizer, names), tokenizer, data, export=None)
    task.compare_with(PlainLoop(build_prior(config, tokenizer, names), tokenizer, rows, accelerator.device), segment)
    fit(accelerator, task, rows, collate_tokens, config, folder)
    if len(task.times["nextblock"]) < num_segments:
        raise RuntimeError(f"stopped after {len(task.times['nextblock'])} of {num_segments} segments; no figures")
    row = {"size": size, **SIZES[size], "batch_size": BATCH_SIZE, "num_tokens": tokenizer.layout.num_tokens}
    for i, clock in enumerate(("wall", "processor")):
        # The first segment of each warms caches and allocators up.
        segments = {name: [both[i] for both in times[1:num_segments]] for name, times in task.times.items()}
        medians = {name: float(statistics.median(values)) / segment for name, values in segments.items()}
        row |= {f"{name}_{clock}_ms_a_step": round(1000 * median, 3) for name, median in medians.items()}
        # Of neighbouring segments, whose spread tells how far the machine is to be believed.
        pairs = zip(segments["nextblock"], segments["plain"], strict=True)
        quartiles = statistics.quantiles([float(100 * (ours / other - 1)) for ours, other in pairs], n=4)
        row[f"{clock}_overhead_percent_quartiles"] = [round(quartile, 2) for quartile in quartiles]
    return row


def main() -> None:
    """Compare every size and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--num_segments", type=int, default=12)
    parser.add_argument("--segment", type=int, default=25, help="steps of one loop before the other's turn")
    parser.add_argument("--output", default="benchmarks/training.json")
    arguments = parser.parse_args()
    results = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_threads": torch.get_num_threads(),
        "rows": [],
    }
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            results["rows"].append(compare(size, arguments.num_segments, arguments.segment, Path(folder)))
        print(results["rows"][-1], flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
