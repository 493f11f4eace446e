"""Fine-tuning: weights of a saved model, all but those named."""

import pytest
import torch
import yaml

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.building import with_initial_prior
from nextblock.prior.task import BlockPriorOptions, PriorTrainConfig
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.task import TokenizerTrainConfig, build_tokenizer, with_initial_tokenizer
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


@pytest.fixture
def pipeline_dir(prior_dir, tmp_path):
    """The pipeline whose prior is `prior_dir`'s with all of its classes."""
    return tmp_path / "first"


def without_model(arguments: list[str]) -> list[str]:
    """Leave out what a command line says of the model."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [part for pair in pairs if not pair[0].startswith("--model.") for part in pair]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return BlockPrior.from_pretrained(folder).state_dict()


def close(got, given) -> bool:
    # A step moves even a weight of 0 by the learning rate.
    return all(torch.allclose(tensor, given[name], rtol=0, atol=1e-25) for name, tensor in got.items())


def test_a_prior_starts_from_given_weights_with_classes_of_its_own(
    prior_dir, prior_arguments, run_here, tmp_path, caplog
):
    arguments = [*without_model(prior_arguments), *without_a_step(tmp_path / "run")]
    arguments += ["--loop.init_from", prior_dir, "--pipeline_dir", tmp_path / "pipeline"]
    with caplog.at_level("INFO"):
        run_here(train_prior, PriorTrainConfig, *arguments)
    assert f"starting from the weights of {prior_dir}; new: class_emb.weight" in caplog.text
    got, given = weights_of(tmp_path / "pipeline/prior"), weights_of(tmp_path / "first/prior")
    assert got["class_emb.weight"].shape == (4, 16)
    assert not torch.equal(got.pop("class_emb.weight"), given.pop("class_emb.weight"))
    assert close(got, given)


def test_a_pipeline_gives_its_prior_and_what_is_excepted_is_new(
    pipeline_dir, prior_arguments, run_here, tmp_path, caplog
):
    arguments = [*without_model(prior_arguments), *without_a_step(tmp_path / "run")]
    arguments += ["--loop.init_from", pipeline_dir, "--pipeline_dir", tmp_path / "pipeline", "--model.dropout", "0.5"]
    with caplog.at_level("INFO"):
        run_here(train_prior, PriorTrainConfig, *arguments)
    assert f"starting from the weights of {pipeline_dir}; new: none" in caplog.text
    given = weights_of(pipeline_dir / "prior")
    assert close(weights_of(tmp_path / "pipeline/prior"), given)
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["hidden_size"] == 16 and saved["model"]["dropout"] == 0.5
    # The run's own configuration repeats it: all options are given in it, and equal.
    arguments = ["--config", tmp_path / "run/config.yaml", *without_a_step(tmp_path / "again")]
    run_here(train_prior, PriorTrainConfig, *arguments, "--loop.init_except", "[head, lvl_embed.weight]")
    got = weights_of(tmp_path / "pipeline/prior")
    for name in ("head.weight", "lvl_embed.weight"):
        assert not torch.allclose(got.pop(name), given[name], atol=1e-3)
    got.pop("head.bias")
    assert close(got, given)


def test_options_that_differ_are_refused_by_name(pipeline_dir, prior_arguments, run_here, tmp_path):
    arguments = [*without_model(prior_arguments), *without_a_step(tmp_path / "run"), "--loop.init_from", pipeline_dir]
    arguments += ["--pipeline_dir", tmp_path / "pipeline"]
    # The second is the default, but it was asked for.
    for name, value, there in (("hidden_size", 32, 16), ("hidden_size", 128, 16), ("use_shared_adaln", True, False)):
        with pytest.raises(ValueError, match=f"another architecture: model.{name} is {value}, there {there}. Expected"):
            run_here(train_prior, PriorTrainConfig, *arguments, f"--model.{name}", value)
    tokenizer = VQVAE.from_pretrained(pipeline_dir / "tokenizer")
    options = BlockPriorOptions(num_layers=3)
    config = PriorTrainConfig(
        tokens="t", tokenizer="t", output_dir="o", pipeline_dir="p", model=options,
        loop=LoopConfig(init_from=str(pipeline_dir)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="model.num_layers is 3, there 2"):
        with_initial_prior(config, tokenizer)
    tokenizer.layout = BlockLayout.scales([1, 2, 3, 4])
    with pytest.raises(ValueError, match="a prior of layout .*; expected .*, as the tokenizer in 't' has it"):
        with_initial_prior(config, tokenizer)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_tokenizer_keeps_the_given_codes(update, tokenizer_dir, tokenizer_arguments, run_here, tmp_path):
    options = [*without_model(tokenizer_arguments), *without_a_step(tmp_path / "run")]
    options += ["--loop.init_from", tokenizer_dir, "--model.codebook_update", update]
    config = with_initial_tokenizer(run_here(lambda config: None, TokenizerTrainConfig, *options))
    assert config.model.image_size == [16, 16] and config.model.scales == [[1, 1], [2, 2], [4, 4]]
    model, given = build_tokenizer(config), VQVAE.from_pretrained(tokenizer_dir).state_dict()
    new = load_initial_weights(model, tokenizer_dir)
    assert len(new) == (0 if update == "gradient" else 2)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in given.items())
    if update == "ema":
        assert torch.equal(model.quantizer.codebook.code_sums, given["quantizer.codebook.weight"])
        return
    run_here(train, TokenizerTrainConfig, *options)
    got = VQVAE.from_pretrained(tmp_path / "run").state_dict()
    assert got.keys() == given.keys() and close(got, given)


def test_a_tokenizers_averages_may_be_left_behind(pipeline_dir, tokenizer_arguments, run_here, tmp_path):
    model = VQVAE.from_pretrained(pipeline_dir / "tokenizer", codebook_update="ema")
    model.save_pretrained(tmp_path / "averaged")
    options = [*without_model(tokenizer_arguments), "--loop.init_from", tmp_path / "averaged", "--output_dir", "o"]
    for update, count in (("gradient", 0), ("ema", 2)):
        given = ["--model.codebook_update", update]
        config = with_initial_tokenizer(run_here(lambda config: None, TokenizerTrainConfig, *options, *given))
        own = build_tokenizer(config)
        assert load_initial_weights(own, tmp_path / "averaged") == []
        assert sum("code_" in name for name in own.state_dict()) == count
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in own.state_dict().items())


def test_a_tokenizers_options_are_compared_as_sizes(pipeline_dir, tokenizer_arguments, run_here):
    options = [*tokenizer_arguments, "--loop.init_from", pipeline_dir, "--output_dir", "o"]
    config = with_initial_tokenizer(run_here(lambda config: None, TokenizerTrainConfig, *options))
    assert config.model.image_size == [16, 16] and config.model.revival_threshold == 0.3
    for name, value, said in (("image_size", 32, "32, there"), ("num_phi", 3, "3, there 2")):
        changed = run_here(lambda config: None, TokenizerTrainConfig, *options, f"--model.{name}", value)
        with pytest.raises(ValueError, match=f"another architecture: model.{name} is {said}"):
            with_initial_tokenizer(changed)


def test_what_cannot_be_loaded_is_refused(tokenizer_dir, tmp_path):
    model = VQVAE.from_pretrained(tokenizer_dir)
    with pytest.raises(ValueError, match="init_from is .*; expected the folder of a saved nextblock_vqvae.*: none"):
        load_initial_weights(model, tmp_path)
    with pytest.raises(ValueError, match="init_except has 'class_emb'; expected names of tensors or modules"):
        load_initial_weights(model, tokenizer_dir, ["class_emb"])
    with pytest.raises(ValueError, match=r"init_except is \['a'\]; expected none of them without init_from"):
        LoopConfig(init_except=["a"])
    prior = BlockPrior(BlockPriorConfig())
    with pytest.raises(ValueError, match="saved nextblock_block_prior, .*; models found: nextblock_vqvae in"):
        load_initial_weights(prior, tokenizer_dir)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing: weight \(2, 2\)"):
        load_initial_weights(other, tokenizer_dir)
