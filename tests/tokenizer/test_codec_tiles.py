"""Tiles of a learned codebook: losses by finite differences, straight-through gradient, block order, precision."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import LearnedCodebook, Quantizer, TileCodec

V, C = 12, 3
LAYOUTS = {
    "raster": BlockLayout.tiles(1, (4, 4)),
    "rows": BlockLayout.tiles((1, 6), (4, 6)),
    "quadrants": BlockLayout.tiles(2, (4, 4)),
    "wide patches": BlockLayout.tiles((2, 4), (4, 8)),
    # Not its own inverse as a permutation, unlike those above.
    "three columns": BlockLayout.tiles(2, (4, 6)),
    "one tile": BlockLayout.tiles((2, 3), (2, 3)),
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
unit_or_not = pytest.mark.parametrize(
    ("metric", "has_unit_codes"), [("euclidean", False), ("cosine", True)], ids=["plain", "unit codes"]
)


def build(layout=LAYOUTS["quadrants"], seed=0, **options) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(TileCodec(layout), LearnedCodebook(V, C, **{"init_scale": 1.0} | options))


def in_raster_order(idx_BL, layout=LAYOUTS["quadrants"]):
    """Flat indices of the raster, written out tile by tile."""
    idx_map = idx_BL.new_empty(len(idx_BL), *layout.grid)
    for k, idx in enumerate(layout.split(idx_BL)):
        idx_map[:, *layout.tile_slices(k)] = idx.view(len(idx), *layout.shapes[k])
    return idx_map.flatten()


def random_map(grid=(4, 4), batch=2, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, C, *grid, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


# Gradients


@unit_or_not
def test_codebook_loss_by_finite_differences_with_features_frozen(metric, has_unit_codes, finite_differences):
    quantizer = build(metric=metric, has_unit_codes=has_unit_codes).double()
    features = random_map(dtype=torch.float64)
    _, loss, idx_BL = quantizer(features)
    loss.backward()
    idx = in_raster_order(idx_BL)
    target = F.normalize(as_rows(features), dim=1) if has_unit_codes else as_rows(features)

    def codebook_term(codes):
        codes = F.normalize(codes, dim=1) if has_unit_codes else codes
        return sum((codes[v] - row).square().sum() for v, row in zip(idx, target, strict=True)) / target.numel()

    weight = quantizer.codebook.weight
    torch.testing.assert_close(weight.grad, finite_differences(codebook_term, weight.detach()), rtol=1e-6, atol=1e-9)
    assert weight.grad.abs().max() > 1e-2


@unit_or_not
@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["gradient", "ema"])
def test_commitment_loss_by_finite_differences_with_codes_frozen(metric, has_unit_codes, ema_decay, finite_differences):
    quantizer = build(metric=metric, has_unit_codes=has_unit_codes, ema_decay=ema_decay, beta=0.4).double()
    features = random_map(dtype=torch.float64).requires_grad_()
    _, loss, idx_BL = quantizer(features)
    loss.backward()
    codes = quantizer.get_codebook().detach()[in_raster_order(idx_BL)]

    def commitment_term(features):
        rows = F.normalize(as_rows(features), dim=1) if has_unit_codes else as_rows(features)
        return 0.4 * (rows - codes).square().mean()

    expected = finite_differences(commitment_term, features.detach())
    torch.testing.assert_close(features.grad, expected, rtol=1e-6, atol=1e-9)
    total = commitment_term(features.detach()) * (1 if ema_decay else 1 + 1 / 0.4)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)


def test_moving_average_codes_get_no_gradient():
    quantizer = build(ema_decay=0.9)
    _, loss, _ = quantizer(random_map().requires_grad_())
    loss.backward()
    assert list(quantizer.parameters()) == []
    assert not quantizer.codebook.weight.requires_grad


def test_the_gradient_passes_straight_through():
    features, upstream = random_map(dtype=torch.float64).requires_grad_(), random_map(seed=5, dtype=torch.float64)
    quantizer = build().double()
    quantized, _, _ = quantizer(features)
    (quantized * upstream).sum().backward()
    assert torch.equal(features.grad, upstream)
    assert quantizer.codebook.weight.grad is None


def test_the_gradient_of_normalised_features_passes_the_normalisation_alone():
    features, upstream = random_map(dtype=torch.float64).requires_grad_(), random_map(seed=5, dtype=torch.float64)
    (build(metric="cosine", has_unit_codes=True).double()(features)[0] * upstream).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(features, dim=1) * upstream).sum(), features)
    torch.testing.assert_close(features.grad, expected)


def test_normalised_codes_are_searched_by_cosine_and_returned_with_unit_norm():
    quantizer, features = build(metric="cosine", has_unit_codes=True), random_map()
    quantized, _, idx_BL = quantizer(features)
    idx = in_raster_order(idx_BL)
    cosines = F.normalize(as_rows(features).double()) @ F.normalize(quantizer.codebook.weight.double()).T
    assert torch.equal(idx, cosines.argmax(1))
    torch.testing.assert_close(as_rows(quantized).norm(dim=1), torch.ones(len(idx)))
    torch.testing.assert_close(as_rows(quantized), F.normalize(quantizer.codebook.weight)[idx])
    torch.testing.assert_close(quantizer.get_codebook(), F.normalize(quantizer.codebook.weight))
    # Length carries nothing.
    assert torch.equal(quantizer(features * 8)[2], idx_BL)


# Tiles


@all_layouts
@unit_or_not
def test_tiles_are_lossless(layout, metric, has_unit_codes):
    quantizer, features = build(layout, metric=metric, has_unit_codes=has_unit_codes), random_map(layout.grid)
    idx_BL = quantizer.indices(features)
    assert idx_BL.shape == (2, layout.num_tokens)
    quantized, _, forward_idx = quantizer(features)
    assert torch.equal(forward_idx, idx_BL)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), quantized, rtol=1e-6, atol=1e-6)
    codes = quantizer.get_codebook()[in_raster_order(idx_BL, layout)].view(2, *layout.grid, C).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), codes, rtol=0, atol=0)


@all_layouts
def test_a_tile_holds_the_indices_of_its_own_cells(layout):
    quantizer, features = build(layout), random_map(layout.grid)
    distances = (as_rows(features)[:, None] - quantizer.get_codebook().detach()).square().sum(-1)
    idx_map = distances.argmin(1).view(2, *layout.grid)
    for k, idx in enumerate(layout.split(quantizer.indices(features))):
        assert torch.equal(idx_map[:, *layout.tile_slices(k)].flatten(1), idx)


def test_unit_codes_of_both_metrics_find_the_same():
    features = random_map((16, 16))
    layout, metrics = BlockLayout.tiles(1, 16), ("cosine", "euclidean")
    cosine, euclidean = (build(layout, metric=metric, has_unit_codes=True) for metric in metrics)
    assert torch.equal(cosine.indices(features), euclidean.indices(features))


def test_cosine_search_alone_leaves_features_and_codes_as_long_as_they_are():
    quantizer, features = build(metric="cosine"), random_map()
    quantized, _, idx_BL = quantizer(features)
    cosines = F.normalize(as_rows(features)) @ F.normalize(quantizer.codebook.weight.detach()).T
    idx = in_raster_order(idx_BL)
    assert torch.equal(idx, cosines.argmax(1))
    assert quantizer.get_codebook() is quantizer.codebook.weight
    torch.testing.assert_close(as_rows(quantized), quantizer.codebook.weight.detach()[idx])


@all_layouts
@unit_or_not
def test_teacher_forcing_inputs_are_the_ones_met_step_by_step(layout, metric, has_unit_codes):
    quantizer = build(layout, metric=metric, has_unit_codes=has_unit_codes)
    idx_BL = quantizer.indices(random_map(layout.grid))
    canvas, inputs = quantizer.start(2), []
    assert canvas.shape == (2, C, *layout.grid) and not canvas.any()
    for k, idx in enumerate(layout.split(idx_BL)):
        canvas, next_input = quantizer.advance(canvas, idx, k)
        inputs.append(next_input)
        if k + 1 < layout.num_blocks:
            assert torch.equal(next_input, quantizer.get_codebook()[idx])
    assert inputs.pop() is None
    var_input = quantizer.var_input(idx_BL)
    assert var_input.shape == (2, layout.num_tokens - layout.block_lengths[0], C)
    assert torch.equal(var_input, torch.cat([*inputs, torch.empty(2, 0, C)], 1))
    assert torch.equal(canvas, quantizer.idx_to_features(idx_BL))


# Moving averages, evaluation mode, precision


def test_only_training_mode_feeds_the_moving_average():
    quantizer, features = build(ema_decay=0.5), random_map()
    start = quantizer.codebook.weight.clone()
    quantizer.eval()(features)
    quantizer.after_step()
    assert torch.equal(quantizer.codebook.weight, start)
    quantizer.indices(features)
    _, _, idx_BL = quantizer.train()(features)
    quantizer.indices(features)
    quantizer.after_step()
    expected = torch.ones(V).lerp(torch.bincount(idx_BL.flatten(), minlength=V).float(), 0.5)
    torch.testing.assert_close(quantizer.codebook.code_counts, expected)


def test_moving_average_pulls_normalised_features_not_raw_ones():
    quantizer, features = build(ema_decay=0.5, metric="cosine", has_unit_codes=True), 100 * random_map()
    for _ in range(30):
        quantizer(features)
        quantizer.after_step()
    used = quantizer(features)[2].unique()
    assert quantizer.codebook.weight[used].norm(dim=1).max() <= 1.001


def test_the_moving_average_brings_codes_to_their_features():
    quantizer, features = build(ema_decay=0.5), random_map((4, 4))
    losses = []
    for _ in range(20):
        losses.append(quantizer(features)[1].item())
        quantizer.after_step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_quantized_in_float32(dtype):
    quantizer, features = build().to(dtype), random_map().to(dtype)
    quantized, loss, idx = quantizer(features)
    assert quantized.dtype == loss.dtype == quantizer.codebook.weight.dtype == torch.float32
    exact, exact_loss, exact_idx = quantizer(features.float())
    assert torch.equal(quantized, exact) and torch.equal(idx, exact_idx) and torch.equal(loss, exact_loss)


@unit_or_not
def test_autocast_changes_nothing(metric, has_unit_codes):
    quantizer = build(BlockLayout.tiles(2, 8), metric=metric, has_unit_codes=has_unit_codes)
    features = random_map((8, 8), batch=8)
    idx_BL = quantizer.indices(features)
    plain = quantizer(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_idx_BL = quantizer(features), quantizer.indices(features)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    assert torch.equal(idx_BL, mixed_idx_BL)


def test_float64_is_never_lowered():
    quantizer = build()
    assert [t.dtype for t in quantizer(random_map(dtype=torch.float64))] == [torch.float64, torch.float64, torch.int64]
    assert {t.dtype for t in quantizer.double()(random_map())[:2]} == {torch.float64}
