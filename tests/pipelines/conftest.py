"""Tiny pipelines whose logits are far from uniform, so that tokens tell rounding and guidance."""


import pytest
import torch

from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.text_encoder import load_text_encoder
from nextblock.tokenizer import VQVAE, VQVAEConfig

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
def text_encoder(text_encoder_dir):
    return load_text_encoder(text_encoder_dir, 7)


@pytest.fixture(scope="session")
def build_text_pipeline(text_encoder):
    """Build a pipeline whose prior listens to its prompt."""

    def make(has_encoder: bool = True, **options) -> TextToImagePipeline:
        torch.manual_seed(0)
        tokenizer = VQVAE(VQVAEConfig(image_size=16, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 2, 4]))
        sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "embedding_dim": 4, "adaln_gamma_init": 1.0}
        texts = {"text_dim": 8, "max_text_positions": 7}
        prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes, **(texts | options)))
        with torch.no_grad():
            prior.head.weight.normal_()
            tokenizer.quantizer.codebook.weight.normal_(std=5)
        given = {"text_encoder": text_encoder.model, "text_tokenizer": text_encoder.tokenizer} if has_encoder else {}
        pipe = TextToImagePipeline(tokenizer=tokenizer, prior=prior, **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
