"""Attention over blocks against a naive masked softmax, on each of the ways it is computed."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.prior.attention import MAX_CALLS_PER_ATTENTION, attention, block_causal_attention

HEADS = 3
PATHS = {
    "a call a block": (BlockLayout.scales([1, 2, 3]), {"calls": 3, "is_causal": False, "has_mask": False}),
    "sixteen calls": (BlockLayout.tiles((1, 2), (4, 8)), {"calls": 16, "is_causal": False, "has_mask": False}),
    "one causal call": (BlockLayout.tiles(1, (2, 5)), {"calls": 1, "is_causal": True, "has_mask": False}),
    "one masked call": (BlockLayout.tiles((1, 2), (6, 6)), {"calls": 1, "is_causal": False, "has_mask": True}),
    "one block": (BlockLayout.scales([3]), {"calls": 1, "is_causal": False, "has_mask": False}),
}
all_paths = pytest.mark.parametrize(("layout", "expected"), PATHS.values(), ids=PATHS.keys())


def random_qkv(layout, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, layout.num_tokens, 4, generator=generator, dtype=dtype) for _ in range(3)]


def naive_attention(q, k, v, layout, scale):
    """One query at a time, over the keys of its own block and all before."""
    out = torch.empty_like(q)
    for start, end in layout.bounds:
        for i in range(start, end):
            weights = ((q[:, :, i, None] * k[:, :, :end]).sum(-1) * scale).softmax(-1)
            out[:, :, i] = (weights[..., None] * v[:, :, :end]).sum(2)
    return out


@all_paths
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_attention_against_a_naive_masked_softmax(layout, expected, scale):
    q, k, v = random_qkv(layout)
    out = block_causal_attention(q, k, v, layout, scale)
    torch.testing.assert_close(out, naive_attention(q, k, v, layout, scale), rtol=1e-12, atol=1e-12)


@all_paths
def test_each_layout_takes_its_path(layout, expected, monkeypatch):
    seen = []

    def recording(q, k, v, attn_mask=None, is_causal=False, scale=None):
        seen.append({"is_causal": is_causal, "has_mask": attn_mask is not None})
        assert attn_mask is None or attn_mask.is_floating_point()
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    block_causal_attention(*random_qkv(layout), layout, 1.0)
    assert len(seen) == expected["calls"] <= MAX_CALLS_PER_ATTENTION
    assert all(call == {"is_causal": expected["is_causal"], "has_mask": expected["has_mask"]} for call in seen)


@all_paths
def test_attention_sends_no_gradient_back_from_later_blocks(layout, expected):
    q, k, v = (tensor.requires_grad_() for tensor in random_qkv(layout))
    out = block_causal_attention(q, k, v, layout, 0.5)
    for start, end in layout.bounds:
        gradients = torch.autograd.grad(out[:, :, start:end].square().sum(), (q, k, v), retain_graph=True)
        assert all(not gradient[:, :, end:].any() for gradient in gradients)
        assert gradients[2][:, :, :end].abs().amin(dim=(0, 1, 3)).min() > 0


def test_attention_in_bfloat16_stays_close():
    for layout, _ in PATHS.values():
        q, k, v = random_qkv(layout)
        low = block_causal_attention(*(t.bfloat16() for t in (q, k, v)), layout, 0.5)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.double(), naive_attention(q, k, v, layout, 0.5), rtol=0.05, atol=0.05)


@all_paths
def test_attention_in_bfloat16_has_the_fused_kernels_gradients(layout, expected):
    q, k, v = (tensor.bfloat16().requires_grad_() for tensor in random_qkv(layout))
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = torch.autograd.grad((block_causal_attention(q, k, v, layout, 0.5) * weights).sum(), (q, k, v))
    is_seen = layout.block_causal_bias(q.device, torch.float32) == 0
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    out = F.scaled_dot_product_attention(*exact, attn_mask=is_seen, scale=0.5)
    for low, high in zip(got, torch.autograd.grad((out * weights).sum(), exact), strict=True):
        assert low.dtype == torch.bfloat16
        assert (low.double() - high).norm() < 0.02 * high.norm()


@pytest.mark.parametrize(
    ("dtype", "is_fused"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)], ids=str
)
def test_half_precision_on_a_cpu_takes_products_of_its_own(dtype, is_fused, monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw))
    q, k, v = random_qkv(BlockLayout.tiles(1, (2, 3)), dtype)
    attention(q, k, v, 0.5)
    block_causal_attention(q, k, v, BlockLayout.tiles(1, (2, 3)), 0.5)
    assert bool(calls) == is_fused
