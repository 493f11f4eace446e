"""Codebooks that are a rule (FSQ, LFQ, BSQ) against the papers' formulas in float64: indices, codes, gradients."""

import itertools

import numpy as np
import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import (
    FSQCodebook,
    LearnedCodebook,
    ProductCodebook,
    Quantizer,
    ScaleCodec,
    SignCodebook,
    TileCodec,
)
from nextblock.tokenizer.losses import assignment_entropies, assignment_entropy

LEVELS = (8, 5, 2, 3)
BOOKS = {
    "fsq": lambda **options: FSQCodebook(LEVELS, **options),
    "lfq": lambda **options: SignCodebook(4, **options),
    "bsq": lambda **options: SignCodebook(4, is_spherical=True, **options),
}
every_rule = pytest.mark.parametrize("kind", BOOKS)


def random_map(batch=3, side=4, seed=0, scale=2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, 4, side, side, generator=generator, dtype=torch.float64)


def prepared(kind, z):
    """What each paper does before it rounds: FSQ's `bound` over its half width, BSQ's sphere."""
    if kind == "fsq":
        levels = np.array(LEVELS)
        half_l = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2 == 1, 0.0, 0.5)
        return (np.tanh(z + np.tan(offset / half_l)) * half_l - offset) / (levels // 2)
    return z / np.linalg.norm(z, axis=-1, keepdims=True) if kind == "bsq" else z


def quantized(kind, z):
    """Codes and indices of vectors z (N, 4), as each paper has them."""
    z = prepared(kind, z)
    if kind == "fsq":
        levels = np.array(LEVELS)
        half_width, basis = levels // 2, np.cumprod([1, *levels[:-1]])
        whole = np.round(z * half_width)
        return whole / half_width, ((whole + half_width) * basis).sum(-1).astype(int)
    bits = np.where(z > 0, 1, 0)
    return (2 * bits - 1) / (2 if kind == "bsq" else 1), (bits * 2 ** np.arange(4)).sum(-1)


def rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2).detach().numpy()


@every_rule
def test_codes_and_indices_are_the_papers(kind):
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 4)), BOOKS[kind]()).double()
    features = random_map()
    codes, idx = quantized(kind, rows(features))
    result, _, idx_BL = quantizer(features)
    assert np.array_equal(idx_BL.flatten().numpy(), idx) and len(set(idx)) > 10
    np.testing.assert_allclose(rows(result), codes, rtol=0, atol=1e-15)
    np.testing.assert_allclose(rows(quantizer.idx_to_features(idx_BL)), codes, rtol=0, atol=1e-15)
    assert torch.equal(quantizer.indices(features), idx_BL)
    # Features of a float32 model far from ties choose the same codes.
    assert torch.equal(Quantizer(quantizer.codec, BOOKS[kind]()).indices(features.float()), idx_BL)


@every_rule
def test_every_code_is_its_own_index_and_its_digits_are_its_channels(kind):
    codebook = BOOKS[kind]()
    idx = torch.arange(codebook.num_codes)
    codes = codebook.lookup(idx)
    assert codes.dtype == torch.float32 and codes.unique(dim=0).shape == (codebook.num_codes, 4)
    assert torch.equal(codebook.assign(codes), idx)
    digits = codebook.digits.split(idx)
    steps = [(channel.unique(), digit) for channel, digit in zip(codes.T, digits.T, strict=True)]
    assert all(torch.equal(values[digit], channel) for (values, digit), channel in zip(steps, codes.T, strict=True))


def test_codes_of_a_large_book_come_back():
    codebook = SignCodebook(32, is_spherical=True)
    idx = torch.randint(1 << 32, (7, 100), generator=torch.Generator().manual_seed(0))
    assert codebook.num_codes == 1 << 32 and torch.equal(codebook.assign(codebook.lookup(idx)), idx)
    levels = FSQCodebook([8, 8, 8, 5, 5, 5])
    idx = torch.randint(levels.num_codes, (1000,), generator=torch.Generator().manual_seed(0))
    assert levels.num_codes == 64000 and torch.equal(levels.assign(levels.lookup(idx)), idx)


