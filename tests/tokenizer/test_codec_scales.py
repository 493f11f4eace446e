"""Residual quantization over scales: against a slow re-implementation, losses by finite differences, precision."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import LearnedCodebook, Quantizer, ScaleCodec
from nextblock.tokenizer.codec_scales import phi_of_scale

V, C = 10, 3
LAYOUTS = {
    "square": BlockLayout.scales([1, 2, 4]),
    "not square": BlockLayout.scales([(1, 1), (2, 3), (4, 6)]),
    "one scale": BlockLayout.scales([(2, 3)]),
    "last scale twice": BlockLayout.scales([1, 3, 3]),
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
both_metrics = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def build(layout=LAYOUTS["square"], seed=0, num_phi=2, **options) -> Quantizer:
    torch.manual_seed(seed)
    codebook = LearnedCodebook(V, C, **{"init_scale": 1.0} | options)
    return Quantizer(ScaleCodec(layout, C, num_phi), codebook)


def random_map(grid=(4, 4), batch=2, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, C, *grid, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).reshape(len(feature_map), -1, feature_map.shape[1])


def slow_contribution(codes, phis, idx, k, layout):
    """Scale k's map: code vectors laid out, upsampled, blended with their convolution."""
    h = codes[idx].view(len(idx), *layout.shapes[k], C).permute(0, 3, 1, 2)
    h = F.interpolate(h, size=layout.grid, mode="bicubic", align_corners=False)
    if not phis:
        return h
    weight, bias = phis[phi_of_scale(layout.num_blocks, len(phis))[k]]
    return 0.5 * h + 0.5 * F.conv2d(h, weight, bias, padding=1)


def slow_quantization(features, codes, phis, layout, metric="euclidean"):
    """Algorithm 1 of VAR, with the search by brute force in float64."""
    rest, f_hat, idx_Bl, f_hats = features, torch.zeros_like(features), [], []
    for k, shape in enumerate(layout.shapes):
        rows = as_rows(F.adaptive_avg_pool2d(rest, shape)).double()
        if metric == "cosine":
            idx = (F.normalize(rows, dim=-1) @ F.normalize(codes.double(), dim=-1).T).argmax(-1)
        else:
            idx = (rows[:, :, None] - codes.double()).square().sum(-1).argmin(-1)
        contribution = slow_contribution(codes, phis, idx, k, layout)
        f_hat, rest = f_hat + contribution, rest - contribution
        idx_Bl.append(idx)
        f_hats.append(f_hat)
    return idx_Bl, f_hats


def tensors_of(quantizer):
    phis = [(phi.weight.detach(), phi.bias.detach()) for phi in quantizer.codec.phi]
    return quantizer.get_codebook().detach(), phis


@pytest.mark.parametrize(
    ("num_scales", "num_phi", "chosen"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (5, 4, [0, 1, 2, 2, 3]),
        (4, 3, [0, 0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (3, 1, [0, 0, 0]),
        (1, 4, [0]),
        (1, 1, [0]),
    ],
)
def test_scales_share_convolutions_as_in_the_published_models(num_scales, num_phi, chosen):
    assert phi_of_scale(num_scales, num_phi) == chosen


@all_layouts
@both_metrics
@pytest.mark.parametrize("num_phi", [0, 1, 2])
def test_forward_against_a_slow_loop(layout, metric, num_phi):
    quantizer = build(layout, metric=metric, num_phi=num_phi).double()
    features = random_map(layout.grid, dtype=torch.float64)
    idx_Bl, f_hats = slow_quantization(features, *tensors_of(quantizer), layout, metric)
    quantized, loss, idx_BL = quantizer(features)
    assert torch.equal(idx_BL, torch.cat(idx_Bl, 1))
    assert idx_BL.unique().numel() > 2
    torch.testing.assert_close(quantized, f_hats[-1], rtol=1e-12, atol=1e-12)
    expected = 1.25 * sum((f_hat - features).square().mean() for f_hat in f_hats) / layout.num_blocks
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@all_layouts
@both_metrics
def test_indices_and_map_turn_into_each_other_as_forward_does(layout, metric):
    quantizer = build(layout, metric=metric)
    features = random_map(layout.grid)
    quantized, _, forward_idx = quantizer(features)
    idx_BL = quantizer.indices(features)
    assert idx_BL.shape == (2, layout.num_tokens)
    assert torch.equal(forward_idx, idx_BL)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), quantized, rtol=1e-5, atol=1e-5)


