"""Tokenizer losses: known values, weights, precision, codebook entropy."""

import math

import pytest
import torch

from nextblock.tokenizer.losses import (
    TokenizerLossConfig,
    assignment_entropy,
    codebook_entropy,
    reconstruction_loss,
    tokenizer_losses,
)


def losses(reconstruction, pixel_values, vq: float = 0.5, **weights) -> dict[str, float]:
    config = TokenizerLossConfig(**weights)
    terms = tokenizer_losses(reconstruction, pixel_values, torch.tensor(vq), config)
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    return {name: term.item() for name, term in terms.items()}


def test_terms_and_their_weighted_sum():
    pixel_values = torch.zeros(2, 3, 2, 2)
    reconstruction = torch.zeros(2, 3, 2, 2)
    reconstruction[0] = 0.5
    reconstruction[1, 0] = -1.0
    # Of 24 values 12 are off by a half and 4 by one.
    l1, l2 = 10 / 24, 7 / 24
    assert losses(reconstruction, pixel_values) == pytest.approx({"loss": l1 + l2 + 0.5, "l1": l1, "l2": l2, "vq": 0.5})
    weighted = losses(reconstruction, pixel_values, l1_weight=0.0, l2_weight=3.0, vq_weight=0.25)
    assert weighted == pytest.approx({"loss": 3 * l2 + 0.125, "l1": l1, "l2": l2, "vq": 0.5})
    assert losses(pixel_values, pixel_values, vq=0.0)["loss"] == 0.0


def test_half_precision_reconstructions_are_compared_in_float32():
    pixel_values = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    reconstruction = (pixel_values + 0.25).bfloat16()
    assert losses(reconstruction, pixel_values) == losses(reconstruction.float(), pixel_values)


def test_every_term_reaches_the_gradient():
    reconstruction = torch.full((1, 3, 1, 1), 0.5, requires_grad=True)
    vq_loss = torch.tensor(1.0, requires_grad=True)
    config = TokenizerLossConfig(l1_weight=2.0, l2_weight=3.0, vq_weight=4.0)
    tokenizer_losses(reconstruction, torch.zeros(1, 3, 1, 1), vq_loss, config)["loss"].backward()
    assert reconstruction.grad.flatten().tolist() == pytest.approx([(2 + 3 * 2 * 0.5) / 3] * 3)
    assert vq_loss.grad == 4.0


def test_weights_outside_their_range_are_refused():
    for name in ("l1_weight", "l2_weight", "vq_weight"):
        for value in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name} is {value}; expected at least 0"):
                TokenizerLossConfig(**{name: value})
    with pytest.raises(ValueError, match="l1_weight and l2_weight are 0"):
        TokenizerLossConfig(l1_weight=0, l2_weight=0)


