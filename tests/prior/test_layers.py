"""The prior's layers: projections, modulation, stochastic depth, the cache."""

import math

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.prior.layers import (
    BlockAttention,
    CachedAttention,
    FeedForward,
    KeyValueCache,
    ModulatedHead,
    PriorLayer,
    dropped_path,
)

from .test_attention import naive_attention

D, HEADS = 12, 3
SHARED_OR_NOT = pytest.mark.parametrize("use_shared_adaln", [False, True], ids=["separate", "shared"])


def make_layer(seed=0, **options) -> PriorLayer:
    torch.manual_seed(seed)
    defaults = {
        "use_shared_adaln": False,
        "use_normalized_attention": False,
        "attention_scale": 1.0,
        "norm_eps": 1e-6,
        "dropout": 0.0,
        "drop_path": 0.0,
    }
    layer = PriorLayer(D, HEADS, 2 * D, **defaults | options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def one_block_attention(layer):
    def attend(q, k, v):
        return naive_attention(q, k, v, BlockLayout.scales([(1, q.shape[2])]), layer.attn.scale)

    return attend


def test_plain_attention_has_biases_on_queries_and_values_and_none_on_keys():
    torch.manual_seed(0)
    attention = BlockAttention(D, HEADS, is_normalized=False, attention_scale=0.25, dropout=0.0).double()
    assert attention.scale == 0.25 / math.sqrt(D // HEADS)
    with torch.no_grad():
        attention.q_bias.normal_()
        attention.v_bias.normal_()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    q, k, v = attention.queries_keys_values(x)
    weights = attention.mat_qkv.weight.split(D)
    for got, weight, bias in zip((q, k, v), weights, (attention.q_bias, 0, attention.v_bias), strict=True):
        expected = (x @ weight.T + bias).view(2, 5, HEADS, D // HEADS).transpose(1, 2)
        torch.testing.assert_close(got, expected)


def test_normalised_attention_has_a_temperature_a_head_of_at_most_a_hundred():
    torch.manual_seed(0)
    attention = BlockAttention(D, HEADS, is_normalized=True, attention_scale=0.25, dropout=0.0).double()
    assert attention.scale == 1
    torch.testing.assert_close(attention.scale_mul_1H11.detach().exp(), torch.full((1, HEADS, 1, 1), 4.0).double())
    with torch.no_grad():
        attention.scale_mul_1H11.copy_(torch.tensor([0.0, 2.0, 9.0]).view(1, HEADS, 1, 1))
    q, k, _ = attention.queries_keys_values(torch.randn(2, 5, D, dtype=torch.float64))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, HEADS, 5, dtype=torch.float64))
    temperatures = torch.tensor([1.0, math.exp(2.0), 100.0], dtype=torch.float64)
    torch.testing.assert_close(q.norm(dim=-1), temperatures[None, :, None].expand(2, HEADS, 5))


def test_merging_heads_undoes_the_split():
    attention = BlockAttention(D, HEADS, is_normalized=False, attention_scale=1.0, dropout=0.0)
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(D))
        attention.proj.bias.zero_()
    x = torch.randn(2, 5, D)
    heads = x.view(2, 5, HEADS, D // HEADS).transpose(1, 2)
    torch.testing.assert_close(attention.merge_heads(heads), x)


def test_cached_attention_sees_all_blocks_up_to_its_own_of_its_layer_and_rows():
    layout = BlockLayout.scales([1, (1, 3), (2, 3)])
    cache = KeyValueCache(2, (4, HEADS, 10, 2), torch.float64, torch.device("cpu"))
    q, k, v = torch.randn(3, 4, HEADS, 10, 2, dtype=torch.float64)
    expected = naive_attention(q, k, v, layout, 0.7)
    for rows, (start, end) in zip((4, 4, 2), layout.bounds, strict=True):
        block = [tensor[:rows, :, start:end] for tensor in (q, k, v)]
        got = CachedAttention(cache, 1, (0, start, end), 0.7, None)(*block)
        torch.testing.assert_close(got, expected[:rows, :, start:end], rtol=1e-12, atol=1e-12)
        # Another layer's keys are its own.
        CachedAttention(cache, 0, (0, start, end), 0.7, None)(*(tensor + 1 for tensor in block))
    assert torch.equal(cache.keys[1][:2], k[:2]) and torch.equal(cache.values[0][:2], v[:2] + 1)


@SHARED_OR_NOT
@pytest.mark.parametrize("use_normalized_attention", [False, True], ids=["plain", "normalised"])
def test_layer_against_the_formula(use_shared_adaln, use_normalized_attention):
    layer = make_layer(use_shared_adaln=use_shared_adaln, use_normalized_attention=use_normalized_attention)
    x, condition = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    if use_shared_adaln:
        condition = torch.randn(2, 1, 6, D, dtype=torch.float64)
        parts = (layer.ada_gss + condition)[:, 0].unbind(1)
    else:
        linear = layer.ada_lin[1]
        parts = (F.silu(condition) @ linear.weight.T + linear.bias).split(D, dim=1)
    modulation = layer.modulation(condition)
    for got, part, added in zip(modulation, parts, (0, 0, 1, 1, 0, 0), strict=True):
        torch.testing.assert_close(got, part[:, None] + added)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (part[:, None] for part in parts)
    attend = one_block_attention(layer)

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    attended = layer.attn.merge_heads(attend(*layer.attn.queries_keys_values(norm(x) * (1 + scale1) + shift1)))
    h = x + gamma1 * attended
    h = h + gamma2 * layer.ffn(norm(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(layer(x, modulation, attend), h)


def test_feed_forward_uses_the_tanh_gelu():
    torch.manual_seed(0)
    ffn, x = FeedForward(D, 2 * D, dropout=0.0).double(), torch.randn(3, D, dtype=torch.float64)
    h = ffn.fc1(x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(ffn(x), ffn.fc2(h))


def test_head_norm_is_scaled_before_it_is_shifted():
    torch.manual_seed(0)
    head = ModulatedHead(D, 1e-6).double()
    x, condition = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    scale, shift = head.ada_lin(condition).split(D, dim=1)
    expected = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(head(x, head.modulation(condition)), expected)


def test_dropped_paths_keep_the_expectation_and_drop_whole_samples():
    torch.manual_seed(0)
    branch = torch.randn(1, 4, D, dtype=torch.float64).expand(20_000, 4, D)
    out = dropped_path(branch, 0.3)
    is_kept = out.abs().amax(dim=(1, 2)) > 0
    assert abs(is_kept.double().mean() - 0.7) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    torch.testing.assert_close(out[is_kept], branch[is_kept] / 0.7)
    torch.testing.assert_close(out.mean(0), branch[0], rtol=0.02, atol=0)
    assert dropped_path(branch, 0.0) is branch


def test_a_dropped_layer_leaves_the_sample_as_it_was():
    layer = make_layer(drop_path=0.5).train()
    x, condition = torch.randn(64, 5, D, dtype=torch.float64), torch.randn(64, D, dtype=torch.float64)
    torch.manual_seed(0)
    unchanged = (layer(x, layer.modulation(condition), one_block_attention(layer)) == x).all((1, 2))
    # Both branches of a sample fall with probability 1/4.
    assert 6 <= unchanged.sum() <= 28


def test_dropout_acts_in_training_alone():
    layer = make_layer(dropout=0.5)
    x, condition = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)

    def run():
        return layer(x, layer.modulation(condition), one_block_attention(layer))

    assert not torch.equal(run(), run())
    layer.eval()
    assert torch.equal(run(), run())
