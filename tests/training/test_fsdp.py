"""A prior sharded over two CPU processes (FSDP2) trains, stops, resumes, is drawn from and exported like a whole one.

Run as a script, this file is both processes: `test_fsdp.py JOBS`, a JSON list of command lines of prior training.
accelerate turns FSDP into DDP on a CPU; the script makes it shard there as on a GPU.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.slow
def test_a_sharded_prior_equals_a_whole_one(prior_arguments, run_on_two, read_metrics, tmp_path):
    def arguments(name: str, *options: str) -> list[str]:
        folders = ["--output_dir", tmp_path / name, "--pipeline_dir", tmp_path / name / "pipeline"]
        fixed = ["--loop.ema_decay", "null", "--loop.tracker", "null", *folders, *options]
        return [str(argument) for argument in [*prior_arguments, *fixed]]

    run_on_two(("train-prior", arguments("whole")), cwd=tmp_path)
    resume = ["--loop.resume_from_checkpoint", "latest"]
    jobs = [arguments("sharded"), arguments("stopped"), arguments("stopped", *resume)]
    # A step that moves nothing, from the weights of the whole one.
    still = ["--optimizer.learning_rate", "1e-30", "--optimizer.weight_decay", "0", "--loop.num_steps", "1"]
    jobs.append(arguments("tuned", "--loop.init_from", str(tmp_path / "whole/pipeline"), *still))
    jobs.append(arguments("half", "--loop.mixed_precision", "bf16"))
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(jobs)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log = process.communicate(timeout=200)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log
    assert "stopped by SIGTERM after step 4 of 6" in log
    exported = {name: load_file(tmp_path / name / "pipeline/prior/model.safetensors") for name in ("whole", "sharded")}
    for name, tensor in exported["whole"].items():
        torch.testing.assert_close(exported["sharded"][name], tensor, rtol=0, atol=1e-4, msg=name)
    tuned = load_file(tmp_path / "tuned" / "pipeline/prior/model.safetensors")
    for name, tensor in exported["whole"].items():
        torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-25, msg=name)
    stopped = load_file(tmp_path / "stopped" / "pipeline/prior/model.safetensors")
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in exported["sharded"].items())
    assert (tmp_path / "sharded" / "pictures" / "samples_00000006.png").is_file()
    lines = {name: read_metrics(tmp_path / name) for name in ("whole", "half")}
    for exact, rounded in zip(lines["whole"], lines["half"], strict=True):
        assert exact.keys() == rounded.keys()
        for name in ("train/loss", "eval/loss"):
            if name in exact:
                assert exact[name] == pytest.approx(rounded[name], abs=0.01) and exact[name] != rounded[name]
    half = load_file(tmp_path / "half" / "pipeline/prior/model.safetensors")
    for name, tensor in exported["whole"].items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], tensor, rtol=0, atol=0.02, msg=name)


def main() -> None:
    """Train in two processes, the second job up to a signal."""
    jobs = [(free_port(), arguments) for arguments in json.loads(sys.argv[1])]
    child = os.fork()
    rank = "1" if child else "0"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.use_deterministic_algorithms(True)
    for number, (port, arguments) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port)
        train_sharded(arguments, is_signalled=number == 1 and rank == "1")
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_sharded(arguments: list[str], is_signalled: bool) -> None:
    """Train a prior of which this process holds a part."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from nextblock import train_prior as prior_train
    from nextblock.command_line import parse_run_config
    from nextblock.training import loop, opened_run
    from nextblock.training.sharding import sharded_precision

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    build_accelerator, take_step = opened_run.build_accelerator, loop._Training._step

    def build_sharding_accelerator(*args):
        accelerator = build_accelerator(*args)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            state_dict_type="SHARDED_STATE_DICT",
            mixed_precision_policy=sharded_precision(accelerator.mixed_precision),
            cpu_ram_efficient_loading=False,
        )
        return accelerator

    def step_of_sharded(self, micro_batches, step):
        assert all(isinstance(parameter, DTensor) for parameter in self.raw_model.parameters())
        if is_signalled and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self, micro_batches, step)

    opened_run.build_accelerator, loop._Training._step = build_sharding_accelerator, step_of_sharded
    try:
        prior_train.train(parse_run_config(prior_train.PriorTrainConfig, command="test", argv=arguments))
    finally:
        opened_run.build_accelerator, loop._Training._step = build_accelerator, take_step


if __name__ == "__main__":
    main()
