"""The adversarial half: schedule, what gets gradients, adaptive factor, LeCam averages, refusals."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from nextblock.tokenizer.adversarial import (
    Adversary,
    DiscriminatorConfig,
    LogitAverages,
    build_discriminator,
    frozen,
    generator_weight,
    last_weight,
)
from nextblock.tokenizer.autoencoder import SimpleDecoder, VQGANDecoder

TINY = {"weight": 0.5, "num_layers": 1, "base_width": 4}


@pytest.fixture
def make_adversary(fresh_accelerate):
    """Build an adversary in float64 with GroupNorm, biases included."""

    def make(**options) -> Adversary:
        config = DiscriminatorConfig(**TINY | options)
        torch.manual_seed(0)
        discriminator = build_discriminator(config, 3, [8, 8]).double()
        for parameter in discriminator.parameters():
            nn.init.normal_(parameter, std=0.3)
        accelerator = Accelerator(cpu=True)
        return Adversary(accelerator, accelerator.prepare(discriminator), config)

    return make


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64) - 1


def test_the_weight_starts_late_and_rises_linearly():
    late = DiscriminatorConfig(weight=0.8, start_step=2, generator_start_step=5, generator_warmup_steps=4)
    weights = [generator_weight(step, late) for step in range(11)]
    assert weights == pytest.approx([0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert [generator_weight(step, DiscriminatorConfig(weight=0.8)) for step in (0, 9)] == [0.8, 0.8]
    assert [generator_weight(step, DiscriminatorConfig(weight=0.8, start_step=3)) for step in (2, 3)] == [0, 0.8]


def test_before_its_start_the_term_costs_and_adds_nothing(make_adversary, monkeypatch):
    adversary = make_adversary(start_step=2, generator_start_step=4)
    monkeypatch.setattr(adversary.discriminator, "forward", lambda _: pytest.fail("the discriminator was asked"))
    added, terms = adversary.generator_terms(images(0), torch.tensor(1.0), None, step=3)
    assert added == 0 and terms == {"adversarial": 0, "adversarial_weight": 0}
    assert [adversary.is_training_at(step) for step in (1, 2, 3)] == [False, True, True]


def test_the_generator_pass_leaves_the_discriminator_without_gradient(make_adversary):
    adversary = make_adversary(is_weight_adaptive=False)
    reconstruction = images(0).requires_grad_()
    added, terms = adversary.generator_terms(reconstruction, torch.tensor(1.0), None, step=0)
    assert added.item() == pytest.approx(0.5 * terms["adversarial"].item()) and terms["adversarial_weight"] == 0.5
    added.backward()
    logits = adversary.discriminator(images(0).requires_grad_())
    assert terms["adversarial"].item() == pytest.approx(-logits.mean().item())
    assert reconstruction.grad.abs().max() > 0
    for parameter in adversary.discriminator.parameters():
        assert parameter.grad is None and parameter.requires_grad
    assert adversary.discriminator.training


def test_a_step_along_the_term_raises_logits(make_adversary):
    for kind in ("hinge", "non_saturating", "vanilla"):
        adversary = make_adversary(is_weight_adaptive=False, loss=kind)
        reconstruction = images(0).requires_grad_()
        adversary.generator_terms(reconstruction, torch.tensor(1.0), None, step=0)[0].backward()
        with torch.no_grad():
            before = adversary.discriminator(reconstruction).mean()
            assert adversary.discriminator(reconstruction - reconstruction.grad).mean() > before


def test_the_adaptive_factor_is_the_ratio_at_the_last_weight(make_adversary):
    for maximum in (1e4, 0.01):
        adversary = make_adversary(max_adaptive_weight=maximum, generator_warmup_steps=2)
        weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        base, direction = images(0), images(1)
        reconstruction = 0.1 * weight[0] * base + 0.1 * weight[1] * direction
        compared = reconstruction.square().mean()
        added, terms = adversary.generator_terms(reconstruction, compared, weight, step=0)
        first, second = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (compared, terms["adversarial"]))
        factor = min((first.norm() / (second.norm() + 1e-4)).item(), maximum)
        assert terms["adversarial_weight"].item() == pytest.approx(0.25 * factor, rel=1e-12)
        # The factor is a constant: only the term itself is differentiated.
        torch.testing.assert_close(torch.autograd.grad(added, weight)[0], 0.25 * factor * second)


def test_the_factor_does_not_depend_on_the_loss_scale(make_adversary):
    adversary = make_adversary(r1_weight=1.0)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def terms() -> list[torch.Tensor]:
        reconstruction = weight * images(0)
        found = adversary.generator_terms(reconstruction, reconstruction.square().mean(), weight, step=0)[1]
        return [found["adversarial_weight"], adversary.discriminator_losses(images(1), reconstruction, 0)["r1"]]

    unscaled = terms()
    adversary.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    adversary.accelerator.scaler.scale(torch.zeros(()))
    assert adversary._loss_scale() == 2.0**16 and torch.equal(torch.stack(terms()), torch.stack(unscaled))


def test_the_discriminator_learns_without_reaching_the_tokenizer(make_adversary):
    adversary = make_adversary(r1_weight=1.0, lecam_weight=1.0)
    pixel_values, reconstruction = images(0), images(1).requires_grad_()
    adversary.discriminator_losses(pixel_values, reconstruction, step=0)["loss"].backward()
    assert reconstruction.grad is None and not pixel_values.requires_grad and pixel_values.grad is None
    for parameter in adversary.discriminator.parameters():
        assert parameter.grad.isfinite().all()


def test_the_discriminators_loss_is_the_weighted_sum_of_its_terms(make_adversary):
    adversary = make_adversary(r1_weight=3.0, r1_every=4, lecam_weight=0.2, start_step=2)
    adversary.averages.means.copy_(torch.tensor([-0.7, 0.4]))
    pixel_values, reconstruction = images(0), images(1)
    real, fake = adversary.discriminator(pixel_values), adversary.discriminator(reconstruction)
    for step in (2, 3):
        losses = {k: v.item() for k, v in adversary.discriminator_losses(pixel_values, reconstruction, step).items()}
        assert (losses["real"], losses["fake"]) == pytest.approx((real.mean().item(), fake.mean().item()))
        hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()).item()
        lecam = ((real - 0.4).relu() ** 2).mean().item() + ((-0.7 - fake).relu() ** 2).mean().item()
        assert (losses["adversarial"], losses["lecam"]) == pytest.approx((hinge, lecam), rel=1e-6)
        assert losses["loss"] == pytest.approx(hinge + 0.2 * lecam + 3 * losses["r1"], rel=1e-6)
        # A penalty every four steps, counted four times.
        assert (losses["r1"] > 0) == (step == 2)
        if step == 2:
            leaf = pixel_values.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(adversary.discriminator(leaf).mean((1, 2, 3)).sum(), leaf)
            assert losses["r1"] == pytest.approx(4 * 0.5 * gradient.square().sum((1, 2, 3)).mean().item())


def test_lecam_averages():
    averages = LogitAverages(decay=0.75).double()
    averages.update(torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert averages.means.tolist() == [2.0, -1.0]
    averages.update(torch.tensor([4.0, 3.0], dtype=torch.float64))
    assert averages.means.tolist() == [2.5, 0.0]
    averages.update(torch.tensor([math.inf, 0.0], dtype=torch.float64))
    assert averages.means.tolist() == [2.5, 0.0] and averages.num_updates == 2
    restored = LogitAverages(decay=0.75).double()
    restored.load_state_dict(averages.state_dict())
    restored.update(torch.tensor([2.5, 4.0], dtype=torch.float64))
    assert restored.means.tolist() == [2.5, 1.0]


def test_frozen_stops_gradients_and_power_iteration():
    config = DiscriminatorConfig(**TINY, norm="spectral")
    discriminator = build_discriminator(config, 3, [8, 8])
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    with frozen(discriminator):
        assert not any(parameter.requires_grad for parameter in discriminator.parameters())
        discriminator(torch.zeros(1, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in discriminator.state_dict().items())
    assert discriminator.training and all(parameter.requires_grad for parameter in discriminator.parameters())


@pytest.mark.parametrize("num_res_blocks", [0, 1])
def test_last_weight_makes_the_pixels(num_res_blocks):
    simple = SimpleDecoder(3, 8, num_res_blocks, 4, 0.0)
    assert last_weight(simple) is simple[-1].weight
    vqgan = VQGANDecoder(3, 8, [1, 2], 1, 4, 0.0)
    assert last_weight(vqgan) is vqgan.conv_out.weight


def test_images_must_hold_a_patch():
    build_discriminator(DiscriminatorConfig(num_layers=3, base_width=2), 3, [24, 24])
    with pytest.raises(ValueError, match="num_layers is 3; expected images of at least 24 pixels a side.*16, 64"):
        build_discriminator(DiscriminatorConfig(num_layers=3), 3, [16, 64])


def test_options_outside_their_range_are_refused():
    for options, message in (
        ({"weight": -0.1}, "weight is -0.1; expected a finite number"),
        ({"weight": math.nan}, "weight is nan"),
        ({"max_adaptive_weight": -1}, "max_adaptive_weight is -1"),
        ({"lecam_weight": -1}, "lecam_weight is -1"),
        ({"r1_weight": math.inf}, "r1_weight is inf"),
        ({"loss": "wasserstein"}, "loss is 'wasserstein'; expected one of"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of"),
        ({"num_layers": 0}, "num_layers is 0; expected at least 1"),
        ({"base_width": 0}, "base_width is 0; expected at least 1"),
        ({"start_step": -1}, "start_step is -1; expected at least 0"),
        ({"start_step": 9, "generator_start_step": 8}, "generator_start_step is 8; expected at least 9"),
        ({"generator_warmup_steps": -1}, "generator_warmup_steps is -1; expected at least 0"),
        ({"r1_every": 0}, "r1_every is 0; expected at least 1"),
        ({"lecam_decay": 1.0}, r"lecam_decay is 1.0; expected a number in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscriminatorConfig(**options)
