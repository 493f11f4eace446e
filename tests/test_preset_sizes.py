"""The table of the presets' sizes is true, and every preset takes two steps at its real width."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_prior import train as train_prior
from nextblock.train_tokenizer import train as train_tokenizer

ROOT = Path(__file__).parent.parent
PRESETS = runpy.run_path(str(ROOT / "benchmarks" / "presets.py"))
NAMES = PRESETS["names"]()
LARGE = [name for name in NAMES if name.split("/")[1].split("-")[0] in ("var", "rar", "llamagen")]
TABLE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
STEPS = """
    --loop.num_steps 2 --loop.batch_size 2 --loop.cpu true --loop.mixed_precision no --loop.num_workers 0
    --loop.save_every 2 --loop.eval_every 2 --loop.ema_decay null --loop.tracker null --optimizer.warmup_steps 0
    --data.source folder --data.eval_split null
""".split()


def test_the_table_has_every_preset():
    assert TABLE.startswith(PRESETS["TEXT"])
    lines = TABLE.removeprefix(PRESETS["TEXT"]).splitlines()
    assert [line.split("`")[1] for line in lines] == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_small_presets_are_as_the_table_says(name):
    assert PRESETS["row"](name) in TABLE.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_presets_are_as_the_table_says(name):
    assert PRESETS["row"](name) in TABLE.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tokenizer/")])
def test_every_tokenizer_takes_two_steps_at_its_real_width(name, image_folder, tmp_path, run_here):
    model, _ = PRESETS["build"](name)
    # Of the smallest image that has a grid of two cells a side.
    factor = model.config.image_size[0] // model.layout.grid[0]
    size = ["--model.image_size", 2 * factor, "--num_init_images", 4, "--transform.resize_ratio", 1]
    if model.layout.is_scales:
        size += ["--model.scales", "[1,2]"]
    else:
        size += ["--model.tile", "[1,2]"]
    started = ["--discriminator.start_step", 0, "--discriminator.generator_start_step", 1] if "gan" in name else []
    started += ["--discriminator.num_layers", 1] if "gan" in name else []
    options = [*STEPS, *size, *started, "--data.path", image_folder, "--output_dir", tmp_path]
    run_here(train_tokenizer, TokenizerTrainConfig, "--config", name, *options)
    assert is_trained(tmp_path)
    assert VQVAE.from_pretrained(tmp_path).config.hidden_dim == model.config.hidden_dim


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("prior/")])
def test_every_prior_takes_two_steps_at_its_real_width(name, image_folder, tmp_path, run_here):
    model, _ = PRESETS["build"](name)
    torch.manual_seed(0)
    sizes = {"vocab_size": model.vocab_size, "embedding_dim": model.embedding_dim or 4}
    layout = {"layout": "scales", "scales": [1, 2]} if model.layout.is_scales else {"tile": [1, 2]}
    layout = {"tile": 1} if model.layout.is_single_tokens else layout
    bases = getattr(model.config, "code_bases", None)
    rule = {} if bases is None else {"codebook": "fsq", "fsq_levels": bases}
    tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_dim=8, **sizes, **layout, **rule))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = ["--output_dir", tmp_path / "run", "--pipeline_dir", tmp_path / "pipeline"]
    # Two layers of it: all of the largest would take 38 GB of weights.
    options = [*STEPS, "--model.num_layers", 2, "--num_pictures_per_class", 1, "--data.path", image_folder]
    options += ["--samples_views", "false"]
    run_here(train_prior, PriorTrainConfig, "--config", name, *options, "--tokenizer", tmp_path / "tokenizer", *folders)
    assert is_trained(tmp_path / "run")


def is_trained(folder: Path) -> bool:
    """Tell whether a run has taken two steps and its losses are numbers."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if name.endswith("loss")]
    return lines[-1]["step"] == 2 and all(loss == loss and abs(loss) < 1e4 for loss in losses)
