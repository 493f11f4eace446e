"""Rotation and index gradients, SimVQ and product codebooks against obvious versions in float64."""

import pytest
import torch
import torch.nn.functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import (
    LearnedCodebook,
    ProductCodebook,
    Quantizer,
    ScaleCodec,
    SimVQCodebook,
    TileCodec,
    gradients,
)
from nextblock.tokenizer.gradients import expected_codes, rotated

V, C = 7, 4
TILES, SCALES = BlockLayout.tiles(1, 2), BlockLayout.scales([1, 2])


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(codebook, layout=TILES) -> Quantizer:
    torch.manual_seed(0)
    codec = ScaleCodec(layout, C, num_phi=1) if layout.is_scales else TileCodec(layout)
    return Quantizer(codec, codebook).double()


def rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


# Rotation


def test_rotation_is_the_papers_matrix_for_every_vector():
    features, quantized = random(2, C, 2, 3), random(2, C, 2, 3, seed=1)
    weights = random(2, C, 2, 3, seed=2)
    features.requires_grad_()
    result = rotated(features, quantized, 1e-5)
    torch.testing.assert_close(result, quantized, rtol=0, atol=1e-14)
    (result * weights).sum().backward()
    for e, q, w, gradient in zip(*map(rows, (features, quantized, weights, features.grad)), strict=True):
        e = e.detach()
        stretch, e, q = q.norm() / e.norm(), e / e.norm(), q / q.norm()
        r = (e + q) / (e + q).norm()
        rotation = torch.eye(C, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(C, dtype=torch.float64))
        torch.testing.assert_close(rotation @ e, q)
        torch.testing.assert_close(gradient, stretch * rotation.T @ w)


