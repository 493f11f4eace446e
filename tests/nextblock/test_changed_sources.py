"""A training does not go on with other images or tokens than it began with, unless it is told to."""

import shutil

import pytest

from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train as train_tokenizer

SHORT = ["--loop.num_steps", "2", "--loop.save_every", "1", "--loop.tracker", "null", "--num_pictures", "1"]
GOES_ON = ["--loop.resume_from_checkpoint", "latest"]
HINT = "expected the same files, or loop.accepts_changed_options true to go on with those that are there"



def test_images_that_were_replaced_are_named(run_here, tokenizer_arguments, image_folder, tmp_path):
    images, run = shutil.copytree(image_folder, tmp_path / "images", copy_function=shutil.copy), tmp_path / "run"
    arguments = [*tokenizer_arguments, *SHORT, "--data.path", images, "--output_dir", run]

    def train(*options) -> None:
        run_here(train_tokenizer, TokenizerTrainConfig, *arguments, *options)

    train()
    (images / "test" / "wren" / "01.png").touch()  # A time alone is no change.
    train(*GOES_ON)
    shutil.copy(images / "test" / "wren" / "00.png", images / "test" / "wren" / "01.png")
    with pytest.raises(ValueError, match=f"test/wren/01.png is not the file .*; {HINT}"):
        train(*GOES_ON)
    train(*GOES_ON, "--loop.accepts_changed_options", "true")
    train(*GOES_ON)  # What was accepted is what the run goes by.


def test_tokens_that_were_replaced_are_named(run_here, prior_arguments, tokens_dir, tmp_path):
    tokens, run = shutil.copytree(tokens_dir, tmp_path / "tokens"), tmp_path / "run"
    arguments = [*prior_arguments, *SHORT[:-2], "--tokens", tokens, "--output_dir", run, "--pipeline_dir", run / "p"]
    run_here(train_prior, PriorTrainConfig, *arguments)
    text = (tokens / "manifest.json").read_text()
    (tokens / "manifest.json").write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ValueError, match=f"tokens/manifest.json is not the file .*: its content is another .*; {HINT}"):
        run_here(train_prior, PriorTrainConfig, *arguments, *GOES_ON)
    (tokens / "manifest.json").write_text(text)
    run_here(train_prior, PriorTrainConfig, *arguments, *GOES_ON)