@every_rule
def test_gradients_pass_straight_through_what_is_done_before_rounding(kind, finite_differences):
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 2)), BOOKS[kind]()).double()
    features = random_map(1, 2).requires_grad_()
    weights = random_map(1, 2, seed=1)
    result, loss, _ = quantizer(features)
    ((result * weights).sum() + 3 * loss).backward()
    codes = torch.from_numpy(quantized(kind, rows(features))[0])

    def passed(z):
        vectors = torch.from_numpy(prepared(kind, rows(z)))
        commitment = 0 if kind == "fsq" else 0.25 * (vectors - codes).square().mean()
        return (vectors * torch.from_numpy(rows(weights))).sum() + 3 * commitment

    expected = finite_differences(passed, features.detach())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(features.grad, expected, rtol=1e-6, atol=1e-8)


def test_zero_has_the_bit_zero_and_halves_go_to_the_even_level():
    signs = SignCodebook(3)
    assert signs.assign(torch.tensor([[0.0, -0.0, 1e-30], [-1e-30, 1.0, 0.0]])).tolist() == [4, 2]
    levels = FSQCodebook([5])  # −2 … 2, in halves
    halves = torch.tensor([[-0.75], [-0.25], [0.25], [0.75]])
    assert levels.lookup(levels.assign(halves)).flatten().tolist() == [-1.0, 0.0, 0.0, 1.0]


def test_residuals_beyond_the_outermost_levels_take_these():
    levels = FSQCodebook([4, 3])
    assert levels.lookup(levels.assign(torch.tensor([[-9.0, 9.0], [9.0, -9.0]]))).tolist() == [[-1.0, 1.0], [0.5, -1.0]]


@every_rule
def test_no_feature_is_mapped_beyond_the_levels_it_has(kind):
    codebook = BOOKS[kind]()
    extreme = torch.tensor(list(itertools.product((-1e4, 0.0, 1e4), repeat=4)))
    vectors = codebook.prepare(extreme[:, :, None])[:, :, 0]
    idx = codebook.assign(vectors)
    assert idx.min() >= 0 and idx.max() == codebook.num_codes - 1
    if kind == "fsq":
        torch.testing.assert_close(codebook.lookup(idx), vectors, rtol=0, atol=0.6)


@every_rule
@pytest.mark.parametrize("layout", [BlockLayout.tiles(2, 4), BlockLayout.scales([1, 2, 4])], ids=["tiles", "scales"])
def test_every_codec_takes_them_in_every_precision(kind, layout):
    torch.manual_seed(0)
    codec = ScaleCodec(layout, 4, num_phi=2) if layout.is_scales else TileCodec(layout)
    quantizer = torch.nn.Sequential(Quantizer(codec, BOOKS[kind]())).to(torch.bfloat16)[0]
    features = random_map().float().requires_grad_()
    result, loss, idx_BL = quantizer(features)
    assert result.dtype == loss.dtype == torch.float32
    assert torch.equal(quantizer.indices(features), idx_BL)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), result, rtol=1e-5, atol=1e-5)
    (result.square().sum() + loss).backward()
    assert features.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in quantizer.parameters())
    canvas, inputs = quantizer.start(3), []
    with torch.no_grad():
        for k, idx in enumerate(layout.split(idx_BL)):
            canvas, next_input = quantizer.advance(canvas, idx, k)
            inputs.append(next_input)
        assert torch.equal(canvas, quantizer.idx_to_features(idx_BL))
        assert torch.equal(quantizer.var_input(idx_BL), torch.cat(inputs[:-1], 1))


def test_bases_may_be_joined():
    assert BOOKS["fsq"](digit_bases=[40, 6]).digits.bases == (40, 6)
    assert Quantizer(TileCodec(None), BOOKS["lfq"](digit_bases=[4, 4])).digits.bases == (4, 4)
    with pytest.raises(ValueError, match="expected products of neighbours"):
        BOOKS["bsq"](digit_bases=[3, 5])


@every_rule
def test_there_is_no_table_and_nothing_to_start_from(kind):
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 4)), BOOKS[kind]())
    with pytest.raises(ValueError, match="which has no table of its codes"):
        quantizer.get_codebook()
    with pytest.raises(ValueError, match="expected codebook_init 'uniform'"):
        quantizer.start_from(random_map().float(), seed=0)


# The entropy term


def entropies_over_all_codes(codebook, vectors, temperature):
    """The mean entropy of assignments and the entropy of their mean, with the whole N×V matrix."""
    codes = codebook.lookup(torch.arange(codebook.num_codes))
    p = (-torch.cdist(vectors, codes).square() / temperature).softmax(1)
    mean = p.mean(0)
    return -torch.xlogy(p, p).sum(1).mean(), -torch.xlogy(mean, mean).sum()


