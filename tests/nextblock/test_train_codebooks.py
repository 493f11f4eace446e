"""Every codebook trains on two processes as on one, and goes on from a checkpoint as if it had never stopped."""

import pytest
import torch
from safetensors.torch import load_file

from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_tokenizer import train

SCALES = ["--model.layout", "scales", "--model.scales", "[1,2,4]", "--model.tile", "1"]
TILES = ["--model.layout", "tiles", "--model.scales", "null", "--model.tile", "2"]
TABLE = ["--model.codebook_update", "gradient", "--model.codebook_init", "data", "--model.revival_threshold", "0.3"]
RULE = ["--model.codebook_update", "gradient", "--model.codebook_init", "uniform", "--model.revival_threshold", "0"]
RULE += ["--model.codebook_ema_decay", "0.99"]
ENTROPY = ["--loss.entropy_weight", "0.1", "--loss.entropy_diversity", "0.8"]
CASES = {
    "fsq": [*RULE, *SCALES, "--model.codebook", "fsq", "--model.fsq_levels", "[4,3,2,2]", "--model.vocab_size", "48"],
    "lfq": [*RULE, *TILES, *ENTROPY, "--model.codebook", "lfq", "--model.vocab_size", "16"],
    "bsq": [*RULE, *SCALES, *ENTROPY, "--model.codebook", "bsq", "--model.vocab_size", "16"],
    "bits": [*RULE, *TILES, "--model.codebook", "lfq", "--model.embedding_dim", "17", "--model.vocab_size", "131072"],
    "simvq": [*RULE, *SCALES, "--model.codebook", "simvq", "--model.codebook_gradient", "rotation"],
    "index": [*TABLE, *TILES, *ENTROPY, "--loss.entropy_temperature", "0.01", "--model.codebook_gradient", "index"],
    "product": [*TABLE, *SCALES, "--model.codebook_digits", "[4,6]", "--model.codebook_update", "ema"],
}


def arguments_of(case: str, tokenizer_arguments) -> list[str]:
    scale_dropout = ["--scale_dropout", "0.5"] if "scales" in CASES[case] else []
    # The mean assignment is over a micro-batch of all processes, which is made of other images where there are more.
    num_parts = "1" if "--loss.entropy_weight" in CASES[case] else "2"
    parts = ["--loop.tracker", "null", "--loop.gradient_accumulation_steps", num_parts]
    return [*tokenizer_arguments, *CASES[case], *parts, *scale_dropout]


@pytest.fixture(scope="module")
def runs(tokenizer_arguments, run_on_two, tmp_path_factory):
    """For every codebook a whole run of two processes, and one that went on from step 3."""
    root, jobs = tmp_path_factory.mktemp("codebooks"), []
    for case in CASES:
        arguments = arguments_of(case, tokenizer_arguments)
        jobs.append(("train-tokenizer", [*arguments, "--output_dir", root / case]))
        jobs.append(("copy", [root / case, root / f"{case}_resumed"]))
        resume = ["--output_dir", root / f"{case}_resumed", "--loop.resume_from_checkpoint", "latest"]
        jobs.append(("train-tokenizer", [*arguments, *resume]))
    run_on_two(*jobs, cwd=root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resume_is_exact(case, runs, assert_same_state, read_metrics):
    whole, resumed = runs / case, runs / f"{case}_resumed"
    assert_same_state(resumed, whole, step=6)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_metrics(resumed) == read_metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, runs, tokenizer_arguments, run_here, tmp_path, read_metrics):
    arguments = arguments_of(case, tokenizer_arguments)
    run_here(train, TokenizerTrainConfig, *arguments, "--output_dir", tmp_path / "alone")
    got, expected = (load_file(folder / "model.safetensors") for folder in (runs / case, tmp_path / "alone"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        # AdamW in float32 turns the rounding of a small gradient into a step of the learning rate's size.
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-4, msg=name)
    for line, other in zip(read_metrics(runs / case), read_metrics(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(other, rel=2e-3, abs=1e-4)
        has_digits = case in ("fsq", "lfq", "bsq", "bits", "product")
        assert any(name.endswith("codebook/lowest_digit_entropy") for name in line) == has_digits
