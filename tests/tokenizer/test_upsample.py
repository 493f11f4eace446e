"""Doubling a map and convolving it: in one go where no gradient is wanted, else as the formula has it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nextblock.tokenizer.autoencoder import Upsample


def plainly(module: Upsample, x: torch.Tensor) -> torch.Tensor:
    """Double, then convolve, in float64."""
    doubled = x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(doubled, module.conv.weight.double(), module.conv.bias.double(), padding=1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Shapes that transposed convolutions were given."""
    calls, convolve = [], F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d", lambda x, *args, **kw: calls.append(x.shape) or convolve(x, *args, **kw))
    return calls


@pytest.mark.parametrize("is_channels_last", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (3, 16, 5, 2), (2, 4, 1, 3)])
def test_in_one_go_it_is_the_same_but_for_rounding(shape, is_channels_last, calls):
    torch.manual_seed(0)
    module, x = Upsample(shape[1]), torch.randn(shape)
    if is_channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got = module(x)
    torch.testing.assert_close(got, plainly(module, x).float(), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last) >= is_channels_last and len(calls) == 1


def test_gradients_autocast_other_types_and_adapters_take_the_plain_way(calls):
    torch.manual_seed(0)
    module, x = Upsample(8), torch.randn(2, 8, 3, 3)
    expected = module.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.equal(module(x), expected)
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        torch.testing.assert_close(module.double()(x.double()), plainly(module, x))
        module.conv = nn.Sequential(module.conv.float(), nn.Tanh())
        assert torch.equal(module(x), expected.tanh())
    assert not calls
