"""Which family of priors a run trains: chosen by `model.family`, whose options alone are then admitted."""

import re
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator

from nextblock.command_line import parse_run_config
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import GPTPrior
from nextblock.prior.building import build_prior
from nextblock.prior.families import FAMILIES, OPTIONS, family_config
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.train_prior import main, train
from nextblock.training.run_config import run_config_text

REQUIRED = ["--tokens", "t", "--tokenizer", "t", "--output_dir", "o", "--pipeline_dir", "p"]
SIZES = ["--model.hidden_size", "16", "--model.num_layers", "2", "--model.num_heads", "2"]
LOOP = "--loop.cpu true --loop.mixed_precision no --loop.num_steps 4 --loop.batch_size 8 --loop.save_every 2".split()
SINGLE_TOKEN_FAMILIES = [family for family in FAMILIES if family != "block"]


def parse(*argv: str) -> PriorTrainConfig:
    return parse_run_config(PriorTrainConfig, command="train-prior", argv=[*REQUIRED, *argv])


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit):
        parse(*argv)
    return capsys.readouterr().err.split("error: ", 1)[1]


@pytest.fixture(scope="module")
def raster_tokens(image_folder, run_here, tmp_path_factory):
    """A tokenizer of 4×4 single tokens, and the folder of its tokens."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init_scale": 1.0}
    folder = tmp_path_factory.mktemp("raster")
    VQVAE(VQVAEConfig(layout="tiles", tile=1, **sizes)).eval().save_pretrained(folder / "tokenizer")
    options = ["--tokenizer", folder / "tokenizer", "--data.source", "folder", "--data.path", image_folder]
    run_here(tokenize, TokenizeConfig, *options, "--output_dir", folder / "tokens", "--cpu", "true")
    return ["--tokens", str(folder / "tokens"), "--tokenizer", str(folder / "tokenizer")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_chosen(family):
    run = parse("--model.family", family, "--model.num_layers", "7")
    assert type(run) is PriorTrainConfig and type(run.model) is OPTIONS[family]
    assert run.model.family == family and run.model.num_layers == 7 and run.model.given == {"family", "num_layers"}
    tokens = {"layout": {"kind": "tiles", "tile": 1, "grid": 4}, "vocab_size": 9, "embedding_dim": 4, "num_classes": 3}
    config = family_config(run.model, **tokens)
    assert (config.vocab_size, config.num_classes, config.num_layers) == (9, 3, 7)
    assert config.model_type == f"nextblock_{family}_prior"


def test_what_was_chosen_is_written_down(tmp_path):
    run = parse("--model.family", "llama", "--model.num_layers", "7")
    (tmp_path / "run.yaml").write_text(run_config_text(run))
    assert parse("--config", str(tmp_path / "run.yaml")) == run


def test_block_is_the_family_of_configs_that_name_none():
    assert parse().model == OPTIONS["block"]() and parse("--model.mlp_ratio", "2").model.mlp_ratio == 2
    assert parse("--config", "prior/digits-raster").model.family == "block"


def test_the_last_choice_counts(tmp_path):
    (tmp_path / "llama.yaml").write_text("model: {family: llama, num_layers: 3}\n")
    llama = ["--config", str(tmp_path / "llama.yaml")]
    assert parse(*llama).model.num_layers == 3
    assert parse("--model.family", "block", *llama).model.family == "llama"
    assert parse("--model", "{family: llama, inner_size: 8}").model.inner_size == 8
    assert parse("--model.family=llama", "--model.num_key_value_heads=1").model.num_key_value_heads == 1


def test_options_of_another_family_are_refused_by_name(capsys, tmp_path):
    error = refusal(capsys, "--model.family", "llama", "--model.mlp_ratio", "2")
    assert re.search("unrecognized arguments: --model.mlp_ratio", error)
    assert "--model.inner_size" in refusal(capsys, "--model.inner_size", "8")
    (tmp_path / "mixed.yaml").write_text("model: {family: llama, adaln_gamma_init: 0.5}\n")
    assert "adaln_gamma_init" in refusal(capsys, "--config", str(tmp_path / "mixed.yaml"))
    error = refusal(capsys, "--model.family", "lama")
    assert "model.family" in error and "'block', 'llama'" in error and "lama" in error
    with pytest.raises(ValueError, match="model.family is 'llama'; expected that of BlockPriorOptions"):
        PriorTrainConfig(**{name[2:]: "x" for name in REQUIRED[::2]}, model=OPTIONS["block"](family="llama"))


def test_help_shows_the_options_of_the_family(capsys):
    for argv, own, other in (([], "mlp_ratio", "inner_size"), (["--model.family", "llama"], "inner_size", "mlp_ratio")):
        with pytest.raises(SystemExit):
            main([*argv, "--help"])
        text = capsys.readouterr().out
        assert f"--model.{own} " in text and f"--model.{other} " not in text and "--model.family {block,llama" in text


@pytest.mark.parametrize("family", SINGLE_TOKEN_FAMILIES)
def test_a_layout_that_a_family_does_not_predict_is_refused(family):
    layout = {"kind": "scales", "scales": [1, 2]}
    with pytest.raises(ValueError, match="layout is .*scales.*; expected tiles of one cell"):
        family_config(OPTIONS[family](), layout=layout, vocab_size=9, embedding_dim=4, num_classes=3)


@pytest.mark.slow
@pytest.mark.parametrize("family", SINGLE_TOKEN_FAMILIES)
def test_a_family_is_trained_resumed_exported_and_started_from(
    family, raster_tokens, run_here, read_metrics, assert_same_state, tmp_path
):
    def run(name: str, *options: str) -> None:
        folders = ["--output_dir", tmp_path / name, "--pipeline_dir", tmp_path / name / "pipeline"]
        common = [*raster_tokens, *LOOP, "--num_pictures_per_class", 1, "--loop.tracker", "null"]
        run_here(train, PriorTrainConfig, *common, *folders, *options)

    hard = ["--model.family", family, *SIZES, "--loop.gradient_accumulation_steps", 2, "--model.dropout", 0.1]
    run("whole", *hard, "--loss_chunk_size", 50)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.prior) is FAMILIES[family] and pipe.prior.config.tokenizer_fingerprint
    card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
    assert f"nextblock_{family}_prior, 2 layers, width 16, 2 heads" in card
    assert len(pipe(["wren", 0], output_type="pt").images) == 2
    saved = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert saved["model"]["family"] == family

    resumed = tmp_path / "resumed"
    run("resumed", *hard, "--loss_chunk_size", 50, "--loop.num_steps", 4)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    run("resumed", *hard, "--loss_chunk_size", 50, "--loop.resume_from_checkpoint", "latest")
    assert_same_state(resumed, tmp_path / "whole", step=4)

    run("tuned", "--loop.init_from", tmp_path / "whole" / "pipeline", "--model.dropout", 0.2)
    tuned = ClassToImagePipeline.from_pretrained(tmp_path / "tuned" / "pipeline").prior
    assert type(tuned) is FAMILIES[family] and tuned.config.dropout == 0.2 and tuned.config.hidden_size == 16
    with pytest.raises(ValueError, match=r"model.num_layers is 3, there 2"):
        run("other", "--loop.init_from", tmp_path / "whole" / "pipeline", "--model.num_layers", 3)
    with pytest.raises(ValueError, match="expected the folder of a saved nextblock_block_prior"):
        run("other", "--loop.init_from", tmp_path / "whole" / "pipeline", "--model.family", "block")


@pytest.mark.slow
@pytest.mark.parametrize("family", SINGLE_TOKEN_FAMILIES)
def test_two_processes_train_a_family_as_one_does_and_resume_exactly(
    family, raster_tokens, run_here, run_on_two, read_metrics, assert_same_state, tmp_path
):
    options = [*raster_tokens, *LOOP, *SIZES, "--model.family", family, "--loop.tracker", "null"]
    options += "--loop.num_steps 6 --loop.save_every 3 --num_pictures_per_class 1 --class_dropout 0.3".split()
    options += ["--input_keep_rate", "0.7"]
    options += ["--orders.random_until_step", "2", "--orders.raster_from_step", "6"] if family == "rar" else []

    def folders(name: str) -> list:
        return ["--output_dir", tmp_path / name, "--pipeline_dir", tmp_path / name / "pipeline"]

    run_here(train, PriorTrainConfig, *options, *folders("alone"))
    jobs = [("train-prior", [*options, *folders("two")]), ("copy", [tmp_path / "two", tmp_path / "resumed"])]
    jobs.append(("train-prior", [*options, *folders("resumed"), "--loop.resume_from_checkpoint", "latest"]))
    run_on_two(*jobs, cwd=tmp_path)
    assert_same_state(tmp_path / "two", tmp_path / "alone", step=6, atol=1e-4)
    assert_same_state(tmp_path / "resumed", tmp_path / "two", step=6)
    for line, other in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_family_is_trained_on_random_codes_and_makes_a_pipeline(raster_tokens, run_here, monkeypatch, tmp_path):
    seen, forward = [], GPTPrior.forward

    def noting(self, var_input, condition, labels=None, **options):
        if self.training:
            seen.append((var_input != labels[:, :-1]).double().mean().item())
        return forward(self, var_input, condition, labels, **options)

    monkeypatch.setattr(GPTPrior, "forward", noting)
    folders = ["--output_dir", tmp_path / "run", "--pipeline_dir", tmp_path / "pipeline"]
    options = ["--model.family", "gpt", *SIZES, *LOOP, "--loop.tracker", "null", "--num_pictures_per_class", 1]
    run_here(train, PriorTrainConfig, *raster_tokens, *folders, *options, "--input_keep_rate", "0.5")
    assert len(seen) == 4 and all(0.3 < share < 0.65 for share in seen)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.prior) is GPTPrior and len(pipe(["wren", 0], output_type="pt").images) == 2


def test_random_codes_are_refused_where_vectors_are_fed(fresh_accelerate):
    sizes = {"image_size": 8, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 9, "codebook_init_scale": 1.0}
    tokenizer = VQVAE(VQVAEConfig(layout="scales", scales=[1, 2], **sizes))
    needed = {name[2:]: "x" for name in REQUIRED[::2]}
    config = PriorTrainConfig(**needed, input_keep_rate=0.5)
    with pytest.raises(ValueError, match="input_keep_rate is 0.5; expected 1 for a prior that takes codes"):
        PriorTask(Accelerator(cpu=True), config, build_prior(config, tokenizer, []), tokenizer, None, print)
    with pytest.raises(ValueError, match=r"input_keep_rate is 0.0; expected a number in \(0, 1\]"):
        PriorTrainConfig(**needed, input_keep_rate=0.0)
