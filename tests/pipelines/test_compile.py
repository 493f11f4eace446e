"""A compiled pipeline samples what it sampled before, and compiles few graphs for all its blocks and layers."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nextblock.prior import step_graphs
from nextblock.prior.step_graphs import StepStack


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("layout", "num_step_graphs"), [("scales", (2, 3)), ("rows", (1, 1))])
@torch.no_grad()
def test_a_step_is_one_graph_that_serves_all_blocks(layout, num_step_graphs, build_pipeline, seeds):
    pipe = build_pipeline(layout)
    options = {"guidance_scale": 2.0, "guidance_schedule": "linear", "output_type": "np"}
    expected = pipe([0, 2], generator=seeds(2), **options).images
    others = pipe([1, 1], generator=seeds(2, first=5), **options).images
    traced = CompileCounter()
    pipe.compile(backend=traced, fullgraph=True)
    assert np.array_equal(pipe([0, 2], generator=seeds(2), **options).images, expected)
    # Blocks that differ in length share a graph of symbols after the first, and the decoder has its own.
    fewest, most = num_step_graphs
    assert fewest + 1 <= traced.frame_count <= most + 1
    num_graphs = traced.frame_count
    assert np.array_equal(pipe([1, 1], generator=seeds(2, first=5), **options).images, others)
    assert np.array_equal(pipe([0, 2], generator=seeds(2), **options).images, expected)
    assert traced.frame_count == num_graphs


@pytest.mark.slow
def test_inductor_computes_the_same_but_for_rounding(any_pipe, seeds):
    expected = any_pipe([0, 1, 2], num_images_per_label=8, generator=seeds(24), output_type="latent").images
    pictures = any_pipe.reconstruct(any_pipe(1, generator=seeds(1)).images[0], output_type="np").images
    any_pipe.compile()
    got = any_pipe([0, 1, 2], num_images_per_label=8, generator=seeds(24), output_type="latent").images
    num_equal = sum(int((a == b).sum()) for a, b in zip(got, expected, strict=True))
    assert num_equal >= 0.99 * sum(idx.numel() for idx in expected)
    again = any_pipe.reconstruct(any_pipe(1, generator=seeds(1)).images[0], output_type="np").images
    assert np.abs(again - pictures).max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [{"mode": "fastest"}, {"backend": "none"}, {"speed": 9}, {"options": {"speed": 9}}, {"dynamic": "yes"}],
)
def test_options_that_torch_does_not_take_leave_the_pipeline_as_it_was(build_pipeline, options):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match=rf"options are \{{'{next(iter(options))}'.*; expected those"):
        pipe.compile(**options)
    for module in (pipe.prior.blocks, pipe.tokenizer.decoder):
        assert module._compiled_call_impl is None


def test_a_compiled_pipeline_is_saved_as_before(build_pipeline, tmp_path):
    pipe = build_pipeline()
    pipe.compile(backend="eager")
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    for name in ("prior", "tokenizer"):
        expected = getattr(pipe, name).state_dict()
        got = getattr(loaded, name).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


@torch.no_grad()
def test_compiled_steps_that_are_captured_give_the_same_in_every_call_and_thread(build_pipeline, seeds, monkeypatch):
    captures = []

    def captured(launch, device):  # A CPU's stand-in: runs the step as it was at its capture.
        result = launch()
        captures.append(device)
        return lambda: result.copy_(launch()), result

    monkeypatch.setattr(step_graphs, "_captured", captured)
    monkeypatch.setattr(StepStack, "_can_capture", lambda self, x: True)
    pipe, options = build_pipeline("rows"), {"guidance_scale": 2.0, "output_type": "np"}

    def sample(labels):
        return pipe(labels, generator=seeds(2), **options).images

    calls = [0, 2], [1, 1]
    expected = [sample(labels) for labels in calls]
    pipe.compile(backend="eager", fullgraph=True)
    for labels, images in zip(calls * 2, expected * 2, strict=True):
        assert np.array_equal(sample(labels), images)
    assert len(captures) == 4
    with ThreadPoolExecutor(2) as threads:
        for got, images in zip(threads.map(sample, calls * 3), expected * 3, strict=True):
            assert np.array_equal(got, images)
    assert len(captures) == 10


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_graphs_are_not_captured_inside_of_inductors(options, build_pipeline):
    pipe = build_pipeline("rows")
    with pytest.raises(ValueError, match="captures_graphs is True, options are .*; expected None, False, or True"):
        pipe.compile(captures_graphs=True, **options)
    assert pipe.prior.blocks._compiled_call_impl is None
    pipe.compile(**options)
    assert not pipe.prior.blocks.captures_graphs
    pipe.compile(backend="eager")
    assert pipe.prior.blocks.captures_graphs
    pipe.compile(captures_graphs=False, backend="eager")
    assert not pipe.prior.blocks.captures_graphs
