"""Compiled on a GPU, sampling gives what it gave before, at every call; steps of tiles are captured as graphs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig, step_graphs
from nextblock.prior.family import compile_step
from nextblock.tokenizer import VQVAE, VQVAEConfig

from ..needs_gpu import CUDA, NEEDS_GPU

pytestmark = NEEDS_GPU
LAYOUTS = {
    "scales": {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2},
    "raster": {"layout": "tiles", "tile": 1},
}
MIN_AGREEMENT = 0.99


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def models(request) -> tuple[VQVAE, BlockPrior]:
    """A small tokenizer and prior on the GPU."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 32, "embedding_dim": 8, "vocab_size": 64, "codebook_init_scale": 1.0}
    tokenizer = VQVAE(VQVAEConfig(**sizes, **request.param)).to(CUDA).eval()
    layout: BlockLayout = tokenizer.layout
    sizes = {"vocab_size": 64, "embedding_dim": 8, "num_classes": 4, "hidden_size": 64, "num_layers": 2, "num_heads": 2}
    prior = BlockPrior(BlockPriorConfig(layout=layout.to_dict(), adaln_gamma_init=1.0, **sizes)).to(CUDA).eval()
    return tokenizer, prior


def share_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the share of equal tokens."""
    pairs = zip(got, expected, strict=True)
    equal = torch.cat([(a == b).flatten() for a, b in pairs])
    return equal.float().mean().item()


@pytest.fixture
def captures(monkeypatch) -> list[torch.device]:
    """Devices on which graphs were captured."""
    captures, capture = [], step_graphs._captured
    monkeypatch.setattr(step_graphs, "_captured", lambda run, device: captures.append(device) or capture(run, device))
    return captures


@pytest.mark.parametrize("captures_graphs", [False, True], ids=["launched", "captured"])
def test_two_calls_of_compiled_layers_are_those_before(models, captures_graphs, captures):
    tokenizer, prior = models
    calls = [torch.tensor([0, 1, 2, 3], device=CUDA), torch.tensor([3, 3, 0, 2], device=CUDA)]

    def sample(class_labels):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return prior.generate(class_labels, tokenizer.quantizer, generator=generators, guidance_scale=2.0)

    expected = [sample(class_labels) for class_labels in calls]
    compile_step(prior, captures_graphs=captures_graphs)
    for _ in range(2):
        got = [sample(class_labels) for class_labels in calls]
        # The first call's tokens must not be what the second wrote over them.
        for tokens, own in zip(got, expected, strict=True):
            assert share_equal(tokens, own) >= MIN_AGREEMENT
    assert len(captures) == (4 if captures_graphs and not prior.layout.is_scales else 0)


def test_two_calls_of_a_compiled_pipeline_are_those_before_and_so_are_threads(models, captures):
    pipelines = pytest.importorskip("nextblock.pipelines", reason="diffusers is not installed", exc_type=ImportError)
    tokenizer, prior = models
    pipe = pipelines.ClassToImagePipeline(tokenizer=tokenizer, prior=prior)
    pipe.set_progress_bar_config(disable=True)

    def sample(labels):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipe(labels, generator=generators, guidance_scale=2.0, output_type="latent").images

    calls = [0, 1, 2, 3], [3, 3, 0, 2]
    expected = [sample(labels) for labels in calls]
    pipe.compile()
    for _ in range(2):
        got = [sample(labels) for labels in calls]
        for tokens, own in zip(got, expected, strict=True):
            assert share_equal(tokens, own) >= MIN_AGREEMENT
    num_requests = 0 if prior.layout.is_scales else 4
    assert len(captures) == num_requests
    with ThreadPoolExecutor(2) as threads:
        for got, own in zip(threads.map(sample, calls), expected, strict=True):
            assert all(share_equal(*pair) >= MIN_AGREEMENT for pair in zip(got, own, strict=True))
