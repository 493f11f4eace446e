"""Fixtures of the tokenizer's tests: tiny models of every layout, images, finite differences."""

import pytest
import torch

from nextblock.tokenizer import VQVAE, VQVAEConfig

LAYOUTS = {
    "scales": {"image_size": 16, "layout": "scales", "scales": [1, 2, 4], "num_phi": 3},
    "scales not square": {
        "image_size": [16, 24],
        "layout": "scales",
        "scales": [1, [2, 3], [4, 6]],
        "num_phi": 1,
    },
    "raster": {"image_size": 16, "tile": 1},
    "rows": {"image_size": [16, 24], "tile": [1, 6]},
    "quadrants": {"image_size": 16, "tile": 2},
    "patches not square": {"image_size": [16, 24], "tile": [4, 2]},
}
SIZES = {"hidden_dim": 8, "vocab_size": 24, "embedding_dim": 4, "codebook_init_scale": 0.3}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout_options(request) -> dict:
    """The configuration of each layout in turn."""
    return dict(request.param)


@pytest.fixture
def make_vqvae():
    """Build a tiny tokenizer in evaluation mode."""

    def make(seed: int = 0, **options) -> VQVAE:
        torch.manual_seed(seed)
        return VQVAE(VQVAEConfig(**SIZES | options)).eval()

    return make


@pytest.fixture
def make_images():
    """Draw random images that fit a tokenizer, (batch, 3, H, W) in [-1, 1]."""

    def make(model: VQVAE, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 2 * torch.rand(batch, 3, *model.config.image_size, generator=generator, dtype=dtype) - 1

    return make


@pytest.fixture
def finite_differences():
    """Take central differences of a scalar function of a float64 tensor."""

    def differentiate(function, tensor: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
        gradient = torch.empty_like(tensor)
        for i in range(tensor.numel()):
            shift = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            shift[i] = step
            shift = shift.view_as(tensor)
            gradient.view(-1)[i] = (function(tensor + shift) - function(tensor - shift)) / (2 * step)
        return gradient

    return differentiate