@all_layouts
def test_teacher_forcing_inputs_are_the_ones_met_step_by_step(layout):
    quantizer = build(layout).double()
    features = random_map(layout.grid, dtype=torch.float64)
    idx_Bl, f_hats = slow_quantization(features, *tensors_of(quantizer), layout)
    canvas, inputs = quantizer.start(2), []
    assert canvas.shape == (2, C, *layout.grid) and not canvas.any()
    for k, idx in enumerate(idx_Bl):
        canvas, next_input = quantizer.advance(canvas, idx, k)
        torch.testing.assert_close(canvas, f_hats[k], rtol=1e-12, atol=1e-12)
        inputs.append(next_input)
        if k + 1 < layout.num_blocks:
            expected = as_rows(F.adaptive_avg_pool2d(f_hats[k], layout.shapes[k + 1]))
            torch.testing.assert_close(next_input, expected, rtol=1e-12, atol=1e-12)
    assert inputs.pop() is None
    var_input = quantizer.var_input(torch.cat(idx_Bl, 1))
    assert var_input.shape == (2, layout.num_tokens - layout.block_lengths[0], C)
    assert torch.equal(var_input, torch.cat([*inputs, torch.empty(2, 0, C, dtype=torch.float64)], 1))


def test_each_scale_lowers_the_error_once_codes_fit():
    quantizer = build(num_phi=0, init_scale=0.5)
    quantizer.start_from(random_map(batch=16), seed=0)
    features, errors = random_map(batch=16), []
    canvas = quantizer.start(16)
    for k, idx in enumerate(quantizer.layout.split(quantizer.indices(features))):
        canvas, _ = quantizer.advance(canvas, idx, k)
        errors.append((canvas - features).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_normalised_search_looks_at_direction_and_returns_the_raw_code():
    layout = BlockLayout.scales([1])
    quantizer = build(layout, metric="cosine", num_phi=0)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.eye(V, C) * 5 + 0.1)
    features = torch.tensor([0.0, 0.2, 0.01]).view(1, C, 1, 1)
    quantized, _, idx_BL = quantizer(features)
    assert idx_BL.tolist() == [[1]]
    torch.testing.assert_close(quantized.flatten(), quantizer.get_codebook()[1].detach())
    assert quantizer.get_codebook() is quantizer.codebook.weight


def test_training_vectors_are_the_residuals_of_a_lossless_code():
    layout = LAYOUTS["not square"]
    quantizer, features = build(layout), random_map(layout.grid)
    rest, expected = features, []
    for shape in layout.shapes:
        pooled = F.adaptive_avg_pool2d(rest, shape)
        expected.append(as_rows(pooled))
        rest = rest - F.interpolate(pooled, size=layout.grid, mode="bicubic")
    torch.testing.assert_close(quantizer.training_vectors(features), torch.cat(expected, 1))


# Gradients


def loss_and_frozen_indices(layout, **options):
    quantizer = build(layout, beta=0.4, **options).double()
    features = random_map(layout.grid, dtype=torch.float64).requires_grad_()
    _, loss, idx_BL = quantizer(features)
    loss.backward()
    return quantizer, features, loss, layout.split(idx_BL)


def maps_so_far(codes, phis, idx_Bl, layout):
    f_hat = 0
    for k, idx in enumerate(idx_Bl):
        f_hat = f_hat + slow_contribution(codes, phis, idx, k, layout)
        yield f_hat


@pytest.mark.parametrize("layout", [LAYOUTS["square"], LAYOUTS["not square"]], ids=["square", "not square"])
def test_codebook_and_phi_loss_by_finite_differences_with_features_frozen(layout, finite_differences):
    quantizer, features, _, idx_Bl = loss_and_frozen_indices(layout)
    target, (codes, phis) = features.detach(), tensors_of(quantizer)

    def loss_of(codes, phis):
        maps = maps_so_far(codes, phis, idx_Bl, layout)
        return sum((f_hat - target).square().mean() for f_hat in maps) / layout.num_blocks

    expected = finite_differences(lambda codes: loss_of(codes, phis), codes)
    torch.testing.assert_close(quantizer.codebook.weight.grad, expected, rtol=1e-6, atol=1e-9)
    for i, (weight, bias) in enumerate(phis):

        def with_phi(weight, bias, i=i):
            return loss_of(codes, [*phis[:i], (weight, bias), *phis[i + 1 :]])

        by_weight = finite_differences(lambda w, b=bias: with_phi(w, b), weight)
        by_bias = finite_differences(lambda b, w=weight: with_phi(w, b), bias)
        torch.testing.assert_close(quantizer.codec.phi[i].weight.grad, by_weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(quantizer.codec.phi[i].bias.grad, by_bias, rtol=1e-6, atol=1e-9)
        assert by_weight.abs().max() > 1e-2


@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["gradient", "ema"])
def test_commitment_loss_by_finite_differences_with_codes_frozen(ema_decay, finite_differences):
    layout = LAYOUTS["square"]
    quantizer, features, _, idx_Bl = loss_and_frozen_indices(layout, ema_decay=ema_decay)
    maps = list(maps_so_far(*tensors_of(quantizer), idx_Bl, layout))

    def commitment_term(features):
        return 0.4 * sum((f_hat - features).square().mean() for f_hat in maps) / layout.num_blocks

    expected = finite_differences(commitment_term, features.detach())
    torch.testing.assert_close(features.grad, expected, rtol=1e-6, atol=1e-9)


