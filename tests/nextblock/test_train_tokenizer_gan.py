"""Adversarial tokenizer training: exact resumption, process counts, accumulation, loss scale, schedule, terms.

Run as a script, this file is two processes that share one import: `test_train_gan.py OUTPUT PORT`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from nextblock.command_line import parse_run_config
from nextblock.tokenizer.adversarial import DiscriminatorConfig, build_discriminator
from nextblock.tokenizer.autoencoder import ResidualBlock, SpatialAttention
from nextblock.tokenizer.losses import TokenizerLossConfig
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, VQVAEOptions, build_tokenizer
from nextblock.train_tokenizer import train
from nextblock.training.loop_config import LoopConfig

TINY = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init_scale": 0.3}
TINY |= {"codebook_update": "ema", "codebook_ema_decay": 0.8, "revival_threshold": 0.3}
TINY |= {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2}
CODES = "tokenizer.quantizer.codebook.weight"
GAN = {"weight": 0.5, "num_layers": 1, "base_width": 4, "lecam_weight": 0.1, "r1_weight": 0.5, "r1_every": 2}
# Every adversarial option at once, for the command line.
OPTIONS = """
    --discriminator.weight 0.5 --discriminator.num_layers 1 --discriminator.base_width 4
    --discriminator.norm spectral --discriminator.start_step 1 --discriminator.generator_start_step 2
    --discriminator.generator_warmup_steps 2 --discriminator.lecam_weight 0.1
    --discriminator.r1_weight 0.5 --discriminator.r1_every 2 --loss.entropy_weight 0.1
    --discriminator.optimizer.learning_rate 1e-3 --loop.gradient_accumulation_steps 2
    --model.num_res_blocks 1 --model.dropout 0.1 --model.hidden_dim 16
""".split()


def make_task(
    gan: dict | None = None,
    *,
    entropy_weight: float = 0.0,
    num_steps: int = 5,
    scaler: torch.amp.GradScaler | None = None,
    model: dict | None = None,
    **options,
) -> TokenizerTask:
    """Build a tiny task in float64, the same each time."""
    torch.manual_seed(0)
    config = TokenizerTrainConfig(
        output_dir="unused",
        model=VQVAEOptions(**TINY | (model or {})),
        loss=TokenizerLossConfig(entropy_weight=entropy_weight),
        discriminator=DiscriminatorConfig(**gan or {}),
        loop=LoopConfig(num_steps=num_steps, batch_size=8),
        **options,
    )
    accelerator = Accelerator(cpu=True)
    # Models and optimizers take it over as they are prepared.
    accelerator.scaler = scaler
    task = TokenizerTask(accelerator, config, build_tokenizer(config).double().train(), [], None)
    if scaler is not None:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        assert accelerator.mixed_precision == "fp16"
    return task


def run_steps(task: TokenizerTask, num_micro_batches: int = 1, rank: int = 0, world_size: int = 1) -> list[dict]:
    """Train on random images for as many steps as the configuration says."""
    return [run_step(task, step, num_micro_batches, rank, world_size) for step in range(task.config.loop.num_steps)]


def run_step(task: TokenizerTask, step: int, num_micro_batches: int = 1, rank: int = 0, world_size: int = 1) -> dict:
    """Take one step on random images."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(step + 1):
        batch = 2 * torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 1
    parts = batch.chunk(world_size)[rank].chunk(num_micro_batches)
    return task.train_step([{"pixel_values": part} for part in parts], step)


