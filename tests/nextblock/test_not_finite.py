"""Commands refuse tokenizers with NaN weights by the stage, and leave nothing that could be taken for a result."""

import pytest
import torch

from nextblock.data.tokens import TokenManifest
from nextblock.detokenize import DetokenizeConfig, detokenize
from nextblock.evaluate_tokenizer import main as evaluate_tokenizer
from nextblock.files.fingerprints import model_fingerprint
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE
from nextblock.train_prior import train
from nextblock.training.guards import NonFiniteError

FEATURES, IMAGE = "quantization: the feature map has", "decoding: the image has"


@pytest.fixture
def broken(tokenizer_dir, tmp_path):
    """Save the tokenizer with a NaN in a part of it, and return the folder."""

    def save(part: str):
        model = VQVAE.from_pretrained(tokenizer_dir)
        with torch.no_grad():
            [*model.get_submodule(part).parameters()][-1].view(-1)[0] = torch.nan
        model.save_pretrained(tmp_path / part)
        return tmp_path / part

    return save


def test_no_shard_is_written_of_nan_features(broken, run_here, image_folder, tmp_path):
    options = ["--data.source", "folder", "--data.path", image_folder, "--cpu", "true"]
    options += ["--tokenizer", broken("encoder"), "--output_dir", tmp_path / "tokens"]
    with pytest.raises(ValueError, match=FEATURES):
        run_here(tokenize, TokenizeConfig, *options)
    assert not list(tmp_path.rglob("*.parquet"))


def test_no_picture_is_written_of_a_nan_image(broken, run_here, tokens_dir, tmp_path, monkeypatch):
    folder = broken("decoder")
    sha256 = model_fingerprint(VQVAE.from_pretrained(folder))
    load = TokenManifest.load

    def load_as_of_the_broken_one(path):
        manifest = load(path)
        manifest.tokenizer_sha256 = sha256
        return manifest

    monkeypatch.setattr(TokenManifest, "load", load_as_of_the_broken_one)
    options = ["--tokenizer", folder, "--tokens", tokens_dir, "--output_dir", tmp_path / "new", "--cpu", "true"]
    with pytest.raises(ValueError, match=IMAGE):
        run_here(detokenize, DetokenizeConfig, *options)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("part", "message"), [("encoder", FEATURES), ("decoder", IMAGE)])
def test_no_figures_come_of_nan(broken, part, message, image_folder, tmp_path):
    options = ["--tokenizer", broken(part), "--output_dir", tmp_path / "report", "--cpu", "true"]
    options += ["--data.source", "folder", "--data.path", image_folder]
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer([str(option) for option in options])
    assert not (tmp_path / "report").exists()


def test_a_prior_does_not_learn_from_nan_features(broken, run_here, image_folder, tmp_path, monkeypatch):
    options = ["--data.source", "folder", "--data.path", image_folder, "--tokenizer", broken("encoder")]
    options += "--model.hidden_size 16 --model.num_layers 1 --model.num_heads 2 --loop.cpu true".split()
    options += "--loop.mixed_precision no --loop.num_steps 5 --loop.batch_size 8 --loop.tracker null".split()
    options += ["--loop.max_nonfinite_steps", 2, "--pipeline_dir", tmp_path / "pipeline"]
    with pytest.raises(ValueError, match=FEATURES):
        run_here(train, PriorTrainConfig, *options, "--output_dir", tmp_path / "first")
    # Features that are NaN later on are skipped with their step.
    monkeypatch.setattr(PriorTask, "start", lambda self: None)
    with pytest.raises(NonFiniteError, match="step 2: loss or gradient was not finite in 2 steps in a row"):
        run_here(train, PriorTrainConfig, *options, "--output_dir", tmp_path / "second")
