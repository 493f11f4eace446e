"""Models and pipelines made of checkpoints are those that their trainings export."""

import shutil
from pathlib import Path

import pytest

from nextblock.export import main
from nextblock.files.atomic import file_sha256
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train as train_tokenizer

from ..training.poison import poisons, replace_file

LAST, HALF = "checkpoints/step_00000006", "checkpoints/step_00000003"


@pytest.fixture(scope="module")
def tokenizer_run(tokenizer_arguments, run_here, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tokenizer"
    adversarial = "--discriminator.weight 0.5 --discriminator.num_layers 1 --discriminator.base_width 8".split()
    options = [*adversarial, "--discriminator.lecam_weight", "0.1", "--loop.tracker", "null"]
    run_here(train_tokenizer, TokenizerTrainConfig, *tokenizer_arguments, *options, "--output_dir", folder)
    return folder


def export(checkpoint: Path, output_dir: Path, *options: str) -> Path:
    main(["--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *options])
    return output_dir


def test_a_tokenizers_average_is_what_its_training_exports(tokenizer_run, tmp_path, capsys):
    folder = export(tokenizer_run / LAST, tmp_path / "new")
    assert f"{folder}: the weight average of {tokenizer_run / LAST}" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tokenizer_run / name).read_bytes()
    half = export(tokenizer_run / HALF, tmp_path / "half")
    assert file_sha256(half / "model.safetensors") != file_sha256(folder / "model.safetensors")
    VQVAE.from_pretrained(half)


def test_without_an_average_the_weights_are_exported(tokenizer_arguments, run_here, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--loop.ema_decay", "null", "--loop.tracker", "null", "--output_dir", run]
    run_here(train_tokenizer, TokenizerTrainConfig, *tokenizer_arguments, *options)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{run}: finished in ") and "; eval/psnr " in line and "block_" not in line
    assert f"; model in {run}; last checkpoint {run / LAST}; all figures in {run / 'metrics.jsonl'}" in line
    folder = export(run / LAST, tmp_path / "new")
    assert "the weights of" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_priors_checkpoint_becomes_a_prior_or_a_pipeline(prior_arguments, tokenizer_dir, run_here, tmp_path):
    run, pipeline = tmp_path / "run", tmp_path / "pipeline"
    options = ["--loop.tracker", "null", "--output_dir", run, "--pipeline_dir", pipeline]
    run_here(train_prior, PriorTrainConfig, *prior_arguments, *options)
    expected = file_sha256(pipeline / "prior" / "model.safetensors")
    alone = export(run / LAST, tmp_path / "alone")
    assert file_sha256(alone / "model.safetensors") == expected
    assert BlockPrior.from_pretrained(alone).conditions.num_classes == 3
    whole = export(run / LAST, tmp_path / "whole", "--tokenizer", str(tokenizer_dir))
    assert file_sha256(whole / "prior" / "model.safetensors") == expected
    assert ClassToImagePipeline.from_pretrained(whole).tokenizer.config.vocab_size == 24


def test_a_poisoned_checkpoint_is_refused_and_runs_nothing(tokenizer_run, tmp_path):
    for number, name in enumerate(("average.safetensors", "model.safetensors")):
        checkpoint = shutil.copytree(tokenizer_run / HALF, tmp_path / str(number))
        if name == "model.safetensors":
            replace_file(checkpoint, "average.safetensors", None)
        replace_file(checkpoint, name, poisons(tmp_path / "trace")["zip"])
        with pytest.raises(ValueError, match=f"{name}.* cannot be (read|loaded)"):
            export(checkpoint, tmp_path / "new")
    assert not (tmp_path / "trace").exists() and not (tmp_path / "new").exists()


def test_what_cannot_be_exported_is_refused(tokenizer_run, tmp_path):
    with pytest.raises(ValueError, match="holds files; expected a new or empty folder"):
        export(tokenizer_run / LAST, tokenizer_run)
    with pytest.raises(ValueError, match="tokenizer is 'x'; expected null with a tokenizer's checkpoint"):
        export(tokenizer_run / LAST, tmp_path / "new", "--tokenizer", "x")
    with pytest.raises(ValueError, match="cannot be used: checkpoint.json is missing"):
        export(tokenizer_run, tmp_path / "new")
    shutil.copytree(tokenizer_run / HALF, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be used: config.json is missing"):
        export(tmp_path / "damaged", tmp_path / "new")
    assert not (tmp_path / "new").exists()
