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


@torch.no_grad()
def test_traced_graphs_compute_the_same_and_serve_all_blocks_and_layers(any_pipe, seeds):
    options = {"guidance_scale": 2.0, "guidance_schedule": "linear", "output_type": "np"}
    expected = any_pipe([0, 2], generator=seeds(2), **options).images
    traced = CompileCounter()
    any_pipe.compile(backend=traced)
    assert np.array_equal(any_pipe([0, 2], generator=seeds(2), **options).images, expected)
    # Before and after attention, each with one token a block and with a number that varies, and the decoder.
    assert 2 <= traced.frame_count <= 5
    num_graphs = traced.frame_count
    assert np.array_equal(any_pipe([0, 2], generator=seeds(2), **options).images, expected)
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
    [
        *({"mode": "fastest"}, {"backend": "none"}, {"speed": 9}, {"options": {"speed": 9}}, {"dynamic": "yes"}),
        {"fullgraph": True},
    ],
)
def test_options_that_torch_does_not_take_leave_the_pipeline_as_it_was(build_pipeline, options):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match=rf"options are \{{'{next(iter(options))}'.*; expected (those|no fullgraph)"):
        pipe.compile(**options)
    for module in (*pipe.prior.blocks, pipe.tokenizer.decoder):
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
