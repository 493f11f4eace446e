"""Prior training end to end: exact resumption, process counts, accumulation, and the pipeline that it exports."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from nextblock.data.images import ImageDataConfig
from nextblock.data.tokens import TokenDataset, TokenManifest, collate_tokens
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.sampling import SamplingOptions
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.training_data import PriorData
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import main, train
from nextblock.train_tokenizer import train as train_tokenizer
from nextblock.training.average import saved_average
from nextblock.training.loop_config import LoopConfig
from nextblock.training.order import StepSampler
from nextblock.training.resume import BOOKKEEPING

# Two micro-batches a step, dropout of every kind, label smoothing.
HARD = ["--loop.gradient_accumulation_steps", "2", "--model.dropout", "0.1", "--model.drop_path", "0.2"]
HARD += ["--model.label_smoothing", "0.1"]


def folders(run_dir: Path) -> list:
    return ["--output_dir", run_dir, "--pipeline_dir", run_dir / "pipeline"]


@pytest.fixture(scope="module")
def train_here(run_here, prior_arguments):
    """Train a tiny prior in this process."""

    def run(run_dir: Path, *options) -> PriorTrainConfig:
        return run_here(train, PriorTrainConfig, *prior_arguments, *folders(run_dir), *options)

    return run


@pytest.fixture(scope="module")
def alone(train_here, tmp_path_factory) -> Path:
    """A run on one process, without dropout."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder)
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "pipeline" / "prior" / "model.safetensors")


def assert_same_weights(run_dir: Path, expected_dir: Path) -> None:
    got, expected = weights(run_dir), weights(expected_dir)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def num_processes(run_dir: Path) -> int:
    return json.loads((run_dir / "checkpoints" / "step_00000006" / "checkpoint.json").read_text())["num_processes"]


