"""Plain vector quantization: losses by finite differences, straight-through gradient, tiles, precision, origin API."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import VectorQuantizer

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
normalised_or_not = pytest.mark.parametrize("normalize_codes", [False, True], ids=["plain", "normalised"])


def build(layout=LAYOUTS["quadrants"], seed=0, **options) -> VectorQuantizer:
    torch.manual_seed(seed)
    return VectorQuantizer(V, C, layout=layout, **{"init_scale": 1.0} | options)


def random_map(grid=(4, 4), batch=2, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, C, *grid, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


# The origin class


def test_positional_arguments_and_defaults_of_the_origin():
    quantizer = VectorQuantizer(7, 5)
    assert (quantizer.beta, quantizer.epsilon) == (0.25, 1e-5)
    other = VectorQuantizer(7, 5, 0.5, 1e-3)
    assert (other.beta, other.epsilon, other.codebook.epsilon) == (0.5, 1e-3, 1e-3)
    assert quantizer.get_codebook() is quantizer.codebook.weight
    assert quantizer.get_codebook().shape == (7, 5)
    assert quantizer.get_codebook().abs().max() <= 1 / 7


def test_forward_gives_a_plain_tuple_of_map_loss_and_raster_indices():
    quantizer, features = VectorQuantizer(V, C), random_map((2, 3)) / V
    output = quantizer(features)
    assert type(output) is tuple and len(output) == 3
    quantized, loss, idx = output
    rows = as_rows(features).double()
    expected = torch.stack([(rows - code).square().sum(1) for code in quantizer.get_codebook().double()], 1).argmin(1)
    assert torch.equal(idx, expected)
    assert idx.unique().numel() > 3
    torch.testing.assert_close(as_rows(quantized), quantizer.get_codebook()[expected])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1.25 * F.mse_loss(quantized, features).item(), rel=1e-6)


def test_beta_weighs_the_commitment_alone():
    features = random_map()
    losses = []
    for beta in (0.0, 1.0, 2.0):
        quantizer = build()
        quantizer.beta = beta
        losses.append(quantizer(features)[1].item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(3 * losses[0], rel=1e-6)


# Gradients


@normalised_or_not
def test_codebook_loss_by_finite_differences_with_features_frozen(normalize_codes, finite_differences):
    quantizer = build(normalize_codes=normalize_codes).double()
    features = random_map(dtype=torch.float64)
    _, loss, idx = quantizer(features)
    loss.backward()
    target = F.normalize(as_rows(features), dim=1) if normalize_codes else as_rows(features)

    def codebook_term(codes):
        codes = F.normalize(codes, dim=1) if normalize_codes else codes
        return sum((codes[v] - row).square().sum() for v, row in zip(idx, target, strict=True)) / target.numel()

    weight = quantizer.codebook.weight
    torch.testing.assert_close(weight.grad, finite_differences(codebook_term, weight.detach()), rtol=1e-6, atol=1e-9)
    assert weight.grad.abs().max() > 1e-2


@normalised_or_not
@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["gradient", "ema"])
def test_commitment_loss_by_finite_differences_with_codes_frozen(normalize_codes, ema_decay, finite_differences):
    quantizer = build(normalize_codes=normalize_codes, ema_decay=ema_decay, beta=0.4).double()
    features = random_map(dtype=torch.float64).requires_grad_()
    _, loss, idx = quantizer(features)
    loss.backward()
    codes = quantizer.get_codebook().detach()[idx]

    def commitment_term(features):
        rows = F.normalize(as_rows(features), dim=1) if normalize_codes else as_rows(features)
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
    (build(normalize_codes=True).double()(features)[0] * upstream).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(features, dim=1) * upstream).sum(), features)
    torch.testing.assert_close(features.grad, expected)


def test_normalised_codes_are_searched_by_cosine_and_returned_with_unit_norm():
    quantizer, features = build(normalize_codes=True), random_map()
    quantized, _, idx = quantizer(features)
    cosines = F.normalize(as_rows(features).double()) @ F.normalize(quantizer.codebook.weight.double()).T
    assert torch.equal(idx, cosines.argmax(1))
    torch.testing.assert_close(as_rows(quantized).norm(dim=1), torch.ones(len(idx)))
    torch.testing.assert_close(as_rows(quantized), F.normalize(quantizer.codebook.weight)[idx])
    torch.testing.assert_close(quantizer.get_codebook(), F.normalize(quantizer.codebook.weight))
    # Length carries nothing.
    assert torch.equal(quantizer(features * 8)[2], idx)


# Tiles


@all_layouts
@normalised_or_not
def test_tiles_are_lossless(layout, normalize_codes):
    quantizer, features = build(layout, normalize_codes=normalize_codes), random_map(layout.grid)
    idx_Bl = quantizer.features_to_idxBl(features)
    assert [tuple(idx.shape) for idx in idx_Bl] == [(2, length) for length in layout.block_lengths]
    quantized, _, flat_idx = quantizer(features)
    torch.testing.assert_close(quantizer.idxBl_to_features(idx_Bl), quantized, rtol=1e-6, atol=1e-6)
    codes = quantizer.get_codebook()[flat_idx].view(2, *layout.grid, C).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantizer.idxBl_to_features(idx_Bl), codes, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.split_indices(flat_idx, 2), idx_Bl, strict=True))


@all_layouts
def test_a_tile_holds_the_indices_of_its_own_cells(layout):
    quantizer, features = build(layout), random_map(layout.grid)
    idx_map = quantizer(features)[2].view(2, *layout.grid)
    for k, idx in enumerate(quantizer.features_to_idxBl(features)):
        assert torch.equal(idx_map[:, *layout.tile_slices(k)].flatten(1), idx)


@all_layouts
@normalised_or_not
def test_teacher_forcing_inputs_are_the_ones_met_step_by_step(layout, normalize_codes):
    quantizer = build(layout, normalize_codes=normalize_codes)
    idx_Bl = quantizer.features_to_idxBl(random_map(layout.grid))
    canvas, inputs = quantizer.start(2), []
    assert canvas.shape == (2, C, *layout.grid) and not canvas.any()
    for k, idx in enumerate(idx_Bl):
        canvas, next_input = quantizer.advance(canvas, idx, k)
        inputs.append(next_input)
        if k + 1 < layout.num_blocks:
            assert torch.equal(next_input, quantizer.get_codebook()[idx])
    assert inputs.pop() is None
    var_input = quantizer.idxBl_to_var_input(idx_Bl)
    assert var_input.shape == (2, layout.num_tokens - layout.block_lengths[0], C)
    assert torch.equal(var_input, torch.cat([*inputs, torch.empty(2, 0, C)], 1))
    assert torch.equal(canvas, quantizer.idxBl_to_features(idx_Bl))


# Moving averages, evaluation mode, precision


def test_only_training_mode_feeds_the_moving_average():
    quantizer, features = build(ema_decay=0.5), random_map()
    start = quantizer.codebook.weight.clone()
    quantizer.eval()(features)
    quantizer.codebook.update()
    assert torch.equal(quantizer.codebook.weight, start)
    quantizer.features_to_idxBl(features)
    _, _, idx = quantizer.train()(features)
    quantizer.features_to_idxBl(features)
    quantizer.codebook.update()
    expected = torch.ones(V).lerp(torch.bincount(idx, minlength=V).float(), 0.5)
    torch.testing.assert_close(quantizer.codebook.code_counts, expected)


def test_moving_average_pulls_normalised_features_not_raw_ones():
    quantizer, features = build(ema_decay=0.5, normalize_codes=True), 100 * random_map()
    for _ in range(30):
        quantizer(features)
        quantizer.codebook.update()
    used = quantizer(features)[2].unique()
    assert quantizer.codebook.weight[used].norm(dim=1).max() <= 1.001


def test_the_moving_average_brings_codes_to_their_features():
    quantizer, features = build(ema_decay=0.5), random_map((4, 4))
    losses = []
    for _ in range(20):
        losses.append(quantizer(features)[1].item())
        quantizer.codebook.update()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_quantized_in_float32(dtype):
    quantizer, features = build().to(dtype), random_map().to(dtype)
    quantized, loss, idx = quantizer(features)
    assert quantized.dtype == loss.dtype == quantizer.codebook.weight.dtype == torch.float32
    exact, exact_loss, exact_idx = quantizer(features.float())
    assert torch.equal(quantized, exact) and torch.equal(idx, exact_idx) and torch.equal(loss, exact_loss)


@normalised_or_not
def test_autocast_changes_nothing(normalize_codes):
    quantizer, features = build(normalize_codes=normalize_codes), random_map((8, 8), batch=8)
    quantizer.layout = BlockLayout.tiles(2, 8)
    idx_Bl = quantizer.features_to_idxBl(features)
    plain = quantizer(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_idx_Bl = quantizer(features), quantizer.features_to_idxBl(features)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(idx_Bl, mixed_idx_Bl, strict=True))


def test_float64_is_never_lowered():
    quantizer = build()
    assert [t.dtype for t in quantizer(random_map(dtype=torch.float64))] == [torch.float64, torch.float64, torch.int64]
    assert {t.dtype for t in quantizer.double()(random_map())[:2]} == {torch.float64}
