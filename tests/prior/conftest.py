"""Fixtures of the prior's tests: layouts for every attention path, and tiny models whose every part has a say."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.heads import output_projection
from nextblock.tokenizer import LearnedCodebook, Quantizer, ScaleCodec, TileCodec

LAYOUTS = {
    "scales": BlockLayout.scales([1, 2, 3]),
    "scales not square": BlockLayout.scales([1, (2, 3), (3, 4)]),
    "single tokens": BlockLayout.tiles(1, 3),
    "rows": BlockLayout.tiles((1, 4), (3, 4)),
    "many blocks": BlockLayout.tiles((1, 2), (6, 6)),
    "one block": BlockLayout.scales([2]),
}
VOCAB_SIZE, EMBEDDING_DIM = 11, 4
INPUTS = {
    f"{name}, {kind}": (layout, kind)
    for name, layout in LAYOUTS.items()
    for kind in (["codes"] if layout.is_scales else ["codes", "tokens"])
}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "embedding_dim": EMBEDDING_DIM,
    "num_classes": 3,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> BlockLayout:
    """Each layout in turn: one call a block, one causal call, and one masked call are all among them."""
    return request.param


@pytest.fixture(params=INPUTS.values(), ids=INPUTS.keys())
def layout_and_input(request) -> tuple[BlockLayout, str]:
    """Each layout with each input embedding that it allows."""
    return request.param


@pytest.fixture
def make_prior():
    """Build a tiny float64 prior in evaluation mode.

    A fresh prior's gates and head are near zero, which hides mistakes: unless `is_fresh`, all weights are drawn anew.
    """

    def make(layout: BlockLayout, seed: int = 0, is_fresh: bool = False, **options) -> BlockPrior:
        torch.manual_seed(seed)
        model = BlockPrior(BlockPriorConfig(layout=layout.to_dict(), **SIZES | options)).double().eval()
        if is_fresh:
            return model
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_matrix = name.endswith("weight") and "emb" not in name
                drawn = torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if is_matrix else 0.5)
                parameter.copy_(1.4 + 0.2 * drawn if "scale_mul" in name else drawn)
            output_projection(model.head).weight.mul_(2)
        return model

    return make


@pytest.fixture
def make_quantizer():
    """Build a tokenizer's float64 quantizer for a layout."""

    def make(layout: BlockLayout, seed: int = 0):
        torch.manual_seed(seed)
        codebook = LearnedCodebook(VOCAB_SIZE, EMBEDDING_DIM, init_scale=1.0)
        codec = ScaleCodec(layout, EMBEDDING_DIM) if layout.is_scales else TileCodec(layout)
        return Quantizer(codec, codebook).double().eval()

    return make


@pytest.fixture
def make_indices():
    """Draw random indices for a layout, K tensors (batch, L_k)."""

    def make(layout: BlockLayout, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return layout.split(torch.randint(VOCAB_SIZE, (batch, layout.num_tokens), generator=generator))

    return make


@pytest.fixture
def teacher_input():
    """Give the input that a prior takes under teacher forcing: vectors, or the indices of the tile before."""

    def give(model: BlockPrior, quantizer, idx_Bl: list[torch.Tensor]) -> torch.Tensor:
        if model.config.input_embedding == "tokens":
            return torch.cat([idx_Bl[0][:, :0], *idx_Bl[:-1]], dim=1)
        return quantizer.var_input(torch.cat(list(idx_Bl), 1)).detach()

    return give