def test_an_interrupted_training_equals_an_uninterrupted_one(
    train_here, tmp_path, monkeypatch, assert_same_state, read_metrics
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(whole, *HARD)
    train_step = PriorTask.train_step

    def interrupted(self, micro_batches, step):
        if step == 5:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(PriorTask, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_here(broken, *HARD)
    assert not (broken / "pipeline").exists()
    train_here(broken, *HARD, "--loop.resume_from_checkpoint", "latest")
    assert_same_state(broken, whole, step=6)
    assert_same_weights(broken, whole)
    assert read_metrics(broken) == read_metrics(whole)


def test_two_processes_equal_one(two_process_runs, alone, assert_same_state, read_metrics):
    run = two_process_runs / "prior"
    assert num_processes(run) == 2 and num_processes(alone) == 1
    # AdamW in float32 turns the rounding of a small gradient into a step of the learning rate's size.
    assert_same_state(run, alone, step=6, atol=1e-4)
    for line, other in zip(read_metrics(run), read_metrics(alone), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_one_view_of_every_image_makes_an_epoch_where_views_are_sampled(train_here, tokens_dir, tmp_path, monkeypatch):
    seen, num_rows = [], []
    train_step = PriorTask.train_step

    def noting(self, micro_batches, step):
        seen.extend(batch["labels"] for batch in micro_batches)
        num_rows.append(len(self.data.train))
        return train_step(self, micro_batches, step)

    monkeypatch.setattr(PriorTask, "train_step", noting)
    train_here(tmp_path / "run", "--samples_views", "true", "--loop.seed", "5")
    rows = TokenDataset(tokens_dir, "train", samples_views=True, view_seed=5)
    assert set(num_rows) == {len(rows)} and len(rows) * 3 == len(TokenDataset(tokens_dir, "train"))
    first = StepSampler(len(rows), len(seen[0]), num_micro_batches=1, seed=5, steps=range(1), rank=0, world_size=1)
    assert torch.equal(seen[0], rows.__getitems__(next(iter(first)))["labels"])
    with pytest.raises(ValueError, match="samples_views is true; expected false without tokens"):
        PriorTrainConfig(
            data=ImageDataConfig(source="digits"), samples_views=True, tokenizer="t", output_dir="o", pipeline_dir="p"
        )


def test_two_processes_with_dropout_resume_exactly(two_process_runs, assert_same_state, read_metrics):
    whole, resumed = two_process_runs / "prior_whole", two_process_runs / "prior_resumed"
    assert num_processes(whole) == num_processes(resumed) == 2
    assert_same_state(resumed, whole, step=6)
    assert_same_weights(resumed, whole)
    assert read_metrics(resumed) == read_metrics(whole)


def test_a_run_leaves_metrics_pictures_events_and_its_configuration(alone, read_metrics):
    lines = read_metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    figures = {"loss", "accuracy"} | {f"block_{k}/{name}" for k in range(3) for name in ("loss", "accuracy")}
    for line in lines[:-1]:
        expected = figures | {"grad_norm", "learning_rate"}
        assert line.keys() == {"step"} | {f"train/{name}" for name in expected}
        of_blocks = sum(length * line[f"train/block_{k}/loss"] for k, length in enumerate((1, 4, 16))) / 21
        assert line["train/loss"] == pytest.approx(of_blocks, rel=1e-5)
    assert lines[0]["train/loss"] == pytest.approx(np.log(24), abs=0.05)
    assert lines[-1].keys() == {"step"} | {f"eval/{name}" for name in figures | {"gain_nats"}}
    assert lines[-1]["eval/gain_nats"] == pytest.approx(np.log(24) - lines[-1]["eval/loss"], abs=1e-12)
    with Image.open(alone / "pictures" / "samples_00000006.png") as picture:
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)
    assert len(list((alone / "logs" / "nextblock").glob("events.out.tfevents.*"))) == 1
    left = {"checkpoints", "logs", "pictures", "pipeline", "config.yaml", "metrics.jsonl", "run.json"}
    left |= {"tokens_check.png", "source-tokens.npz"}
    assert {path.name for path in alone.iterdir()} == left


def test_the_saved_configuration_repeats_the_run(alone, run_here, tmp_path, read_metrics):
    run_here(train, PriorTrainConfig, "--config", alone / "config.yaml", *folders(tmp_path))
    assert_same_weights(tmp_path, alone)
    assert read_metrics(tmp_path) == read_metrics(alone)


def held_out_loss(prior: BlockPrior, tokenizer: VQVAE, tokens_dir: Path) -> float:
    rows = TokenDataset(tokens_dir, "test")
    batch = rows.__getitems__(list(range(len(rows))))
    var_input = tokenizer.idxBl_to_var_input(tokenizer.layout.split(batch["labels"]))
    with torch.no_grad():
        return prior(var_input, batch["class_labels"], batch["labels"]).token_loss.mean().item()


def test_the_exported_prior_is_the_weight_average(alone, tokens_dir, read_metrics):
    pipe = ClassToImagePipeline.from_pretrained(alone / "pipeline")
    average = saved_average(alone / "checkpoints" / "step_00000006")
    raw = load_file(alone / "checkpoints" / "step_00000006" / "model.safetensors")
    exported = pipe.prior.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in exported.items())
    assert not torch.equal(raw["head.weight"], exported["head.weight"])
    assert pipe.class_names == ["blue tit", "great tit", "wren"]
    assert pipe.prior.config.tokenizer_fingerprint == TokenManifest.load(tokens_dir).tokenizer_sha256
    assert pipe.sampling == SamplingOptions(guidance_scale=1.25)
    loss = held_out_loss(pipe.prior, pipe.tokenizer, tokens_dir)
    assert read_metrics(alone)[-1]["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_the_exported_card_says_how_the_prior_was_trained_and_what_it_reached(alone, read_metrics):
    card = (alone / "pipeline" / "README.md").read_text()
    loss = next(line["eval/loss"] for line in reversed(read_metrics(alone)) if "eval/loss" in line)
    assert "| steps | 6 |" in card and f"| eval/loss | {loss:.6g} |" in card and "![samples](samples.png)" in card
    newest = sorted(alone.glob("pictures/*"))[-1]
    with Image.open(alone / "pipeline" / "samples.png") as grid, Image.open(newest) as last:
        # The same samples as at the last evaluation, in rows of eight instead of four with a margin around.
        shown = np.asarray(grid.convert("RGB")).reshape(-1, 3)
        assert {tuple(pixel) for pixel in shown} <= {tuple(pixel) for pixel in np.asarray(last).reshape(-1, 3)}


def test_the_exported_pipeline_loads_by_either_class(alone, tokenizer_dir):
    images = []
    for pipeline_class in (ClassToImagePipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(alone / "pipeline")
        assert type(pipe) is ClassToImagePipeline
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images.append(pipe(["wren", 0], 2, guidance_scale=1.5, generator=generator, output_type="pt").images)
    assert images[0].shape == (4, 3, 16, 16) and torch.equal(*images)
    for name, tensor in VQVAE.from_pretrained(tokenizer_dir).state_dict().items():
        assert torch.equal(pipe.tokenizer.state_dict()[name], tensor), name


def test_training_predicts_better_and_better(train_here, tmp_path, read_metrics):
    options = ["--loop.num_steps", 60, "--loop.ema_decay", 0.9, "--optimizer.learning_rate", 1e-2]
    options += ["--model.adaln_gamma_init", 0.5, "--loop.save_every", "null", "--loop.tracker", "null"]
    train_here(tmp_path, *options, "--loop.eval_every", 30)
    lines = read_metrics(tmp_path)
    assert lines[59]["train/loss"] < lines[0]["train/loss"] - 0.5
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert len(losses) == 2 and losses[0] < np.log(24)


def make_task(config, tokens_dir, tokenizer_dir, accelerator=None, dtype=torch.float64, **options) -> PriorTask:
    tokenizer = VQVAE.from_pretrained(tokenizer_dir).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "embedding_dim": 4, "num_classes": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes, **options)).to(dtype).train()
    train_rows, heldout = (TokenDataset(tokens_dir, split) for split in ("train", "test"))
    data = PriorData(train=train_rows, heldout=heldout, collate=collate_tokens, class_names=["a", "b", "c"])
    return PriorTask(accelerator or Accelerator(cpu=True), config, model, tokenizer, data, export=None)


def test_micro_batches_add_up_to_the_batch(tokens_dir, tokenizer_dir, fresh_accelerate):
    loop = LoopConfig(num_steps=4, batch_size=8)
    config = PriorTrainConfig(
        tokens="", tokenizer="", output_dir="", pipeline_dir="", loop=loop, class_dropout=0.5
    )
    rows, states, metrics = TokenDataset(tokens_dir, "train"), [], []
    for n in (1, 2, 4):
        task = make_task(config, tokens_dir, tokenizer_dir, label_smoothing=0.1)
        for step in range(3):
            batch = rows.__getitems__(list(range(8 * step, 8 * step + 8)))
            parts = [{name: tensor.chunk(n)[i] for name, tensor in batch.items()} for i in range(n)]
            metrics.append(task.train_step(parts, step))
        states.append(task.model.state_dict())
    for i, state in enumerate(states[1:], start=1):
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-11, msg=name)
        for step in range(3):
            for name in ("loss", "grad_norm", "block_2/loss"):
                torch.testing.assert_close(metrics[3 * i + step][name], metrics[step][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rate", "moved"), [(0.0, {0, 1, 2}), (1.0, {3})])
def test_dropped_labels_train_the_null_class(tokens_dir, tokenizer_dir, fresh_accelerate, rate, moved):
    config = PriorTrainConfig(tokens="", tokenizer="", output_dir="", pipeline_dir="", class_dropout=rate)
    config.optimizer.weight_decay = 0.0
    task = make_task(config, tokens_dir, tokenizer_dir, adaln_gamma_init=0.5)
    before = task.model.class_emb.weight.detach().clone()
    batch = TokenDataset(tokens_dir, "train").__getitems__(list(range(48)))
    assert set(batch["class_labels"].tolist()) == {0, 1, 2}
    task.train_step([batch], 0)
    is_moved = (task.model.class_emb.weight != before).any(1)
    assert set(is_moved.nonzero().flatten().tolist()) == moved


def test_held_out_figures_do_not_depend_on_the_number_of_processes(tokens_dir, tokenizer_dir, fresh_accelerate):
    config = PriorTrainConfig(tokens="", tokenizer="", output_dir="", pipeline_dir="", eval_batch_size=4)
    # 15 rows on 16 processes: the last one has none.
    sums = []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return tensor

    for world_size in (1, 2, 16):
        sums.clear()
        for rank in range(world_size):
            task = make_task(config, tokens_dir, tokenizer_dir)
            state = {"process_index": rank, "num_processes": world_size, "device": torch.device("cpu")}
            task.accelerator = SimpleNamespace(**state, reduce=reduce, unwrap_model=lambda model: model)
            with torch.no_grad():
                names = [name for name in task.evaluate(task.model.eval())[0] if name != "gain_nats"]
        figures = dict(zip(names, (torch.stack(sums).sum(0) / 15).tolist(), strict=True))
        if world_size == 1:
            expected = figures
            loss = held_out_loss(task.model, task.tokenizer, tokens_dir)
            assert figures["loss"] == pytest.approx(loss, rel=1e-12)
        assert figures == pytest.approx(expected, rel=1e-12)


def test_bf16_evaluates_and_exports_the_average(train_here, tokens_dir, tmp_path, read_metrics):
    options = ["--loop.mixed_precision", "bf16", "--optimizer.learning_rate", 0.02]
    train_here(tmp_path, *options, "--model.adaln_gamma_init", 0.5)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    raw = BlockPrior(pipe.prior.config).eval()
    raw.load_state_dict(load_file(tmp_path / "checkpoints" / "step_00000006" / "model.safetensors"))
    with torch.autocast("cpu", torch.bfloat16):
        average, of_raw = (held_out_loss(prior, pipe.tokenizer, tokens_dir) for prior in (pipe.prior, raw))
    last = read_metrics(tmp_path)[-1]
    assert last["eval/loss"] == pytest.approx(average, rel=1e-5)
    assert abs(of_raw - average) > 1e-3
    # Figures are averaged in float32.
    of_blocks = sum(length * last[f"eval/block_{k}/loss"] for k, length in enumerate((1, 4, 16))) / 21
    assert of_blocks == pytest.approx(last["eval/loss"], rel=1e-6)


def test_images_without_classes_from_end_to_end(run_here, plain_image_folder, tokenizer_arguments, tmp_path):
    images = ["--data.source", "folder", "--data.path", plain_image_folder]
    tiles = ["--model.layout", "tiles", "--model.scales", "null", "--model.tile", "2"]
    options = [*tokenizer_arguments, *images, *tiles, "--loop.num_steps", 2, "--loop.tracker", "null"]
    options += ["--output_dir", tmp_path / "tokenizer"]
    run_here(train_tokenizer, TokenizerTrainConfig, *options)
    options = ["--tokenizer", tmp_path / "tokenizer", "--cpu", "true", *images, "--output_dir", tmp_path / "tokens"]
    run_here(tokenize, TokenizeConfig, *options)
    options = ["--tokenizer", tmp_path / "tokenizer", "--tokens", tmp_path / "tokens", "--loop.num_steps", 2]
    options += ["--loop.batch_size", 4, "--loop.cpu", "true", "--model.hidden_size", 16, "--model.num_layers", 1]
    run_here(train, PriorTrainConfig, *options, "--loop.tracker", "null", *folders(tmp_path / "prior"))
    assert (tmp_path / "prior" / "pictures" / "samples_00000002.png").is_file()
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "prior" / "pipeline")
    assert (pipe.prior.config.num_classes, pipe.prior.config.input_embedding) == (0, "tokens")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_images_per_label=3).images) == 3 and pipe.sampling == SamplingOptions()
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model without classes"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels is 0; expected None for an unconditional model"):
        pipe(0)


