"""A compiled pipeline samples what it sampled before, and compiles few graphs for all its blocks and layers."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter


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
