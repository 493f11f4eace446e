"""Prior training on captions end to end: stored and computed features, resumption, processes, families, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nextblock.export import ExportConfig, export
from nextblock.pipelines import TextToImagePipeline
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.text_encoder import load_text_encoder
from nextblock.prior.text_training import TextConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.train_prior import train

from ..conftest import NO_TRACKER, TINY_PRIOR


@pytest.fixture(scope="module")
def tokens_of_texts(run_here, captioned_folder, tokenizer_dir, text_encoder_dir, tmp_path_factory) -> dict[str, Path]:
    """Tokens with captions alone, and with features of them too."""
    root = tmp_path_factory.mktemp("texts")
    data = ["--data.source", "folder", "--data.path", captioned_folder, "--data.caption_column", "text"]
    where = ["--tokenizer", tokenizer_dir, "--cpu", "true", *data]
    run_here(tokenize, TokenizeConfig, *where, "--output_dir", root / "captions")
    text = ["--text_encoder", text_encoder_dir, "--text_max_length", 7]
    run_here(tokenize, TokenizeConfig, *where, *text, "--output_dir", root / "features")
    return {name: root / name for name in ("captions", "features")}


@pytest.fixture(scope="module")
def text_arguments(tokenizer_dir, text_encoder_dir) -> list:
    text = ["--text.encoder", text_encoder_dir]
    return [*TINY_PRIOR, *NO_TRACKER, "--model.adaln_gamma_init", "1", "--tokenizer", tokenizer_dir, *text]


@pytest.fixture(scope="module")
def train_here(run_here, text_arguments):
    """Train a tiny prior of captions in this process."""

    def run(run_dir: Path, *options) -> Path:
        where = ["--output_dir", run_dir, "--pipeline_dir", run_dir / "pipeline"]
        run_here(train, PriorTrainConfig, *text_arguments, *where, *options)
        return run_dir

    return run


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "pipeline" / "prior" / "model.safetensors")


def assert_same(run_dir: Path, other_dir: Path, atol: float = 0.0) -> None:
    got, expected = weights(run_dir), weights(other_dir)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def stored_run(train_here, tokens_of_texts, tmp_path_factory) -> Path:
    return train_here(tmp_path_factory.mktemp("stored") / "run", "--tokens", tokens_of_texts["features"])


def test_stored_features_train_as_computed_ones_and_the_pipeline_has_its_encoder(
    train_here, stored_run, tokens_of_texts, text_encoder_dir, read_metrics, tmp_path
):
    computed = train_here(tmp_path / "run", "--tokens", tokens_of_texts["captions"], "--text.max_length", 7)
    # float16 may round a feature the other way where texts were encoded in other company.
    assert_same(computed, stored_run, atol=2e-4)
    losses = [line["train/loss"] for line in read_metrics(stored_run) if "train/loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()
    pipe = TextToImagePipeline.from_pretrained(stored_run / "pipeline")
    assert pipe.prior.config.text_dim == 8 and pipe.prior.conditions.max_positions == 7
    expected = load_text_encoder(text_encoder_dir, 7).encode(["a red bird"])
    assert all(torch.equal(*pair) for pair in zip(pipe.encode_prompt("a red bird"), expected, strict=True))
    assert pipe(["a red bird", "the"], generator=torch.Generator().manual_seed(0)).images[1].size == (16, 16)
    assert (stored_run / "pipeline" / "samples.png").is_file()


def test_a_checkpoint_becomes_a_pipeline_with_its_encoder(
    stored_run, tokenizer_dir, text_encoder_dir, run_here, tmp_path
):
    where = ["--checkpoint", stored_run / "checkpoints" / "step_00000006", "--tokenizer", tokenizer_dir]
    run_here(export, ExportConfig, *where, "--text_encoder", text_encoder_dir, "--output_dir", tmp_path / "pipeline")
    assert_same(tmp_path, stored_run)
    assert len(TextToImagePipeline.from_pretrained(tmp_path / "pipeline")("the").images) == 1
    with pytest.raises(ValueError, match="text_encoder is None; expected the text encoder of a prior of captions"):
        run_here(export, ExportConfig, *where, "--output_dir", tmp_path / "without")


def test_an_interrupted_training_equals_an_uninterrupted_one(
    train_here, stored_run, tokens_of_texts, tmp_path, monkeypatch
):
    train_step = PriorTask.train_step

    def stop(self, micro_batches, step):
        if step == 4:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PriorTask, "train_step", stop)
        train_here(tmp_path / "run", "--tokens", tokens_of_texts["features"])
    resume = ["--loop.resume_from_checkpoint", "latest"]
    train_here(tmp_path / "run", "--tokens", tokens_of_texts["features"], *resume)
    assert_same(tmp_path / "run", stored_run)


@pytest.mark.parametrize(
    "options",
    [
        ["--text.null", "empty", "--model.has_text_vector", "false"],
        ["--model.has_text_prefix", "false", "--gradient_checkpointing", "true", "--loss_chunk_size", "16"],
    ],
    ids=["empty text, prefix", "vector, checkpointing"],
)
def test_other_ways_of_texts_train_and_draw(options, train_here, tokens_of_texts, text_encoder_dir, tmp_path):
    run_dir = train_here(tmp_path / "run", "--tokens", tokens_of_texts["captions"], "--text.max_length", 7, *options)
    pipe = TextToImagePipeline.from_pretrained(run_dir / "pipeline")
    null = pipe.prior.conditions.null_embeds
    if "empty" in options:
        assert torch.equal(null, load_text_encoder(text_encoder_dir, 7).encode([""])[0][0].float())
    else:
        assert null is None
    assert len(pipe("the cat", guidance_scale=2.0).images) == 1


def test_images_with_captions_are_trained_on_directly(train_here, captioned_folder, tmp_path):
    data = ["--data.source", "folder", "--data.path", captioned_folder, "--data.caption_column", "text"]
    run_dir = train_here(tmp_path / "run", *data, "--transform.max_shift", 1, "--text.max_length", 7)
    assert TextToImagePipeline.from_pretrained(run_dir / "pipeline").prior.config.text_dim == 8


def test_what_does_not_fit_is_refused_by_name(
    train_here, stored_run, tokens_of_texts, tokens_dir, captioned_folder, tmp_path
):
    features = ["--tokens", tokens_of_texts["features"]]
    from_stored = [*features, "--loop.init_from", stored_run / "pipeline"]
    data = ["--data.source", "folder", "--data.path", captioned_folder]
    for options, message in (
        (["--tokens", tokens_dir, "--text.max_length", 7], "the tokens' condition is 'class'; expected tokens of"),
        ([*features, "--text.max_length", 6], "expected that one with text.max_length 7"),
        ([*features, "--text.max_length", 33], "text_max_length is 33; expected 3 to 32"),
        ([*data, "--text.max_length", 7], "data.caption_column is null"),
        ([*features, "--text.encoder", captioned_folder], "text.encoder is .*: it has no config.json"),
        ([*from_stored, "--text.null", "empty"], "a prior of num_empty_positions 0; expected 2, as text.encoder"),
        ([*from_stored, "--text.encoder", "null"], "a prior of text_dim 8; expected None, as text.encoder None"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(tmp_path / "run", *options)
    with pytest.raises(ValueError, match="text.null is 'nothing'"):
        TextConfig(encoder="x", null="nothing")
    with pytest.raises(ValueError, match="expected the defaults without text.encoder"):
        TextConfig(null="empty")


@pytest.mark.slow
def test_two_processes_equal_one(stored_run, tokens_of_texts, text_arguments, run_on_two, tmp_path):
    where = ["--output_dir", tmp_path / "two", "--pipeline_dir", tmp_path / "two" / "pipeline"]
    run_on_two(("train-prior", [*text_arguments, *where, "--tokens", tokens_of_texts["features"]]), cwd=tmp_path)
    assert_same(tmp_path / "two", stored_run, atol=5e-4)


@pytest.mark.slow
def test_a_llama_prior_learns_from_captions_too(run_here, captioned_folder, text_encoder_dir, tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24}
    VQVAE(VQVAEConfig(**sizes)).save_pretrained(tmp_path / "tokenizer")
    data = ["--data.source", "folder", "--data.path", captioned_folder, "--data.caption_column", "text"]
    model = ["--model.family", "llama", "--model.hidden_size", 16, "--model.num_layers", 2, "--model.num_heads", 2]
    text = ["--text.encoder", text_encoder_dir, "--text.max_length", 7]
    loop = ["--loop.cpu", "true", "--loop.num_steps", 3, "--loop.batch_size", 4, *NO_TRACKER]
    where = ["--tokenizer", tmp_path / "tokenizer", "--output_dir", tmp_path, "--pipeline_dir", tmp_path / "pipeline"]
    run_here(train, PriorTrainConfig, *where, *data, *model, *text, *loop)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipe.prior).__name__ == "LlamaPrior" and len(pipe(["the", "a dog"], guidance_scale=2.0).images) == 2
