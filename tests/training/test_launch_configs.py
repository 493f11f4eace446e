"""The launch configs: accelerate reads each, and two CPU processes really are two."""

import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from nextblock.prior import BlockPrior, layers

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
NUM_PROCESSES = {"one-gpu": 1, "multi-gpu": 8, "multi-node": 16, "fsdp": 8, "cpu-2-processes": 2}


def launch_arguments(name: str) -> Namespace:
    """Return what the launcher makes of a config."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "nextblock", "train-tokenizer"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_all_launch_configs_are_known_and_shipped():
    assert {path.stem for path in FOLDER.iterdir()} == set(NUM_PROCESSES)
    shipped = resources.files("nextblock.configs") / "accelerate"
    assert {entry.name for entry in shipped.iterdir()} == {f"{name}.yaml" for name in NUM_PROCESSES}


@pytest.mark.parametrize("name", NUM_PROCESSES)
def test_accelerate_reads_every_option(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    read = config.to_dict()
    assert {key: read[key] for key in written} == written
    arguments = launch_arguments(name)
    assert arguments.num_processes == NUM_PROCESSES[name]
    assert arguments.multi_gpu == (name not in ("one-gpu", "fsdp")) and arguments.use_fsdp == (name == "fsdp")
    assert not arguments.use_cpu and arguments.mixed_precision == "no"


def test_fsdp_wraps_the_layers_of_the_prior(monkeypatch):
    environment = prepare_multi_gpu_env(launch_arguments("fsdp"))
    assert environment["FSDP_VERSION"] == "2" and environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    # Without names of their own, accelerate takes the model's.
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment
    assert all(hasattr(layers, name) for name in BlockPrior._no_split_modules)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_its_two_cpu_processes(tokenizer_arguments, tmp_path):
    """The launcher's own exit code is its own; what counts is what the workers leave."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(FOLDER / "cpu-2-processes.yaml")]
    command += ["--main_process_port", port, "-m", "nextblock", "train-tokenizer", *tokenizer_arguments]
    command += ["--loop.num_steps", "100000", "--loop.save_every", "null", "--loop.tracker", "null"]
    process = subprocess.Popen(
        [*command, "--output_dir", "run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log, is_signalled = [], False
    try:
        for line in process.stdout:
            log.append(line)
            if not is_signalled and "loss=" in line:
                process.send_signal(signal.SIGTERM)
                is_signalled = True
        process.wait(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["num_processes"] == 2, "".join(log)
    assert start["outcome"] == "stopped by SIGTERM", "".join(log)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step_{start['last_step']:08d}"
    manifest = json.loads((saved / "checkpoint.json").read_text())
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= manifest["sha256"].keys()
    assert not (tmp_path / "run" / "model.safetensors").exists()
