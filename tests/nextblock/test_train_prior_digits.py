"""From pictures to samples with 2^18 codes: tokens in uint32, a prior of digits trained, resumed, tuned, sampled."""

import shutil

import pytest
import torch

from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior.llamagen_checkpoint import prior_to_llamagen
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.train_prior import train
from nextblock.verify import damage_of

SIZES = ["--model.hidden_size", "16", "--model.num_layers", "2", "--model.num_heads", "2"]
LOOP = "--loop.cpu true --loop.mixed_precision no --loop.num_steps 4 --loop.batch_size 8 --loop.save_every 2".split()


@pytest.fixture(scope="module")
def tokens_of_bits(image_folder, run_here, tmp_path_factory):
    """A tokenizer of 4×4 codes of 18 bits, and the folder of its tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bits")
    sizes = {"image_size": 16, "hidden_dim": 8, "layout": "tiles", "tile": 1}
    codes = {"codebook": "lfq", "embedding_dim": 18, "vocab_size": 2**18}
    VQVAE(VQVAEConfig(**sizes, **codes)).eval().save_pretrained(folder / "tokenizer")
    options = ["--tokenizer", folder / "tokenizer", "--data.source", "folder", "--data.path", image_folder]
    run_here(tokenize, TokenizeConfig, *options, "--output_dir", folder / "tokens", "--cpu", "true")
    return folder


@pytest.fixture
def run(tokens_of_bits, run_here, tmp_path):
    """Train a prior of bits into a folder of a name."""

    def run_into(name: str, *options) -> None:
        folders = ["--output_dir", tmp_path / name, "--pipeline_dir", tmp_path / name / "pipeline"]
        tokens = ["--tokens", tokens_of_bits / "tokens", "--tokenizer", tokens_of_bits / "tokenizer"]
        common = [*tokens, *LOOP, "--num_pictures_per_class", 1, "--loop.tracker", "null"]
        run_here(train, PriorTrainConfig, *common, *folders, *options)

    return run_into


@pytest.mark.slow
@pytest.mark.parametrize("family", ["block", "llama"])
@pytest.mark.parametrize("head", ["digits", "digits_in_turn", "masked_digits"])
def test_from_pictures_to_samples(family, head, tokens_of_bits, run, read_metrics, assert_same_state, tmp_path):
    manifest = TokenManifest.load(tokens_of_bits / "tokens")
    assert (manifest.vocab_size, manifest.code_bases) == (2**18, [2] * 18)
    assert damage_of(tokens_of_bits / "tokens") == []
    labels = TokenDataset(tokens_of_bits / "tokens", "train").__getitems__([0, 1])["labels"]
    assert 2**16 < labels.max() < 2**18 and labels.unique().numel() > 2
    options = ["--model.family", family, *SIZES, "--model.head", head, "--loop.gradient_accumulation_steps", 2]
    options += ["--loss_chunk_size", 50, "--model.head_groups", "[1, 1, 4, 6, 6]"]
    run("whole", *options)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior.head_plan.bases == (2, 2, 16, 64, 64) and pipe.prior.num_parameters() < 60000
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert len(pipe(["wren", 0], generator=seeds, guidance_scale=2.0, top_k=8, output_type="pt").images) == 2

    run("resumed", *options)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    run("resumed", *options, "--loop.resume_from_checkpoint", "latest")
    assert_same_state(tmp_path / "resumed", tmp_path / "whole", step=4)

    if head == "masked_digits":
        run("tuned", "--loop.init_from", tmp_path / "whole" / "pipeline", "--model.head_passes", 5)
        tuned = ClassToImagePipeline.from_pretrained(tmp_path / "tuned" / "pipeline").prior
        assert tuned.head_plan.passes == (1,) * 5 and pipe.prior.head_plan.passes == (1, 1, 1, 2)
    if family == "llama":
        with pytest.raises(ValueError, match=f"head is '{head}'; expected 'softmax' in LlamaGen's format"):
            prior_to_llamagen(pipe.prior)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["digits_in_turn", "masked_digits"])
def test_two_processes_train_digits_as_one_does_and_resume_exactly(
    head, tokens_of_bits, run_here, run_on_two, read_metrics, assert_same_state, tmp_path
):
    options = ["--tokens", tokens_of_bits / "tokens", "--tokenizer", tokens_of_bits / "tokenizer", *LOOP, *SIZES]
    options += ["--model.head", head, "--model.head_groups", "[6, 6, 6]", "--loop.tracker", "null"]
    options += ["--num_pictures_per_class", "1"]

    def folders(name: str) -> list:
        return ["--output_dir", tmp_path / name, "--pipeline_dir", tmp_path / name / "pipeline"]

    run_here(train, PriorTrainConfig, *options, *folders("alone"))
    jobs = [("train-prior", [*options, *folders("two")]), ("copy", [tmp_path / "two", tmp_path / "resumed"])]
    jobs.append(("train-prior", [*options, *folders("resumed"), "--loop.resume_from_checkpoint", "latest"]))
    run_on_two(*jobs, cwd=tmp_path)
    assert_same_state(tmp_path / "two", tmp_path / "alone", step=4, atol=1e-4)
    assert_same_state(tmp_path / "resumed", tmp_path / "two", step=4)
    for line, other in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_heads_that_do_not_fit_the_tokens_are_refused(run, prior_arguments, run_here, tmp_path):
    with pytest.raises(ValueError, match="head_groups is .*; expected counts that add up to the 18 digits of a code"):
        run("odd", *SIZES, "--model.head", "digits", "--model.head_groups", "[9, 8]")
    with pytest.raises(ValueError, match="head_passes is 3; expected null for head 'digits'"):
        run("odd", *SIZES, "--model.head", "digits", "--model.head_passes", 3)
    folders = ["--output_dir", tmp_path / "run", "--pipeline_dir", tmp_path / "pipeline"]
    with pytest.raises(ValueError, match="head is 'digits'; expected 'softmax', as the tokenizer's .* codes have no"):
        run_here(train, PriorTrainConfig, *prior_arguments, *folders, "--model.head", "digits")
