"""Fixtures of the commands' tests: saved pipelines, and jobs that are killed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nextblock import __main__ as cli
from nextblock.command_line import parse_run_config
from nextblock.data.digits import CLASS_NAMES
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTrainConfig

from ..conftest import NO_TRACKER, TINY_PRIOR, TINY_TOKENIZER
from .wrong_places import make_wrong_places


@pytest.fixture(scope="session")
def ten_class_pipeline_dir(tmp_path_factory) -> Path:
    """A saved pipeline of the ten digits, 32×32 pixels, as small as can be."""
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(image_size=32, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 2, 8]))
    config = BlockPriorConfig(
        layout=tokenizer.layout.to_dict(),
        embedding_dim=4,
        num_classes=10,
        class_names=list(CLASS_NAMES),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    ClassToImagePipeline(tokenizer=tokenizer, prior=BlockPrior(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits_pipeline_dir(tmp_path_factory) -> Path:
    """A saved pipeline of the shipped digits configs' sizes, untrained, its logits about as sharp as trained ones."""
    torch.manual_seed(0)
    models = {}
    for stage, config_class, folders in (
        ("tokenizer", TokenizerTrainConfig, ("output_dir",)),
        ("prior", PriorTrainConfig, ("tokens", "tokenizer", "output_dir", "pipeline_dir")),
    ):
        argv = ["--config", f"{stage}/digits-scales", *(f"--{name}={name}" for name in folders)]
        models[stage] = asdict(parse_run_config(config_class, command="test", argv=argv).model)
    models["prior"].pop("family")
    tokenizer = VQVAE(VQVAEConfig(**models["tokenizer"]))
    sizes = {name: getattr(tokenizer.config, name) for name in ("vocab_size", "embedding_dim")}
    sizes |= {"num_classes": 10, "class_names": list(CLASS_NAMES)}
    prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes, **models["prior"]))
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight.normal_()
        prior.head.weight.mul_(300)
    folder = tmp_path_factory.mktemp("digits")
    ClassToImagePipeline(tokenizer=tokenizer, prior=prior).save_pretrained(folder)
    return folder


@pytest.fixture
def run_killed_jobs():
    """Run a tokenization job, kill it and restart it; return the counts that killed_jobs.py prints last."""

    def run(root: Path, arguments: list[str], num_kills: int) -> dict:
        options = {"root": str(root), "arguments": arguments, "num_kills": num_kills, "seed": 5}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killed_jobs.py")), json.dumps(options)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def places(image_folder, tokenizer_dir, tokens_dir, tmp_path_factory) -> dict[str, str]:
    """Good and wrong places by name, and what trains on the good ones: `train_tokenizer`, `train_prior`."""
    root = tmp_path_factory.mktemp("places")
    tokenizer = VQVAE.from_pretrained(tokenizer_dir)
    sizes = {"vocab_size": 24, "embedding_dim": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), num_classes=3, **sizes))
    pipeline = root / "pipeline"
    ClassToImagePipeline(tokenizer=tokenizer, prior=prior).save_pretrained(pipeline)
    good = {"images": image_folder, "tokenizer": tokenizer_dir, "tokens": tokens_dir, "pipeline": pipeline}
    found = {name: shlex.quote(str(path)) for name, path in make_wrong_places(root, **good).items()}
    images = "--data.source folder --data.path {images}".format_map(found)
    once = "--loop.num_steps 1 --loop.save_every null"
    found["train_tokenizer"] = " ".join([*TINY_TOKENIZER, images, *NO_TRACKER, once, "--output_dir", found["new"]])
    outputs = "--pipeline_dir {new}_pipeline --output_dir {new}".format_map(found)
    found["train_prior"] = " ".join([*TINY_PRIOR, *NO_TRACKER, once, outputs])
    return found


@pytest.fixture
def refusal(places, capsys, fresh_accelerate, monkeypatch):
    """Run a command line with a mistake in it; return what it says, which is no traceback, and leave no file behind."""
    root = Path(shlex.split(places["new"])[0]).parent
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(typed: str) -> str:
        before = set(root.rglob("*"))
        argv = shlex.split(typed.format_map(places))
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        text = capsys.readouterr().err
        left = set(root.rglob("*")) - before
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        assert end.value.code == 2 and not left
        assert "error: " in text and "Traceback" not in text
        return text[text.index("error: ") :]

    return run
