"""Tiny pipelines whose logits are far from uniform, so that tokens tell rounding and guidance."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nextblock.command_line import parse_run_config
from nextblock.data.digits import CLASS_NAMES
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.task import PriorTrainConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.task import TokenizerTrainConfig

LAYOUTS = {
    "scales": {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2},
    "rows": {"layout": "tiles", "tile": [1, 4]},
}


@pytest.fixture(scope="session")
def build_pipeline():
    """Build a pipeline of 16×16 images, 12 codes and three blocks of scales or four of rows."""

    def build(layout: str = "scales", num_classes: int = 3) -> ClassToImagePipeline:
        torch.manual_seed(0)
        sizes = {"vocab_size": 12, "embedding_dim": 8}
        tokenizer = VQVAE(
            VQVAEConfig(image_size=16, hidden_dim=16, codebook_init_scale=0.5, **sizes, **LAYOUTS[layout])
        ).eval()
        prior = BlockPrior(
            BlockPriorConfig(
                layout=tokenizer.layout.to_dict(),
                num_classes=num_classes,
                class_names=["blue tit", "great tit", "wren"] if num_classes else None,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                adaln_gamma_init=1.0,
                **sizes,
            )
        ).eval()
        with torch.no_grad():
            prior.head.weight.mul_(100)
            prior.class_emb.weight.mul_(5)
        pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(params=LAYOUTS)
def any_pipe(request, build_pipeline) -> ClassToImagePipeline:
    """A pipeline of each layout in turn."""
    return build_pipeline(request.param)


@pytest.fixture
def seeds():
    """Give generators of their own to images first, first + 1, …."""

    def give(count: int, first: int = 0) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(1000 + seed) for seed in range(first, first + count)]

    return give


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
        argv = ["--config", f"{stage}/digits-scales", *(f"--{name}=unused" for name in folders)]
        models[stage] = asdict(parse_run_config(config_class, command="test", argv=argv).model)
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