def test_with_moving_average_codes_the_convolutions_still_learn():
    quantizer, _, _, _ = loss_and_frozen_indices(LAYOUTS["square"], ema_decay=0.9)
    assert [name for name, _ in quantizer.named_parameters()] == [
        f"codec.phi.{i}.{part}" for i in range(2) for part in ("weight", "bias")
    ]
    assert all(parameter.grad.abs().max() > 0 for parameter in quantizer.parameters())


def test_the_gradient_passes_straight_through():
    features, upstream = random_map(dtype=torch.float64).requires_grad_(), random_map(seed=5, dtype=torch.float64)
    quantizer = build().double()
    (quantizer(features)[0] * upstream).sum().backward()
    assert torch.equal(features.grad, upstream)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


# Moving averages and precision


def test_only_training_mode_feeds_the_moving_average_with_every_scale():
    quantizer, features = build(ema_decay=0.5), random_map()
    start = quantizer.codebook.weight.clone()
    quantizer.eval()(features)
    quantizer.after_step()
    assert torch.equal(quantizer.codebook.weight, start)
    _, _, idx_BL = quantizer.train()(features)
    quantizer.indices(features)
    quantizer.after_step()
    expected = torch.ones(V).lerp(torch.bincount(idx_BL.flatten(), minlength=V).float(), 0.5)
    torch.testing.assert_close(quantizer.codebook.code_counts, expected)
    assert quantizer.codebook.code_counts.sum() == pytest.approx((V + 2 * 21) / 2)


def test_the_moving_average_takes_the_residual_each_code_stood_for():
    layout = LAYOUTS["square"]
    quantizer = build(layout, ema_decay=0.5).double()
    features, start = random_map(dtype=torch.float64), quantizer.codebook.weight.clone().double()
    idx_Bl, f_hats = slow_quantization(features, *tensors_of(quantizer), layout)
    rests = [features, *(features - f_hat for f_hat in f_hats[:-1])]
    sums = torch.zeros(V, C, dtype=torch.float64)
    for idx, rest, shape in zip(idx_Bl, rests, layout.shapes, strict=True):
        for v, row in zip(idx.flatten(), as_rows(F.adaptive_avg_pool2d(rest, shape)).flatten(0, 1), strict=True):
            sums[v] += row
    quantizer(features)
    quantizer.after_step()
    torch.testing.assert_close(quantizer.codebook.code_sums, (start + sums) / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_leave_codebook_and_convolutions_in_float32(dtype):
    quantizer = build(ema_decay=0.9)
    features = random_map().to(dtype)
    exact = quantizer(features.float())
    quantizer.to(dtype)
    assert {tensor.dtype for tensor in quantizer.state_dict().values()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(quantizer(features), exact, strict=True))


def test_autocast_changes_nothing():
    quantizer, features = build(), random_map(batch=16)
    plain, idx_BL = quantizer(features), quantizer.indices(features)
    decoded, var_input = quantizer.idx_to_features(idx_BL), quantizer.var_input(idx_BL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(quantizer(features), plain, strict=True))
        assert torch.equal(quantizer.indices(features), idx_BL)
        assert torch.equal(quantizer.idx_to_features(idx_BL), decoded)
        assert torch.equal(quantizer.var_input(idx_BL), var_input)


def test_float64_is_never_lowered():
    quantizer = build()
    assert [t.dtype for t in quantizer(random_map(dtype=torch.float64))] == [torch.float64, torch.float64, torch.int64]
    quantizer.double()
    idx_BL = quantizer.indices(random_map())
    assert quantizer.idx_to_features(idx_BL).dtype == quantizer.var_input(idx_BL).dtype == torch.float64
