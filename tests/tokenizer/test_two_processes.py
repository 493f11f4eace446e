"""Two processes with half a batch each train the same codebook as one process with the whole batch.

Run as a script, this file is one of the processes: `test_two_processes.py RANK STORE OUTPUT`.
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nextblock.tokenizer import VQVAE, VQVAEConfig

WORLD_SIZE = 2
NUM_STEPS = 3
NUM_CODES = 32
CASES = {
    "scales, ema": {
        "layout": "scales",
        "scales": [1, 2, 4],
        "codebook_update": "ema",
        "codebook_ema_decay": 0.6,
        "revival_threshold": 0.3,
    },
    "quadrants, ema": {
        "tile": 2,
        "codebook_update": "ema",
        "codebook_ema_decay": 0.6,
        "revival_threshold": 0.3,
    },
    "quadrants, gradient": {"tile": 2, "revival_threshold": 0.99},
}


def train_codebook(options: dict, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Take a few codebook steps on this process's part of each batch; return what all processes must agree on."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "vocab_size": NUM_CODES, "embedding_dim": 4}
    model = VQVAE(VQVAEConfig(codebook_init_scale=0.3, **sizes, **options)).double().train()
    codebook, results = model.quantizer.codebook, {}
    generator = torch.Generator().manual_seed(1)
    for step in range(NUM_STEPS):
        batch = 2 * torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 1
        results[f"statistics_{step}"] = model(batch.chunk(world_size)[rank]).statistics["code_counts"]
        model.update_codebook(7, step)
        results |= {f"{name}_{step}": tensor.detach().clone() for name, tensor in codebook.state_dict().items()}
    return results


def test_two_processes_equal_one(tmp_path):
    outputs = [tmp_path / f"rank{rank}.pt" for rank in range(WORLD_SIZE)]
    commands = [[sys.executable, __file__, str(rank), str(tmp_path / "store"), str(outputs[rank])] for rank in range(2)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [worker.communicate(timeout=200)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * WORLD_SIZE, "\n".join(errors)
    first, second = (torch.load(output, weights_only=True) for output in outputs)
    assert first.pop("world_size") == second.pop("world_size") == 2
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    for case, options in CASES.items():
        alone = train_codebook(options, rank=0, world_size=1)
        unrevived = train_codebook(options | {"revival_threshold": 0.0}, rank=0, world_size=1)
        assert not torch.equal(alone["weight_0"], unrevived["weight_0"])
        for name, expected in alone.items():
            assert torch.equal(first[case][name], second[case][name]), f"{case}: {name}"
            torch.testing.assert_close(first[case][name], expected, rtol=1e-12, atol=1e-12, msg=f"{case}: {name}")
        assert ("code_sums_0" in first[case]) == ("ema" in case)
        assert first[case]["statistics_0"].sum() == 8 * (21 if "scales" in case else 16)


def main() -> None:
    rank, store, output = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=WORLD_SIZE)
    results = {case: train_codebook(options, rank, WORLD_SIZE) for case, options in CASES.items()}
    torch.save(results | {"rank": dist.get_rank(), "world_size": dist.get_world_size()}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
