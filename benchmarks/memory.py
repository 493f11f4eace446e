"""Peak memory of one training step of a VAR-shaped prior on the CPU, with and without what saves memory.

Each case runs in a process of its own: weights and the optimizer's state are made first, and the most memory that the
step then takes on top of them (activations, logits, gradients) is what counts.

    python benchmarks/memory.py --depth 16 --batch_size 4
"""

import argparse
import json
import os
import resource
import subprocess
import sys

CASES = {
    "plain": {},
    "chunked cross-entropy": {"loss_chunk_size": 256},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "both": {"loss_chunk_size": 256, "gradient_checkpointing": True},
}
SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
VOCAB_SIZE, EMBEDDING_DIM, NUM_CLASSES = 4096, 32, 1000


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(depth: int, batch_size: int, loss_chunk_size: int | None = None, gradient_checkpointing: bool = False):
    """Take one step; return its figures."""
    import psutil
    import torch

    from nextblock.data.blocks import BlockLayout
    from nextblock.prior import BlockPrior, BlockPriorConfig
    from nextblock.training.optim import OptimizerConfig, build_optimizer

    torch.manual_seed(0)
    layout = BlockLayout.scales(SCALES)
    shape = {"hidden_size": 64 * depth, "num_layers": depth, "num_heads": depth, "use_normalized_attention": True}
    sizes = {"vocab_size": VOCAB_SIZE, "embedding_dim": EMBEDDING_DIM, "num_classes": NUM_CLASSES}
    model = BlockPrior(BlockPriorConfig(layout=layout.to_dict(), drop_path=depth / 240, **shape, **sizes)).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, OptimizerConfig(), model.no_decay)
    for parameter in model.parameters():  # A tensor at a time: whole gradients would lift the peak before the step.
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.full_like(parameter, 0.0).detach(),
            "exp_avg_sq": torch.full_like(parameter, 0.0).detach(),
        }
    L = layout.num_tokens
    var_input = torch.randn(batch_size, L - 1, EMBEDDING_DIM)
    class_labels, labels = torch.zeros(batch_size).long(), torch.randint(VOCAB_SIZE, (batch_size, L))
    before = psutil.Process().memory_info().rss
    output = model(var_input, class_labels, labels, loss_chunk_size=loss_chunk_size)
    output.loss.backward()
    optimizer.step()
    return {
        "parameters_millions": round(model.num_parameters() / 1e6, 1),
        "weights_and_optimizer_gib": round(before / 2**30, 2),
        "peak_of_step_gib": round((peak_bytes() - before) / 2**30, 3),
        "loss": output.loss.item(),
    }


def main() -> None:
    """Measure every case and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", default="benchmarks/memory.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(arguments.depth, arguments.batch_size, **CASES[arguments.case])))
        return
    results = {"depth": arguments.depth, "batch_size": arguments.batch_size, "dtype": "float32", "rows": []}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--depth", str(arguments.depth)]
        command += ["--batch_size", str(arguments.batch_size)]
        # One freed block of memory must go back at once, or the peak would tell of the allocator.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = {"case": case} | json.loads(done.stdout.splitlines()[-1])
        results["rows"].append(row)
        print(row, flush=True)
    with open(arguments.output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