def state_of(task: TokenizerTask) -> dict[str, Tensor]:
    """Return copies of all weights and averages."""
    unwrap = task.accelerator.unwrap_model
    modules = {"tokenizer": unwrap(task.model)}
    if task.adversary is not None:
        modules |= {"discriminator": unwrap(task.discriminator), "averages": task.adversary.averages}
    return {f"{name}.{key}": t.clone() for name, module in modules.items() for key, t in module.state_dict().items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


def test_without_a_discriminator_training_is_what_it_was(fresh_accelerate):
    # Recorded before there were adversarial, perceptual and entropy terms.
    expected = [0.8726240906352511, 0.854330872339149, 0.8690221379169314, 0.8611860349729885, 0.871224265679479]
    metrics = run_steps(make_task())
    assert [line["loss"].item() for line in metrics] == pytest.approx(expected, rel=1e-9)
    terms = {"loss", "l1", "l2", "vq", "grad_norm", "learning_rate"}
    terms |= {f"codebook/{name}" for name in ("usage", "perplexity", "num_dead_codes")}
    assert metrics[0].keys() >= terms and not any("adversarial" in name or "discr" in name for name in metrics[0])


def test_the_guard_hears_of_all_that_is_prepared(fresh_accelerate):
    plain, task = make_task(), make_task(GAN)
    assert (plain.modules, plain.optimizers) == ([plain.model], [plain.optimizer])
    assert task.modules == [task.model, task.discriminator]
    assert task.optimizers == [task.optimizer, task.discriminator_optimizer]


def test_each_side_starts_at_its_step(fresh_accelerate):
    plain = make_task()
    run_steps(plain)
    states = {}
    for start in (1, 3, 5):
        task = make_task(GAN | {"start_step": 1, "generator_start_step": start})
        first = {name: t for name, t in state_of(task).items() if name.startswith("discriminator")}
        metrics = run_steps(task)
        states[start] = state_of(task)
        assert [line["adversarial_weight"] > 0 for line in metrics] == [step >= start for step in range(5)]
        assert ["discriminator/loss" in line for line in metrics] == [False, True, True, True, True]
        assert any(not torch.equal(t, states[start][name]) for name, t in first.items())
    # Never used, the discriminator leaves the tokenizer's training bit for bit as it is without.
    for name, tensor in state_of(plain).items():
        assert torch.equal(tensor, states[5][name])
    weight = "tokenizer.decoder.2.weight"
    assert len({states[start][weight].sum().item() for start in states}) == 3


def test_a_discriminator_that_starts_late_is_untouched_before(fresh_accelerate):
    task = make_task(GAN | {"start_step": 5})
    before = state_of(task)
    run_steps(task)
    after = state_of(task)
    assert all(torch.equal(t, after[name]) for name, t in before.items() if not name.startswith("tokenizer"))


def test_every_term_is_logged_and_weighs_what_it_should(fresh_accelerate):
    for line in run_steps(make_task(GAN | {"generator_warmup_steps": 4}, entropy_weight=0.2, num_steps=4)):
        line = {name: float(value) for name, value in line.items()}
        expected = line["l1"] + line["l2"] + line["vq"] + 0.2 * line["entropy"]
        assert line["loss"] == pytest.approx(expected + line["adversarial_weight"] * line["adversarial"], rel=1e-9)
        side = {k.removeprefix("discriminator/"): v for k, v in line.items() if k.startswith("discriminator/")}
        assert side.keys() == {
            *("loss", "adversarial", "lecam", "r1", "real", "fake", "grad_norm", "learning_rate"),
        }
        assert side["loss"] == pytest.approx(side["adversarial"] + 0.1 * side["lecam"] + 0.5 * side["r1"], rel=1e-9)


def test_the_learning_rate_of_the_discriminator_begins_at_its_start(fresh_accelerate):
    task = make_task(GAN | {"start_step": 2})
    task.config.discriminator.optimizer.warmup_steps = 2
    rates = [line.get("discriminator/learning_rate") for line in run_steps(task)]
    assert rates == [None, None, pytest.approx(5e-5), pytest.approx(1e-4), pytest.approx(1e-4)]


def test_the_perceptual_term_joins_the_loss_and_the_balance(fresh_accelerate):
    losses = []
    for weight in (1.0, 4.0):
        task = make_task(GAN, num_steps=1)
        task.perceptual = lambda reconstruction, pixel_values: (reconstruction - pixel_values)[:, 0].abs().mean()
        task.config.perceptual.weight = weight
        (line,) = run_steps(task)
        adversarial = line["adversarial_weight"] * line["adversarial"]
        assert line["loss"].item() == pytest.approx(
            (line["l1"] + line["l2"] + line["vq"] + weight * line["perceptual"] + adversarial).item(), rel=1e-12
        )
        losses.append(line)
    assert losses[0]["perceptual"] == losses[1]["perceptual"]
    assert losses[1]["adversarial_weight"] > losses[0]["adversarial_weight"]


def test_micro_batches_add_up_to_the_batch(fresh_accelerate):
    # The adaptive factor belongs to a micro-batch; all else adds up.
    gan = GAN | {"is_weight_adaptive": False}
    states, metrics = [], []
    for n in (1, 2, 4):
        task = make_task(gan)
        metrics.append(run_steps(task, num_micro_batches=n))
        states.append(state_of(task))
    for i in (1, 2):
        assert_close(states[i], states[0], atol=1e-9)
        for line, other in zip(metrics[i], metrics[0], strict=True):
            for name in ("loss", "adversarial", "discriminator/loss", "discriminator/r1", "discriminator/grad_norm"):
                torch.testing.assert_close(line[name], other[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("max_grad_norm", [0.1, None])
def test_a_changing_loss_scale_changes_nothing(max_grad_norm, fresh_accelerate):
    # Twice as large after every step of either optimizer.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    states = []
    for chosen in (None, scaler):
        task = make_task(GAN, num_steps=4, scaler=chosen)
        for options in (task.config.optimizer, task.config.discriminator.optimizer):
            options.max_grad_norm = max_grad_norm
        run_steps(task, num_micro_batches=2)
        states.append(state_of(task))
    assert scaler.get_scale() == 2.0 ** (16 + 2 * 4)
    assert_close(states[1], states[0], atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [0.1, None])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_step_that_the_loss_scaler_skips_leaves_no_trace(update, max_grad_norm, fresh_accelerate):
    model = {"codebook_update": update, "revival_threshold": 0.9}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    states = []
    for chosen in (None, scaler):
        task = make_task(scaler=chosen, model=model)
        task.config.optimizer.max_grad_norm = max_grad_norm
        run_step(task, 0)
        before = state_of(task)
        if chosen is not None:
            # As an overflow does; the loss itself is finite.
            bias = task.model.decoder[-1].bias
            handle = bias.register_hook(lambda gradient: gradient * torch.inf)
            assert run_step(task, 1)["loss"].isfinite()
            handle.remove()
            assert scaler.get_scale() == 2.0**15
            assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(task).items())
        run_step(task, 2)
        states.append(state_of(task))
        assert not torch.equal(states[-1][CODES], before[CODES])
    assert_close(states[1], states[0], atol=1e-12)


def run_with_blocks(dropout: float = 0.2, **options) -> tuple[list[dict], dict[str, Tensor]]:
    """Train residual blocks against a discriminator."""
    task = make_task(GAN, num_steps=3, model={"num_res_blocks": 1, "dropout": dropout}, **options)
    torch.manual_seed(1)
    metrics = run_steps(task, num_micro_batches=2)
    return [{name: float(value) for name, value in line.items()} for line in metrics], state_of(task)


def test_checkpointed_blocks_train_as_others_do(monkeypatch, fresh_accelerate):
    calls, silu = [], F.silu
    monkeypatch.setattr(F, "silu", lambda *args, **kwargs: calls.append(args) or silu(*args, **kwargs))
    (metrics, state), num_calls = run_with_blocks(), len(calls)
    checkpointed_metrics, checkpointed_state = run_with_blocks(gradient_checkpointing=True)
    assert checkpointed_metrics == metrics
    assert all(torch.equal(tensor, checkpointed_state[name]) for name, tensor in state.items())
    # Four blocks of two activations are computed again for each of six micro-batches, by the adaptive weight never.
    assert len(calls) - num_calls == num_calls + 6 * 4 * 2


def test_blocks_are_compiled_and_not_what_the_adaptive_weight_differentiates(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    sizes = TINY | {"autoencoder": "vqgan", "width_multipliers": [1, 1, 1], "num_res_blocks": 1}
    config = TokenizerTrainConfig(output_dir="unused", model=VQVAEOptions(**sizes), torch_compile=True)
    model = build_tokenizer(config)
    blocks = [module for module in model.modules() if isinstance(module, (ResidualBlock, SpatialAttention))]
    assert len(blocks) == 13 + 5 and compiled == blocks


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_compiled_training_equals_an_uncompiled_one(gradient_checkpointing, fresh_accelerate):
    metrics, state = run_with_blocks(dropout=0.0)
    options = {"torch_compile": True, "gradient_checkpointing": gradient_checkpointing}
    compiled_metrics, compiled_state = run_with_blocks(dropout=0.0, **options)
    assert_close(compiled_state, state, atol=1e-9)
    for line, expected in zip(compiled_metrics, metrics, strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_an_interrupted_adversarial_training_equals_an_uninterrupted_one(
    run_here, tokenizer_arguments, tmp_path, monkeypatch, read_metrics
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [*tokenizer_arguments, *OPTIONS, "--loop.tracker", "null"]
    run_here(train, TokenizerTrainConfig, *arguments, "--output_dir", whole)
    train_step = TokenizerTask.train_step

    def interrupted(self, micro_batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_here(train, TokenizerTrainConfig, *arguments, "--output_dir", broken)
    resume = ["--loop.resume_from_checkpoint", "latest"]
    run_here(train, TokenizerTrainConfig, *arguments, "--output_dir", broken, *resume)
    got, expected = (
        json.loads((run / "checkpoints" / "step_00000006" / "checkpoint.json").read_text())["sha256"]
        for run in (broken, whole)
    )
    records = {"average.safetensors", "discriminator_averages.safetensors"}
    names = {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin", *records}
    assert got.keys() == expected.keys() >= names
    for name in names:
        assert got[name] == expected[name], name
    averages = load_file(broken / "checkpoints" / "step_00000006" / "discriminator_averages.safetensors")
    assert averages["num_updates"] == 5 and averages["means"].abs().min() > 0
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_metrics(broken) == read_metrics(whole)
    assert any(line.get("train/discriminator/r1", 0) > 0 for line in read_metrics(whole))
    # The export is the tokenizer alone.
    assert not any("discriminator" in name for name in load_file(whole / "model.safetensors"))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, fresh_accelerate):
    output = tmp_path / "state.pt"
    command = [sys.executable, __file__, str(output), str(free_port())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    shared = torch.load(output, weights_only=True)
    assert shared.pop("num_processes") == 2
    task = make_task(GAN, entropy_weight=0.2)
    metrics = run_steps(task)
    # What one process sees differs between them; what it adds to the gradient adds up.
    assert shared.pop("adversarial_weight").tolist() == pytest.approx(
        [line["adversarial_weight"].item() for line in metrics], rel=1e-9
    )
    assert_close(shared, state_of(task), atol=1e-9)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_what_does_not_fit_is_refused(run_here, tokenizer_arguments, tmp_path):
    arguments = [*tokenizer_arguments, "--output_dir", tmp_path / "run", "--loop.tracker", "null"]
    for wrong, message in (
        (["--discriminator.weight", 1], "discriminator.num_layers is 3; expected images of at least 24 pixels"),
        (["--perceptual.weight", 1, "--perceptual.backbone", tmp_path / "nowhere"], "perceptual.backbone is .*nowhere"),
        (["--model.num_channels", 1], "num_channels is 1; expected 3: pictures of any kind are read as RGB"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(train, TokenizerTrainConfig, *arguments, *wrong)


def test_shipped_photograph_configs_differ_in_the_discriminator_alone():
    configs = [
        parse_run_config(TokenizerTrainConfig, command="test", argv=[f"--config=tokenizer/{name}", "--output_dir=x"])
        for name in ("photos-64", "photos-64-gan")
    ]
    plain, adversarial = configs
    assert plain.discriminator.weight == 0 < adversarial.discriminator.weight
    build_discriminator(adversarial.discriminator, 3, [64, 64])
    adversarial.discriminator = plain.discriminator
    assert plain == adversarial


def main() -> None:
    torch.set_num_threads(1)
    child = os.fork()
    rank = "1" if child == 0 else "0"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    task = make_task(GAN, entropy_weight=0.2)
    accelerator = task.accelerator
    metrics = run_steps(task, rank=accelerator.process_index, world_size=accelerator.num_processes)
    if accelerator.is_main_process:
        weights = torch.stack([line["adversarial_weight"] for line in metrics])
        extra = {"num_processes": accelerator.num_processes, "adversarial_weight": weights}
        torch.save(state_of(task) | extra, Path(sys.argv[1]))
    dist.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