def test_the_command_works_in_another_folder(prior_arguments, tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.chdir(tmp_path)
    options = ["--loop.num_steps", "1", "--loop.tracker", "null"]
    main([*prior_arguments, *options, "--output_dir", "run", "--pipeline_dir", "pipeline"])
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_wrong_options_end_the_command_with_a_message(train_here, tmp_path, capsys):
    for wrong, message in (
        (["--model.vocab_size", 24], "model.vocab_size"),
        (["--class_dropout", 1.5], "class_dropout is 1.5; expected a number in [0, 1]"),
        (["--eval_batch_size", 0], "eval_batch_size is 0; expected at least 1"),
        (["--sampling.guidance_schedule", "cosine"], "guidance_schedule"),
        (["--sampling.guidance_scale", -1], "guidance_scale is -1.0; expected a number from 0 to 1000"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            train_here(tmp_path, *wrong)
        assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_tokens_and_options_that_do_not_fit_are_refused(train_here, tokenizer_dir, tokens_dir, tmp_path):
    other = VQVAE.from_pretrained(tokenizer_dir)
    with torch.no_grad():
        other.encoder.get_parameter(next(name for name, _ in other.encoder.named_parameters())).add_(1)
    other.save_pretrained(tmp_path / "other")
    for wrong, message in (
        (["--tokenizer", tmp_path / "other"], "the tokenizer has weights .* of the tokenizer that made"),
        (["--tokens", tokenizer_dir], "has no manifest.json; expected a folder that `nextblock tokenize` finished"),
        (["--loop.batch_size", 145], "batch_size is 145; expected 1 to 144, the size of the data set"),
        (["--loop.batch_size", 9, "--loop.gradient_accumulation_steps", 2], "batch_size is 9; expected a multiple"),
        (["--loop.mixed_precision", "fp16"], "mixed_precision is 'fp16'; expected 'bf16' or 'no' on a CPU"),
        (["--model.num_heads", 3], "num_heads is 3; expected a divisor of hidden_size 16"),
        (["--model.input_embedding", "tokens"], "input_embedding is 'tokens'; expected 'codes' for a scale layout"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(tmp_path / "run", *wrong)


def test_how_pictures_are_drawn_decides_no_weight():
    assert {f"sampling.{field.name}" for field in fields(SamplingOptions)} <= BOOKKEEPING
    assert {field.name for field in fields(PriorTrainConfig)} >= {"sampling"}


def test_every_undecayed_name_is_one_of_the_priors():
    layout = {"kind": "scales", "scales": [1, 2]}
    model = BlockPrior(BlockPriorConfig(layout=layout, use_shared_adaln=True, use_normalized_attention=True))
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    assert set(BlockPrior.no_decay) <= parts
