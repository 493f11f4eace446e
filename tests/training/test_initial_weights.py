"""Fine-tuning: weights of a saved model, all but those named."""

import pytest
import torch

from nextblock.prior import BlockPrior
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train
from nextblock.training.initial_weights import load_initial_weights
from nextblock.training.loop_config import LoopConfig


def without_a_step(folder) -> list:
    """Options of a training that leaves weights as they start."""
    options = ["--loop.num_steps", "1", "--loop.ema_decay", "null", "--loop.tracker", "null"]
    return [*options, "--optimizer.learning_rate", "1e-30", "--optimizer.weight_decay", "0", "--output_dir", folder]


@pytest.fixture
def prior_dir(prior_arguments, run_here, tmp_path):
    """A prior of other classes: fewer."""
    run_here(
        train_prior, PriorTrainConfig, *prior_arguments, *without_a_step(tmp_path / "first"), "--loop.seed", "5",
        "--pipeline_dir", tmp_path / "first",
    )  # fmt: skip
    model = BlockPrior.from_pretrained(tmp_path / "first" / "prior")
    model.class_emb = torch.nn.Embedding(2, model.config.hidden_size)
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_a_prior_starts_from_given_weights_with_classes_of_its_own(prior_dir, prior_arguments, run_here, tmp_path):
    arguments = [*prior_arguments, *without_a_step(tmp_path / "run"), "--pipeline_dir", tmp_path / "pipeline"]
    arguments += ["--loop.init_from", prior_dir]
    with pytest.raises(ValueError, match=r"misshapen: class_emb.weight \(2, 16\), expected \(4, 16\)"):
        run_here(train_prior, PriorTrainConfig, *arguments)
    run_here(train_prior, PriorTrainConfig, *arguments, "--loop.init_except", "[class_emb]")
    got = BlockPrior.from_pretrained(tmp_path / "pipeline" / "prior").state_dict()
    given = BlockPrior.from_pretrained(tmp_path / "first" / "prior").state_dict()
    assert got["class_emb.weight"].shape == (4, 16)
    assert not torch.equal(got.pop("class_emb.weight"), given.pop("class_emb.weight"))
    # A step moves even a weight of 0 by the learning rate.
    assert all(torch.allclose(tensor, given[name], rtol=0, atol=1e-25) for name, tensor in got.items())


def test_a_tokenizer_keeps_the_given_codes(tokenizer_dir, tokenizer_arguments, run_here, tmp_path):
    options = ["--loop.init_from", tokenizer_dir, "--model.codebook_update", "gradient"]
    options += ["--model.revival_threshold", "0"]
    run_here(train, TokenizerTrainConfig, *tokenizer_arguments, *without_a_step(tmp_path / "run"), *options)
    got, given = (VQVAE.from_pretrained(folder).state_dict() for folder in (tmp_path / "run", tokenizer_dir))
    assert got.keys() == given.keys()
    assert all(torch.allclose(tensor, given[name], rtol=0, atol=1e-25) for name, tensor in got.items())


def test_what_cannot_be_loaded_is_refused(tokenizer_dir, tmp_path):
    model = VQVAE.from_pretrained(tokenizer_dir)
    with pytest.raises(ValueError, match="holds no model.safetensors; expected the folder of a saved model"):
        load_initial_weights(model, tmp_path)
    with pytest.raises(ValueError, match="init_except has 'class_emb'; expected names of tensors or modules"):
        load_initial_weights(model, tokenizer_dir, ["class_emb"])
    with pytest.raises(ValueError, match=r"init_except is \['a'\]; expected none of them without init_from"):
        LoopConfig(init_except=["a"])
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing: weight \(2, 2\)"):
        load_initial_weights(other, tokenizer_dir)