@every_rule
def test_entropies_by_factors_are_those_over_all_codes(kind, finite_differences):
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 2)), BOOKS[kind]()).double()
    features = random_map(2, 2, scale=0.5).requires_grad_()
    assert len(quantizer.factors(features)) == 1

    def expected(z, diversity=0.7):
        each, mean = entropies_over_all_codes(quantizer.codebook, quantizer.training_vectors(z).flatten(0, 1), 0.4)
        return each - diversity * mean

    value = assignment_entropy(quantizer, features, 0.4, 0.7)
    assert value.item() == pytest.approx(expected(features).item(), rel=1e-12)
    assert assignment_entropy(quantizer, features, 0.4).item() == pytest.approx(expected(features, 1.0).item())
    value.backward()
    torch.testing.assert_close(features.grad, finite_differences(expected, features.detach()), rtol=1e-6, atol=1e-9)


@every_rule
def test_of_several_factors_a_features_entropy_is_exact_and_the_means_is_that_of_independent_ones(kind, monkeypatch):
    module = {"fsq": "codebook_fsq"}.get(kind, "codebook_lfq")
    monkeypatch.setattr(f"nextblock.tokenizer.{module}.MAX_FACTOR_CODES", 8)
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 4)), BOOKS[kind]()).double()
    features = random_map(scale=0.5)
    factors = quantizer.factors(features)
    assert [len(codes) for _, codes in factors] == {"fsq": [8, 5, 6]}.get(kind, [8, 2])
    vectors = quantizer.training_vectors(features).flatten(0, 1)
    assert torch.equal(torch.cat([share for share, _ in factors], 1), vectors)
    each, mean = zip(*(assignment_entropies(*factor, 0.4) for factor in factors), strict=True)
    exact_each, exact_mean = entropies_over_all_codes(quantizer.codebook, vectors, 0.4)
    assert sum(each).item() == pytest.approx(exact_each.item(), rel=1e-12)
    assert sum(mean).item() >= exact_mean.item() - 1e-12
    digits = quantizer.digits.split(torch.arange(quantizer.num_codes))
    codes = quantizer.lookup(torch.arange(quantizer.num_codes))
    p = (-torch.cdist(vectors, codes).square() / 0.4).softmax(1).mean(0)
    bounds = np.cumsum([0, *{"fsq": [1, 1, 2]}.get(kind, [3, 1])])
    for start, end, entropy in zip(bounds[:-1], bounds[1:], mean, strict=True):
        _, number = digits[:, start:end].unique(dim=0, return_inverse=True)
        marginal = torch.zeros(number.max() + 1, dtype=torch.float64).index_add_(0, number, p)
        assert entropy.item() == pytest.approx(-torch.xlogy(marginal, marginal).sum().item(), rel=1e-9)


def test_entropy_of_bits_is_bsqs_closed_form():
    quantizer = Quantizer(TileCodec(BlockLayout.tiles(1, 4)), SignCodebook(18, is_spherical=True)).double()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 18, 4, 4, generator=generator, dtype=torch.float64)
    factors = quantizer.factors(features)
    assert [codes.shape for _, codes in factors] == [(1024, 10), (256, 8)]
    u = torch.nn.functional.normalize(features, dim=1)
    # softmax(−d²/T) over codes ±1/√C is σ(2·τ·c·u) a channel with the paper's τ = 2/T.
    p = torch.sigmoid(2 * (2 / 0.1) * u / 18**0.5)
    expected = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum(1).mean()
    found = sum(assignment_entropies(*factor, 0.1)[0] for factor in factors)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_product_has_a_factor_for_every_table():
    torch.manual_seed(0)
    codebook = ProductCodebook([LearnedCodebook(n, 2, init_scale=1.0) for n in (5, 3)]).double()
    vectors = random_map(2, 2).permute(0, 2, 3, 1).flatten(0, 2)
    each, mean = zip(*(assignment_entropies(*factor, 0.4) for factor in codebook.factors(vectors)), strict=True)
    exact_each, exact_mean = entropies_over_all_codes(codebook, vectors, 0.4)
    assert sum(each).item() == pytest.approx(exact_each.item(), rel=1e-12)
    assert sum(mean).item() >= exact_mean.item()
