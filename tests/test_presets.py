"""Shipped configs: each parses as the run it is for, and the VAR presets have the published sizes."""

from dataclasses import asdict
from math import prod
from pathlib import Path

import pytest
import torch

from nextblock.command_line import parse_run_config
from nextblock.data.blocks import BlockLayout
from nextblock.evaluate import EvaluateConfig
from nextblock.evaluate_tokenizer import EvaluateTokenizerConfig
from nextblock.prior import BlockPrior, LlamaPrior, RARPrior
from nextblock.prior.families import FAMILIES, family_config
from nextblock.prior.llamagen_checkpoint import llamagen_sampling
from nextblock.prior.rar_checkpoint import rar_sampling
from nextblock.prior.task import PriorTrainConfig
from nextblock.sample import SampleConfig
from nextblock.tokenize_images import TokenizeConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = {
    "tokenizer/evaluate": (EvaluateTokenizerConfig, ["--tokenizer=t", "--output_dir=o"]),
    "tokenizer/tokenize": (TokenizeConfig, ["--tokenizer=t", "--output_dir=o"]),
    "tokenizer/": (TokenizerTrainConfig, ["--output_dir=o"]),
    "prior/": (PriorTrainConfig, ["--tokens=t", "--tokenizer=t", "--output_dir=o", "--pipeline_dir=p"]),
    "pipelines/sample": (SampleConfig, ["--pipeline=p", "--output_dir=o"]),
    "pipelines/evaluate": (EvaluateConfig, ["--pipeline=p", "--samples=s", "--run_dirs=[]", "--output_dir=o"]),
}
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
# Read by the launcher, not by a run: tests/training/test_launch_configs.py.
NAMES = [name for name in NAMES if not name.startswith("accelerate/")]
# Of the tokenizers that priors with a head of digits go with.
CODE_BASES = {"prior/digits-fsq": [8, 5, 5, 5], "prior/emoji-32": [8, 5, 5, 5, 4]}
SCALES_256 = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
SCALES_512 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]


def parse(name: str):
    """Read a shipped config as a user does, by its name."""
    config_class, required = next(run for prefix, run in RUNS.items() if name.startswith(prefix))
    return parse_run_config(config_class, command="test", argv=["--config", name, *required])


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_parses_as_its_run(name):
    config = parse(name)
    if isinstance(config, TokenizerTrainConfig):
        VQVAEConfig(**asdict(config.model))
    if isinstance(config, PriorTrainConfig):
        takes_codes = getattr(config.model, "input_embedding", None) == "codes"
        layout = BlockLayout.scales([1, 2, 4, 8]) if takes_codes else BlockLayout.tiles(1, 8)
        bases = CODE_BASES.get(name)
        tokens = {"vocab_size": prod(bases), "code_bases": bases} if bases else {}
        family_config(config.model, layout=layout.to_dict(), **tokens)


@pytest.mark.parametrize(
    ("name", "scales", "millions"),
    [
        ("var-d16", SCALES_256, 310.3),
        ("var-d20", SCALES_256, 600.9),
        ("var-d24", SCALES_256, 1033.4),
        ("var-d30", SCALES_256, 2010.0),
        ("var-d36-512", SCALES_512, 2353.9),
    ],
)
def test_var_presets_have_the_published_sizes(name, scales, millions):
    sizes = {"vocab_size": 4096, "embedding_dim": 32, "num_classes": 1000}
    config = family_config(parse(f"prior/{name}").model, layout=BlockLayout.scales(scales).to_dict(), **sizes)
    with torch.device("meta"):
        model = BlockPrior(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(("name", "millions"), [("b", 260.92), ("l", 461.67), ("xl", 955.43), ("xxl", 1498.52)])
def test_rar_presets_have_the_published_sizes_and_sampling(name, millions):
    """Published: 261, 461, 955 and 1499 million."""
    run = parse(f"prior/rar-{name}")
    tokens = {"vocab_size": 1024, "num_classes": 1000, "layout": BlockLayout.tiles(1, 16).to_dict()}
    config = family_config(run.model, **tokens)
    with torch.device("meta"):
        model = RARPrior(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.005)
    assert run.sampling == rar_sampling(config)


@pytest.mark.parametrize(
    ("name", "millions"), [("b", 110.89), ("l", 342.91), ("xl", 774.70), ("xxl", 1410.97), ("3b", 3096.66)]
)
def test_llamagen_presets_have_the_published_sizes_and_sampling(name, millions):
    """Published: 111, 343 and 775 million, 1.4 and 3.1 billion."""
    run = parse(f"prior/llamagen-{name}")
    tokens = {"vocab_size": 16384, "num_classes": 1000, "layout": BlockLayout.tiles(1, 16).to_dict()}
    config = family_config(run.model, **tokens)
    with torch.device("meta"):
        model = LlamaPrior(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.005)
    assert run.sampling == llamagen_sampling(config) and run.loop.num_steps == 300 * (1281167 // 256)


def test_the_digits_priors_are_of_one_size():
    """Priors of single tokens, side by side in the README."""
    sizes = []
    for name in ("digits-raster", "digits-llama", "digits-rar"):
        run = parse(f"prior/{name}")
        tokens = {"vocab_size": 128, "embedding_dim": 16, "num_classes": 10}
        config = family_config(run.model, layout=BlockLayout.tiles(1, 8).to_dict(), **tokens)
        with torch.device("meta"):
            sizes.append(FAMILIES[run.model.family](config).num_parameters())
        assert (run.loop.num_steps, run.loop.batch_size) == (760, 32)
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize(("name", "scales"), [("var-256", SCALES_256), ("var-512", SCALES_512)])
def test_var_tokenizer_presets_have_the_published_sizes(name, scales):
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig(**asdict(parse(f"tokenizer/{name}").model)))
    assert model.layout == BlockLayout.scales(scales)
    assert model.num_parameters() / 1e6 == pytest.approx(108.95, rel=1e-3)
