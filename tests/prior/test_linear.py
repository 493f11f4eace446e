"""Linear maps for few rows: the same numbers whichever way computes them, and gradients where they are wanted."""

import pytest
import torch
import torch.nn.functional as F

from nextblock.prior.linear import BiasedLinear, Linear, linear


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(8, 24), (512, 640), (640, 512)])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 1), (3, 1), (4, 1), (1, 5), (2, 8), (3, 40), (0,), ()])
@torch.no_grad()
def test_every_number_of_rows_gives_what_a_plain_product_gives(shape, num_inputs, num_outputs, has_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, num_inputs), torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    got = linear(x, weight, bias)
    assert got.shape == (*shape, num_outputs) and got.is_contiguous()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    strided = torch.randn(*shape, num_inputs, 2)[..., 0].copy_(x)
    torch.testing.assert_close(linear(strided, weight, bias), got, rtol=1e-4, atol=1e-4)


def test_with_gradient_it_is_the_plain_product_to_the_bit():
    torch.manual_seed(0)
    layer, x = Linear(512, 640), torch.randn(2, 512)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


@torch.no_grad()
def test_autocast_and_other_types_are_left_to_torch():
    torch.manual_seed(0)
    layer, x = Linear(512, 640), torch.randn(2, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and layer(x).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        layer, x = layer.to(dtype), x.to(dtype)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())


@torch.no_grad()
def test_a_row_of_small_weights_does_not_depend_on_the_others_nor_on_where_the_weights_lie():
    torch.manual_seed(0)
    layer, x = BiasedLinear(64, 192, bias=False), torch.randn(64, 64)
    whole, stored = layer(x), torch.empty(64 * 192 + 1)
    moved = stored[1:].view_as(layer.weight).copy_(layer.weight)
    for num_rows in (2, 3, 5, 16):
        assert torch.equal(layer(x[:num_rows]), whole[:num_rows])
        assert torch.equal(linear(x[:num_rows], moved), whole[:num_rows])


@pytest.mark.parametrize("num_rows", [1, 2, 8])
@torch.no_grad()
def test_it_compiles_into_one_graph(num_rows):
    layer, x = Linear(512, 640), torch.randn(num_rows, 1, 512)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
