"""Steps as graphs, with a stand-in for CUDA's: what a graph reads is copied to it, or lies where it lay."""

import gc
import weakref

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import (
    BlockPrior,
    BlockPriorConfig,
    GPTPrior,
    GPTPriorConfig,
    LlamaPrior,
    LlamaPriorConfig,
    RARPrior,
    RARPriorConfig,
    causal_layers,
    layers,
    step_graphs,
)
from nextblock.prior.family import compile_step
from nextblock.prior.step_graphs import NUM_PLAIN_CALLS, StepGraphs, StepStack
from nextblock.tokenizer import LearnedCodebook, Quantizer, TileCodec

SIZES = {"vocab_size": 11, "num_classes": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
CODES = {"input_embedding": "codes", "embedding_dim": 4}
RASTER, ROWS = BlockLayout.tiles(1, 3), BlockLayout.tiles((1, 4), (6, 4))
FAMILIES = {
    "raster": (BlockPrior, BlockPriorConfig, RASTER, {"input_embedding": "tokens", "embedding_dim": 4}),
    "rows": (BlockPrior, BlockPriorConfig, ROWS, CODES),
    "llama": (LlamaPrior, LlamaPriorConfig, RASTER, {}),
    "gpt": (GPTPrior, GPTPriorConfig, RASTER, {}),
    "rar": (RARPrior, RARPriorConfig, RASTER, {}),
}


@pytest.fixture
def captures(monkeypatch) -> list[torch.device]:
    """Let a CPU capture: a launch runs the step as it was at its capture, and writes to the result of then."""
    captures = []

    def captured(launch, device):
        result = launch()
        captures.append(device)
        return lambda: result.copy_(launch()), result

    monkeypatch.setattr(step_graphs, "_captured", captured)
    monkeypatch.setattr(StepStack, "_can_capture", lambda self, x: not torch.is_grad_enabled())
    for module in (layers, causal_layers):
        monkeypatch.setattr(module, "is_whole_cache_read", lambda x: True)
    return captures


@pytest.fixture(params=FAMILIES)
def models(request):
    """A quantizer, and a prior of each family whose every part has a say."""
    family, config, layout, options = FAMILIES[request.param]
    torch.manual_seed(0)
    prior = family(config(layout=layout.to_dict(), **SIZES | options)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(std=0.3)
    return Quantizer(TileCodec(layout), LearnedCodebook(11, 4)).eval(), prior


@torch.no_grad()
def test_every_familys_steps_are_captured_once_a_request_and_give_the_same_tokens(models, captures):
    quantizer, prior = models
    guidance = {"guidance_scale": 3.0} if prior.conditions.has_null else {}

    def sample(labels):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
        return torch.cat(prior.generate(torch.tensor(labels), quantizer, generator=generators, **guidance), dim=1)

    calls = [0, 2], [1, 1, 0], [0, 2]
    expected = [sample(labels) for labels in calls]
    for module in prior.modules():
        if isinstance(module, StepStack):
            module.captures_graphs = True
    assert not captures
    for labels, tokens in zip(calls, expected, strict=True):
        assert torch.equal(sample(labels), tokens)
    assert len(captures) == len(calls)


@torch.no_grad()
def test_rows_that_are_dropped_make_a_graph_of_their_own_and_a_request_frees_its_graphs(captures, monkeypatch):
    torch.manual_seed(0)
    prior = BlockPrior(BlockPriorConfig(layout=ROWS.to_dict(), **SIZES | CODES)).eval()
    prior.blocks.captures_graphs = True
    context = prior.context(prior.conditions.of(torch.tensor([0, 1, 2, 3])))
    conditional, content = context.first(2), torch.randn(2, 4, 4)

    def hidden(cache, num_guided):
        return [
            prior.decode_block(content * k if k else None, k, context if k < num_guided else conditional, cache)
            for k in range(6)
        ]

    cache = prior.new_cache(4)
    got = hidden(cache, 3)
    assert len(captures) == 2
    prior.blocks.captures_graphs = False
    for each, expected in zip(got, hidden(prior.new_cache(4), 3), strict=True):
        torch.testing.assert_close(each, expected)
    graphs = weakref.ref(cache.step_graphs)
    del cache
    gc.collect()
    assert graphs() is None


@torch.no_grad()
def test_what_changes_is_copied_and_what_is_replaced_is_captured_anew(captures):
    weight, other, graphs, results = torch.ones(2), torch.full((2,), 5.0), StepGraphs(), []
    for k in range(5):
        x = torch.full((2,), float(k))
        results.append(graphs.run(lambda x, kept: x * kept[0], (x, (weight, None)), "key"))
    weight.fill_(2)
    results.append(graphs.run(None, (torch.ones(2), (weight, None)), "key"))
    assert [result[0].item() for result in results] == [0, 1, 2, 3, 4, 2] and len(captures) == 1
    for _ in range(NUM_PLAIN_CALLS + 2):
        assert graphs.run(lambda x, kept: x * kept[0], (torch.ones(2), (other, None)), "key")[0] == 5
    assert len(captures) == 2


def test_scales_gradients_and_a_cpu_are_never_captured(monkeypatch):
    monkeypatch.setattr(step_graphs, "_captured", None)
    for layout in (BlockLayout.scales([1, 2, 3, 4]), ROWS):
        prior = BlockPrior(BlockPriorConfig(layout=layout.to_dict(), **SIZES | CODES)).eval()
        compile_step(prior, captures_graphs=True, backend="eager")
        assert prior.blocks.captures_graphs
        prior.blocks._compiled_call_impl = None
        if layout.is_scales:
            monkeypatch.setattr(StepStack, "_can_capture", lambda self, x: True)
        context, cache = prior.context(prior.conditions.of(torch.tensor([0]))), prior.new_cache(1)
        with torch.set_grad_enabled(not layout.is_scales):
            for k, length in enumerate(layout.block_lengths):
                prior.decode_block(torch.randn(1, length, 4) if k else None, k, context, cache)
        monkeypatch.undo()
        monkeypatch.setattr(step_graphs, "_captured", None)
