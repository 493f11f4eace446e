"""Two processes: the loss in chunks under DDP, and a prior sharded by FSDP2, against one process with the whole batch.

Run as a script with a folder, this file is both processes. accelerate turns FSDP on the CPU into DDP without a word, so
the sharding test tells its state that FSDP is what it runs, and looks at the parameters.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.training.optim import OptimizerConfig, build_optimizer
from nextblock.training.sharding import sharded_precision

LAYOUT = BlockLayout.scales([1, 2, 3])
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def build_model(dtype: torch.dtype) -> BlockPrior:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "embedding_dim": 4, "num_classes": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return BlockPrior(BlockPriorConfig(layout=LAYOUT.to_dict(), adaln_gamma_init=1.0, **sizes)).to(dtype).train()


def global_batch(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    var_input = torch.randn(4, 13, 4, generator=generator).to(dtype)
    return var_input, torch.tensor([0, 1, 2, 3]), torch.randint(11, (4, 14), generator=generator)


def take_step(model, optimizer, batch, **options) -> None:
    model(*batch, **options).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_two_processes_equal_one(tmp_path):
    with open(tmp_path / "errors", "w+") as errors:
        command, environment = [sys.executable, __file__, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stderr=errors, timeout=300)
        errors.seek(0)
        assert done.returncode == 0, errors.read()
    alone = build_model(torch.float64)
    alone(*global_batch(torch.float64)).loss.backward()
    stepped = build_model(torch.float32)
    take_step(stepped, build_optimizer(stepped, OPTIMIZER, stepped.no_decay), global_batch(torch.float32))
    before = build_model(torch.float32).state_dict()
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert results["world_size"] == 2
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(results["chunked"][name], parameter.grad, rtol=1e-12, atol=1e-12, msg=name)
        # Every parameter was split, and by half where its first dimension is even.
        assert results["num_sharded"] == len(before) and results["share"] < 0.6
        for name, parameter in stepped.named_parameters():
            torch.testing.assert_close(results["sharded"][name], parameter, rtol=0, atol=1e-5, msg=name)
            assert not torch.equal(results["sharded"][name], before[name]) or "word_embed" in name, name
        half = results["bf16"]
        assert set(half["dtypes"]) == {"torch.float32"} and not half["is_rounded"]
        torch.testing.assert_close(half["token_loss"], half["whole_token_loss"], rtol=0, atol=0.02)


def gradients_in_chunks(rank: int) -> dict[str, torch.Tensor]:
    """Take this process's half of the batch in two accumulated parts, chunk by chunk."""
    model = torch.nn.parallel.DistributedDataParallel(build_model(torch.float64))
    parts = [tensor.chunk(2)[rank].chunk(2) for tensor in global_batch(torch.float64)]
    first, second = zip(*parts, strict=True)
    with model.no_sync():
        (model(*first, loss_chunk_size=5).loss / 2).backward()
    (model(*second, loss_chunk_size=5).loss / 2).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def sharded_step(rank: int) -> dict:
    """Take a step with sharded weights, checkpointed layers and a loss in chunks; return the gathered weights."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
    )
    accelerator = Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = build_model(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER, model.no_decay))
    parameters = dict(model.named_parameters())
    sharded = [parameter for parameter in parameters.values() if isinstance(parameter, DTensor)]
    share = sum(p.to_local().numel() for p in sharded) / sum(p.numel() for p in sharded) if sharded else 1.0
    batch = [tensor.chunk(2)[rank] for tensor in global_batch(torch.float32)]
    take_step(model, optimizer, batch, loss_chunk_size=5)
    gathered = {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}
    return {"num_sharded": len(sharded), "share": share, "sharded": gathered}


def sharded_losses(rank: int) -> dict:
    """Compute in bf16 with sharded weights and without; return types, losses and a gradient."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    batch = [tensor.chunk(2)[rank] for tensor in global_batch(torch.float32)]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with accelerator.autocast():
        whole = build_model(torch.float32)(*batch)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=sharded_precision("bf16"),
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = build_model(torch.float32)
    model, _ = accelerator.prepare(model, build_optimizer(model, OPTIMIZER, model.no_decay))
    layer_inputs = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: layer_inputs.append(args[0].dtype))
    with accelerator.autocast():
        output = model(*batch)
    output.loss.backward()
    gradient = model.head.weight.grad
    dtypes = [output.loss.dtype, output.logits.dtype, output.token_loss.dtype, gradient.dtype, *layer_inputs]
    parts = {"loss": output.loss, "token_loss": output.token_loss}
    return {
        "dtypes": [str(dtype) for dtype in dtypes],
        **{name: value.detach() for name, value in parts.items()},
        "whole_token_loss": whole.token_loss.detach(),
        "is_rounded": bool((output.loss == output.loss.bfloat16()).all()),
    }


def main() -> None:
    """Be both processes, which share one import."""
    folder, child = Path(sys.argv[1]), os.fork()
    rank = 1 if child == 0 else 0
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    # Asked for, though the processes are connected already.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2)
    results = {"chunked": gradients_in_chunks(rank), "world_size": dist.get_world_size()} | sharded_step(rank)
    results["bf16"] = sharded_losses(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