def test_a_vector_opposite_to_its_code_or_zero_has_a_finite_gradient():
    features = torch.stack([torch.ones(C), torch.zeros(C), torch.ones(C)])[:, :, None].requires_grad_()
    result = rotated(features, torch.stack([-torch.ones(C), torch.ones(C), torch.zeros(C)])[:, :, None], 1e-5)
    assert result[:, 0, 0].tolist() == [-1, 1, 0]
    result.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("layout", [TILES, SCALES], ids=["tiles", "scales"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_rotation_changes_the_gradient_of_features_alone(layout, ema_decay):
    options = {"ema_decay": ema_decay, "init_scale": 1.0}
    plain = build(LearnedCodebook(V, C, **options), layout)
    rotating = build(LearnedCodebook(V, C, gradient="rotation", **options), layout)
    rotating.load_state_dict(plain.state_dict())
    gradients_found = []
    for quantizer in (plain, rotating):
        features = random(3, C, 2, 2).requires_grad_()
        result, loss, idx_BL = quantizer(features)
        (result * random(3, C, 2, 2, seed=3)).sum().backward()
        gradients_found.append(features.grad)
    torch.testing.assert_close(plain(features)[0], result)
    assert torch.equal(plain(features)[2], idx_BL) and torch.equal(plain(features)[1], loss)
    assert not torch.allclose(*gradients_found)


# Index back-propagation


@pytest.mark.parametrize("is_inner", [False, True])
def test_expected_codes_in_chunks(is_inner, monkeypatch, finite_differences):
    monkeypatch.setattr(gradients, "_CHUNK_BYTES", 3 * V * 8)
    vectors, codes, weights = random(2, 5, C), random(V, C, seed=1), random(2, 5, C, seed=2)

    def plain(vectors, codes, values):
        logits = torch.einsum("bnc,vc->bnv", vectors, codes)
        if not is_inner:
            logits = -(vectors[:, :, None] - codes).square().sum(-1)
        return (logits.softmax(-1) @ values * weights).sum()

    vectors.requires_grad_(), codes.requires_grad_()
    found = expected_codes(vectors, codes, is_inner=is_inner)
    (found * weights).sum().backward()
    fixed, start = codes.detach().clone(), vectors.detach().clone()
    assert (found * weights).sum().item() == pytest.approx(plain(start, fixed, fixed).item())
    expected = finite_differences(lambda z: plain(z, fixed, fixed), start)
    torch.testing.assert_close(vectors.grad, expected, rtol=1e-6, atol=1e-8)
    # Codes learn by the probabilities alone.
    expected = finite_differences(lambda e: plain(start, e, fixed), fixed)
    torch.testing.assert_close(codes.grad, expected, rtol=1e-6, atol=1e-8)


def ibq(features, table):
    """IBQ's quantized map and loss, with the whole one-hot matrix, as its paper writes them."""
    z = rows(features)
    logits = -torch.cdist(z, table).square()
    soft = logits.softmax(1)
    hard = F.one_hot(logits.argmax(1), V).double()
    index = hard - soft.detach() + soft
    z_q, quantized = index @ table, hard @ table
    loss = (z_q - z).square().mean() + (quantized.detach() - z).square().mean()
    return z_q, loss + 0.25 * (quantized - z.detach()).square().mean(), hard.argmax(1)


@pytest.mark.parametrize("kind", ["learned", "simvq"])
def test_index_gradients_are_those_of_ibq(kind):
    codebooks = {
        "learned": LearnedCodebook(V, C, init_scale=1.0, gradient="index"),
        "simvq": SimVQCodebook(V, C, gradient="index"),
    }
    quantizer = build(codebooks[kind])
    features, weights = random(3, C, 2, 2).requires_grad_(), random(12, C, seed=1)
    result, loss, idx_BL = quantizer(features)
    ((rows(result) * weights).sum() + 2 * loss).backward()
    found = [features.grad.clone(), *(parameter.grad.clone() for parameter in quantizer.parameters())]
    features.grad = None
    quantizer.zero_grad()
    z_q, expected_loss, idx = ibq(features, quantizer.get_codebook())
    ((z_q * weights).sum() + 2 * expected_loss).backward()
    assert torch.equal(idx_BL.flatten(), idx) and idx.unique().numel() > 2
    torch.testing.assert_close(rows(result), z_q)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, expected in zip(found, [features.grad, *(p.grad for p in quantizer.parameters())], strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(gradient, expected)


def test_index_gradients_over_scales():
    quantizer = build(LearnedCodebook(V, C, init_scale=1.0, gradient="index"), SCALES)
    features, weights = random(3, C, 2, 2).requires_grad_(), random(3, C, 2, 2, seed=1)
    result, loss, idx_BL = quantizer(features)
    ((result * weights).sum() + 2 * loss).backward()
    found = [features.grad.clone(), *(parameter.grad.clone() for parameter in quantizer.parameters())]
    features.grad = None
    quantizer.zero_grad()
    table, phi = quantizer.codebook.weight, quantizer.codec.phi[0]
    rest, z_q, quantized, expected_loss, indices = features, 0, 0, 0, []
    for side in (1, 2):
        z = rows(F.interpolate(rest, size=(side, side), mode="area"))
        logits = -torch.cdist(z, table).square()
        hard, soft = F.one_hot(logits.argmax(1), V).double(), logits.softmax(1)

        def on_the_grid(index, side=side):
            small = (index @ table).view(3, side, side, C).permute(0, 3, 1, 2)
            large = F.interpolate(small, size=(2, 2), mode="bicubic") if side == 1 else small
            return 0.5 * large + 0.5 * phi(large)

        z_q = z_q + on_the_grid(hard - soft.detach() + soft)
        quantized = quantized + on_the_grid(hard)
        rest = rest - on_the_grid(hard).detach()
        expected_loss = expected_loss + (z_q - features).square().mean() / 2
        expected_loss = expected_loss + (quantized.detach() - features).square().mean() / 2
        expected_loss = expected_loss + 0.25 * (quantized - features.detach()).square().mean() / 2
        indices.append(hard.argmax(1).view(3, -1))
    ((z_q * weights).sum() + 2 * expected_loss).backward()
    assert torch.equal(idx_BL, torch.cat(indices, 1))
    torch.testing.assert_close(result, z_q)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, expected in zip(found, [features.grad, *(p.grad for p in quantizer.parameters())], strict=True):
        torch.testing.assert_close(gradient, expected)


# SimVQ


def test_simvq_learns_its_map_and_never_its_table(finite_differences):
    quantizer = build(SimVQCodebook(V, C, beta=0.4))
    codebook = quantizer.codebook
    assert [name for name, _ in codebook.named_parameters()] == ["map"]
    codebook.map.data = random(C, C, seed=5)
    features = random(3, C, 2, 2).requires_grad_()
    result, loss, idx_BL = quantizer(features)
    table, z = codebook.weight @ codebook.map.detach(), rows(features).detach()
    idx = torch.cdist(z, table).argmin(1)
    assert torch.equal(idx_BL.flatten(), idx) and idx.unique().numel() > 2
    torch.testing.assert_close(rows(result), table[idx])
    assert torch.equal(quantizer.get_codebook()[idx], quantizer.lookup(idx))
    assert loss.item() == pytest.approx(1.4 * (table[idx] - z).square().mean().item())
    (result.sum() + loss).backward()
    expected = finite_differences(
        lambda m: ((codebook.weight @ m)[idx] - z).square().mean(), codebook.map.detach().clone()
    )
    torch.testing.assert_close(codebook.map.grad, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(features.grad, 1 + 0.4 * 2 * (features - result).detach() / features.numel())


def test_simvq_starts_as_the_papers_code():
    torch.manual_seed(0)
    codebook, linear = SimVQCodebook(4000, 100), torch.nn.Linear(100, 100, bias=False)
    assert codebook.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert codebook.map.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
    assert codebook.map.abs().max().item() <= 0.1


# Product codebooks


@pytest.mark.parametrize("layout", [TILES, SCALES], ids=["tiles", "scales"])
@pytest.mark.parametrize("options", [{}, {"has_unit_codes": True}, {"ema_decay": 0.9}], ids=str)
def test_every_share_of_the_channels_has_the_nearest_code_of_its_own_table(layout, options):
    torch.manual_seed(1)
    quantizer = build(ProductCodebook([LearnedCodebook(n, 2, init_scale=1.0, **options) for n in (5, 3)]), layout)
    codebook = quantizer.codebook
    assert (codebook.num_codes, codebook.dim, quantizer.digits.bases) == (15, C, (5, 3))
    vectors = random(6, C, seed=4)
    prepared = codebook.prepare(vectors)
    low = torch.cdist(prepared[:, :2], codebook.parts[0].get_codebook()).argmin(1)
    high = torch.cdist(prepared[:, 2:], codebook.parts[1].get_codebook()).argmin(1)
    idx = codebook.assign(vectors)
    assert torch.equal(idx, low + 5 * high) and idx.unique().numel() > 3
    every = torch.arange(15)
    codes = codebook.lookup(every)
    assert torch.equal(codebook.assign(codes), every)
    assert torch.equal(codes[:, 2:], codebook.parts[1].get_codebook()[every // 5])
    features = random(3, C, 2, 2).requires_grad_()
    result, loss, idx_BL = quantizer.train()(features)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), result)
    (result.sum() + loss).backward()
    assert features.grad.abs().max() > 0
    before = [part.weight.detach().clone() for part in codebook.parts]
    quantizer.after_step(0, 1)
    moved = [not torch.equal(part.weight, weight) for part, weight in zip(codebook.parts, before, strict=True)]
    assert moved == ["ema_decay" in options] * 2
    quantizer.start_from(features.detach(), seed=0)
    with pytest.raises(ValueError, match="which has no table of its codes"):
        quantizer.get_codebook()


# Fewer scales


def test_an_image_of_fewer_scales_holds_the_first_alone():
    layout = BlockLayout.scales([1, 2, 4])
    quantizer = build(LearnedCodebook(V, C, init_scale=1.0), layout)
    features = random(4, C, 4, 4)
    num_scales = torch.tensor([1, 3, 2, 3])
    result, loss, idx_BL = quantizer(features, num_scales)
    whole, whole_loss, whole_idx = quantizer(features)
    assert torch.equal(idx_BL, whole_idx) and loss != whole_loss
    canvas, after = quantizer.start(4), []
    for k, idx in enumerate(layout.split(idx_BL)):
        canvas, _ = quantizer.advance(canvas, idx, k)
        after.append(canvas)
    for image, n in enumerate(num_scales.tolist()):
        torch.testing.assert_close(result[image], after[n - 1][image])
    torch.testing.assert_close(whole, after[2])
    every = torch.full((4,), 3)
    assert torch.equal(quantizer(features, every)[0], whole) and torch.equal(quantizer(features, every)[1], whole_loss)


@pytest.mark.parametrize("num_scales", [torch.tensor([0, 1]), torch.tensor([1, 3]), torch.tensor([1]), torch.ones(2)])
def test_other_numbers_of_scales_are_refused(num_scales):
    quantizer = build(LearnedCodebook(V, C), SCALES)
    with pytest.raises(ValueError, match="num_scales is .*; expected"):
        quantizer(random(2, C, 2, 2), num_scales)
    with pytest.raises(ValueError, match="num_scales is given; expected None for tiles"):
        build(LearnedCodebook(V, C))(random(2, C, 2, 2), torch.tensor([1, 1]))
