"""Variables of accelerate: what they would change against an option is refused, and the launcher's own are none."""

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train as train_tokenizer
from nextblock.training.accelerator import build_accelerator
from nextblock.training.launch_environment import check_training_variables
from nextblock.training.loop_config import LoopConfig

OPTIONS = {"num_micro_batches": 2, "precision": "no", "asked_precision": "auto"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "is '4', but loop.gradient_accumulation_steps is 2; expected"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "is 'auto', but loop.gradient_accumulation_steps is 2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", r"is 'bf16', but loop.mixed_precision is auto \(no here\); expected"),
        ("ACCELERATE_MIXED_PRECISION", "FP8", r"is 'fp8', but loop.mixed_precision is auto \(no here\); expected"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "is 'INDUCTOR'; expected it unset: the option torch_compile asks"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "expected it unset: the option gradient_checkpointing asks"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "is 'true'; expected DDP, FSDP or one process, not DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "expected DDP, FSDP or one process, not Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "not a parallelism config"),
    ],
)
def test_a_variable_against_an_option_is_refused(name, value, message, monkeypatch):
    check_training_variables(**OPTIONS)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} .*{message}|{name} {message}"):
        check_training_variables(**OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_MIXED_PRECISION", "NO"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_USE_DEEPSPEED", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false"),
    ],
)
def test_a_variable_that_asks_for_the_same_or_nothing_is_taken(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    check_training_variables(**OPTIONS)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_training_variables(**OPTIONS | {"precision": "bf16"})


@pytest.mark.parametrize("arguments", [[], ["--multi_gpu", "--num_processes", "2"], ["--use_fsdp"], ["--cpu"]])
def test_the_launchers_own_variables_are_taken(arguments, monkeypatch):
    command = launch_command_parser().parse_args([*arguments, "-m", "nextblock", "train-prior"])
    launched = _validate_launch_command(command)[0]
    is_simple = not (launched.multi_gpu or launched.use_fsdp)
    environment = prepare_simple_launcher_cmd_env(launched)[1] if is_simple else prepare_multi_gpu_env(launched)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and environment["ACCELERATE_DYNAMO_BACKEND"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_training_variables(**OPTIONS)


def test_a_device_against_the_option_is_refused(monkeypatch, tmp_path, fresh_accelerate):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    with pytest.raises(ValueError, match="ACCELERATE_TORCH_DEVICE is 'cuda:0', but the option cpu is true; expected"):
        build_accelerator(LoopConfig(cpu=True), tmp_path)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    assert build_accelerator(LoopConfig(cpu=True, tracker=None), tmp_path).device.type == "cpu"


def test_a_variable_that_does_what_an_option_does_is_named(monkeypatch, tmp_path, fresh_accelerate, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with caplog.at_level("INFO"):
        assert build_accelerator(LoopConfig(tracker=None), tmp_path).device.type == "cpu"
    assert "ACCELERATE_USE_CPU is set: training on the CPU" in caplog.text


def test_accumulation_divides_the_loss_once(tokenizer_dir, tokenizer_arguments, run_here, monkeypatch, tmp_path):
    options = [*tokenizer_arguments, "--loop.num_steps", "2", "--loop.tracker", "null"]
    options += ["--loop.gradient_accumulation_steps", "2", "--output_dir"]
    run_here(train_tokenizer, TokenizerTrainConfig, *options, tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    run_here(train_tokenizer, TokenizerTrainConfig, *options, tmp_path / "variable")
    plain, variable = (VQVAE.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "variable"))
    assert all(torch.equal(tensor, variable[name]) for name, tensor in plain.items())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is '4'"):
        run_here(train_tokenizer, TokenizerTrainConfig, *options, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_prior_refuses_them_too(prior_arguments, run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    options = [*prior_arguments, "--output_dir", tmp_path / "run", "--pipeline_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION is 'fp16', but loop.mixed_precision is no"):
        run_here(train_prior, PriorTrainConfig, *options)
    assert not (tmp_path / "run").exists()
