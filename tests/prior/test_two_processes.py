"""Two processes: the loss in chunks under DDP, and a prior sharded by FSDP2, against one process with the whole batch.

Run as a script with a folder, this file is both processes. accelerate turns FSDP on the CPU into DDP without a word, so
the sharding test tells its state that FSDP is what it runs, and looks at the parameters.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, GPTPrior, LlamaPrior, RARPrior
from nextblock.training.optim import OptimizerConfig, build_optimizer
from nextblock.training.sharding import sharded_precision

SIZES = {"vocab_size": 11, "num_classes": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
BLOCKS = {"layout": BlockLayout.scales([1, 2, 3]), "embedding_dim": 4, "adaln_gamma_init": 1.0}
FAMILIES = {
    "block": (BlockPrior, BLOCKS),
    "llama": (LlamaPrior, {"layout": BlockLayout.tiles(1, [2, 7])}),
    "gpt": (GPTPrior, {"layout": BlockLayout.tiles(1, [2, 7])}),
    "rar": (RARPrior, {"layout": BlockLayout.tiles(1, [2, 7])}),
    "digits": (BlockPrior, BLOCKS | {"vocab_size": 12, "code_bases": [3, 4], "head": "digits_in_turn"}),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


HEADS = {"llama": "output", "rar": "lm_head", "digits": "head.output"}


def build_model(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model_class, options = FAMILIES[family]
    model = model_class(model_class.config_class(**SIZES | options | {"layout": options["layout"].to_dict()}))
    for parameter in model.parameters():
        # A head or gate at zero lets no other gradient through.
        if model_class is not BlockPrior and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


def global_batch(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    var_input = torch.randn(4, 13, 4, generator=generator).to(dtype)
    classes = torch.tensor([0, 1, 2, 2 if family == "gpt" else 3])
    labels = torch.randint(11, (4, 14), generator=generator)
    return var_input if FAMILIES[family][0] is BlockPrior else labels[:, :-1], classes, labels


def take_step(model, optimizer, batch, **options) -> None:
    model(*batch, **options).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "family", ["block", *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES if each != "block")]
)
def test_two_processes_equal_one(family, tmp_path):
    with open(tmp_path / "errors", "w+") as errors:
        command, environment = [sys.executable, __file__, str(tmp_path), family], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stderr=errors, timeout=300)
        errors.seek(0)
        assert done.returncode == 0, errors.read()
    alone = build_model(family, torch.float64)
    alone(*global_batch(family, torch.float64)).loss.backward()
    stepped = build_model(family, torch.float32)
    take_step(stepped, build_optimizer(stepped, OPTIMIZER, stepped.no_decay), global_batch(family, torch.float32))
    before = dict(build_model(family, torch.float32).named_parameters())
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


def gradients_in_chunks(family: str, rank: int) -> dict[str, torch.Tensor]:
    """Take this process's half of the batch in two accumulated parts, chunk by chunk."""
    model = torch.nn.parallel.DistributedDataParallel(build_model(family, torch.float64))
    parts = [tensor.chunk(2)[rank].chunk(2) for tensor in global_batch(family, torch.float64)]
    first, second = zip(*parts, strict=True)
    with model.no_sync():
        (model(*first, loss_chunk_size=5).loss / 2).backward()
    (model(*second, loss_chunk_size=5).loss / 2).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def sharded_step(family: str, rank: int) -> dict:
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
    model = build_model(family, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER, model.no_decay))
    parameters = dict(model.named_parameters())
    sharded = [parameter for parameter in parameters.values() if isinstance(parameter, DTensor)]
    share = sum(p.to_local().numel() for p in sharded) / sum(p.numel() for p in sharded) if sharded else 1.0
    batch = [tensor.chunk(2)[rank] for tensor in global_batch(family, torch.float32)]
    take_step(model, optimizer, batch, loss_chunk_size=5)
    gathered = {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}
    return {"num_sharded": len(sharded), "share": share, "sharded": gathered}


def sharded_losses(family: str, rank: int) -> dict:
    """Compute in bf16 with sharded weights and without; return types, losses and a gradient."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    batch = [tensor.chunk(2)[rank] for tensor in global_batch(family, torch.float32)]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with accelerator.autocast():
        whole = build_model(family, torch.float32)(*batch)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=sharded_precision("bf16"),
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    model = build_model(family, torch.float32)
    model, _ = accelerator.prepare(model, build_optimizer(model, OPTIMIZER, model.no_decay))
    layer_inputs = []
    layers = model.layers if family == "llama" else model.blocks
    layers[1].register_forward_pre_hook(lambda module, args: layer_inputs.append(args[0].dtype))
    with accelerator.autocast():
        output = model(*batch)
    output.loss.backward()
    gradient = model.get_parameter(f"{HEADS.get(family, 'head')}.weight").grad
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
    folder, family, child = Path(sys.argv[1]), sys.argv[2], os.fork()
    rank = 1 if child == 0 else 0
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    # Asked for, though the processes are connected already.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2)
    results = {"chunked": gradients_in_chunks(family, rank), "world_size": dist.get_world_size()}
    results |= sharded_step(family, rank) | {"bf16": sharded_losses(family, rank)}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