def entropy_of(features: torch.Tensor, codes: torch.Tensor, temperature: float) -> torch.Tensor:
    """The definition, on the whole matrix of assignments."""
    p = (-torch.cdist(features, codes).square() / temperature).softmax(1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


def random_pair(num_features: int, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (num_features, num_codes)]
    return draw[0], draw[1]


def test_codebook_entropy_equals_its_definition_in_chunks_of_any_size(monkeypatch, finite_differences):
    features, codes = random_pair(7, 5)
    for chunk_bytes in (1, 2 * 5 * 8, 1 << 24):
        monkeypatch.setattr("nextblock.tokenizer.losses._CHUNK_BYTES", chunk_bytes)
        for temperature in (0.3, 1.0, 20.0):
            leaves = [features.clone().requires_grad_(), codes.clone().requires_grad_()]
            value = codebook_entropy(*leaves, temperature)
            assert value.item() == pytest.approx(entropy_of(features, codes, temperature).item(), rel=1e-12)
            value.backward()
            expected = finite_differences(lambda x, t=temperature: entropy_of(x, codes, t), features)
            torch.testing.assert_close(leaves[0].grad, expected, rtol=0, atol=1e-8)
            expected = finite_differences(lambda x, t=temperature: entropy_of(features, x, t), codes)
            torch.testing.assert_close(leaves[1].grad, expected, rtol=0, atol=1e-8)


def test_codebook_entropy_is_least_for_sure_assignments_to_every_code():
    codes = 100 * torch.eye(4)
    assert codebook_entropy(codes, codes, 1.0).item() == pytest.approx(-math.log(4))
    # All features on one code: sure, but only one code is used.
    assert codebook_entropy(codes[:1].repeat(4, 1), codes, 1.0).item() == pytest.approx(0, abs=1e-6)
    # As far from each code as from the other: each assignment spreads over all codes.
    assert codebook_entropy(torch.zeros(4, 4), codes, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_codebook_entropy_of_underflowing_probabilities_has_a_finite_gradient():
    features = torch.zeros(2, 1, requires_grad=True)
    codebook_entropy(features, torch.tensor([[0.0], [1000.0]]), 1.0).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"tile": 2},
        {"tile": 2, "codebook_metric": "cosine", "has_unit_codes": True},
        {"tile": 2, "codebook_metric": "euclidean", "has_unit_codes": True},
        {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2},
        {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2, "codebook_metric": "cosine"},
        {"tile": 2, "codebook_update": "ema"},
    ],
)
def test_assignment_entropy_uses_the_quantizers_own_distance(options, make_vqvae, make_images):
    model = make_vqvae(image_size=16, **options).double()
    features = model(make_images(model, dtype=torch.float64)).features.detach().requires_grad_()
    vectors = model.quantizer.training_vectors(features).flatten(0, 1)
    codes = model.quantizer.get_codebook()
    if options.get("codebook_metric") == "cosine":
        vectors, codes = torch.nn.functional.normalize(vectors), torch.nn.functional.normalize(codes)
    value = assignment_entropy(model.quantizer, features, 0.1)
    assert len(vectors) == 2 * (21 if "layout" in options else 16)
    assert value.item() == pytest.approx(entropy_of(vectors, codes, 0.1).item(), rel=1e-9)
    # The code that is nearest is the one of largest assignment.
    nearest = torch.cdist(vectors, codes).argmin(1)
    assert torch.equal(nearest, model.quantizer.codebook.assign(vectors.detach()))
    value.backward()
    assert features.grad.abs().max() > 0


def test_assignment_entropy_by_inner_products(make_vqvae, make_images):
    model = make_vqvae(image_size=16, codebook_metric="inner_product").double()
    with torch.no_grad():
        model.quantizer.codebook.weight.mul_(torch.linspace(0.5, 3, 24)[:, None])
    features = model(make_images(model, dtype=torch.float64)).features.detach().requires_grad_()
    vectors = model.quantizer.training_vectors(features).flatten(0, 1)
    codes = model.quantizer.codebook.weight
    p = (2 * vectors @ codes.T / 0.1).softmax(1)
    expected = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    value = assignment_entropy(model.quantizer, features, 0.1)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.equal(p.argmax(1), model.quantizer.codebook.assign(vectors.detach()))
    got = torch.autograd.grad(value, [features, codes])
    for ours, reference in zip(got, torch.autograd.grad(expected, [features, codes]), strict=True):
        assert torch.allclose(ours, reference, atol=1e-9)


def test_the_reconstruction_loss_leaves_the_quantizer_out():
    config = TokenizerLossConfig(l1_weight=2.0, l2_weight=3.0, vq_weight=4.0)
    terms = {"l1": torch.tensor(0.5), "l2": torch.tensor(0.25), "vq": torch.tensor(9.0)}
    assert reconstruction_loss(terms, config).item() == 1.75


def test_entropy_options_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="entropy_weight is -1; expected at least 0"):
        TokenizerLossConfig(entropy_weight=-1)
    for value in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"entropy_temperature is {value}; expected a number above 0"):
            TokenizerLossConfig(entropy_temperature=value)
