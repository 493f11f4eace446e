"""Discriminator: sizes, norms, and every adversarial loss against its closed form or finite differences."""

import math

import pytest
import torch
from torch import nn

from nextblock.tokenizer.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    patch_grid,
    r1_penalty,
)

REAL = torch.tensor([0.3, 2.0, -1.5], dtype=torch.float64)
FAKE = torch.tensor([0.7, -3.0, 0.2], dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_discriminator_losses_equal_their_closed_forms():
    # Of the real logits 2.0 and of the fake ones −3.0 are beyond the margin.
    hinge = 0.5 * ((0.7 + 0 + 2.5) / 3 + (1.7 + 0 + 1.2) / 3)
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(hinge, rel=1e-12)
    logistic = -sum(log_sigmoid(x) for x in (0.3, 2.0, -1.5)) / 3 - sum(log_sigmoid(-x) for x in (0.7, -3.0, 0.2)) / 3
    for kind in ("non_saturating", "vanilla"):
        assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(0.5 * logistic, rel=1e-12)


def test_generator_losses_equal_their_closed_forms():
    for kind in ("hinge", "vanilla"):
        assert generator_loss(FAKE, kind).item() == pytest.approx((3.0 - 0.7 - 0.2) / 3, rel=1e-12)
    expected = -sum(log_sigmoid(x) for x in (0.7, -3.0, 0.2)) / 3
    assert generator_loss(FAKE, "non_saturating").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating", "vanilla"])
def test_the_two_sides_pull_logits_apart(kind, finite_differences):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad <= 0).all() and real.grad.min() < 0 and (fake.grad >= 0).all() and fake.grad.max() > 0
    for tensor, function in (
        (real, lambda x: discriminator_loss(x, FAKE, kind)),
        (fake, lambda x: discriminator_loss(REAL, x, kind)),
    ):
        torch.testing.assert_close(tensor.grad, finite_differences(function, tensor.detach()), rtol=0, atol=1e-8)
    fake = FAKE.clone().requires_grad_()
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()
    expected = finite_differences(lambda x: generator_loss(x, kind), FAKE)
    torch.testing.assert_close(fake.grad, expected, rtol=0, atol=1e-8)


def test_lecam_holds_each_side_near_the_average_of_the_other():
    average_real, average_fake = torch.tensor([0.5, -0.4], dtype=torch.float64)
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    penalty = lecam_penalty(real, fake, average_real, average_fake)
    # Real logits above the fake average −0.4: by 0.7 and 2.4; fake ones below the real average 0.5: by 3.5 and 0.3.
    assert penalty.item() == pytest.approx((0.7**2 + 2.4**2) / 3 + (3.5**2 + 0.3**2) / 3, rel=1e-12)
    penalty.backward()
    torch.testing.assert_close(real.grad, torch.tensor([1.4, 4.8, 0.0], dtype=torch.float64) / 3)
    torch.testing.assert_close(fake.grad, torch.tensor([0.0, -7.0, -0.6], dtype=torch.float64) / 3)


def test_r1_of_a_linear_discriminator_is_half_its_squared_weight():
    weight = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    # Two patches an image, the second with three times the first's logit: their mean is twice the first.
    first = (images.flatten(1) * weight).sum(1)
    logits = torch.stack([first, 3 * first], dim=1).view(5, 1, 1, 2)
    for scale in (1.0, 1024.0):
        penalty = r1_penalty(logits, images, scale)
        assert penalty.item() == pytest.approx(0.5 * 4 * weight.square().sum().item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(penalty, weight, retain_graph=True)
        torch.testing.assert_close(gradient, 4 * weight.detach())


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_r1_trains_weights_as_finite_differences_say(norm, finite_differences):
    torch.manual_seed(0)
    model = PatchDiscriminator(3, base_width=2, num_layers=1, norm=norm).double().eval()
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, nn.Conv2d):
                layer.bias.normal_()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    bias = model.layers[2].bias

    def penalty(value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            bias.copy_(value)
        pixel_values = images.clone().requires_grad_()
        return r1_penalty(model(pixel_values), pixel_values)

    start = bias.detach().clone()
    loss = penalty(start)
    (gradient,) = torch.autograd.grad(loss, bias, allow_unused=True)
    expected = finite_differences(lambda value: penalty(value).detach(), start)
    gradient = torch.zeros_like(start) if gradient is None else gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
    assert loss > 0


def test_adaptive_weight_is_the_clamped_ratio_of_norms():
    first = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([0.0, 2.0], dtype=torch.float64)
    weight = adaptive_weight(first, second, 1e4)
    assert weight.item() == pytest.approx(5 / 2.0001, rel=1e-12) and not weight.requires_grad
    assert adaptive_weight(first, second, 1.5).item() == 1.5
    assert adaptive_weight(first, torch.zeros(2, dtype=torch.float64), 1e4).item() == 1e4
    assert adaptive_weight(torch.zeros(2), second, 1e4).item() == 0


@pytest.mark.parametrize("norm", ["group", "spectral"])
@pytest.mark.parametrize(("num_layers", "size"), [(1, (6, 9)), (2, (16, 24)), (3, (64, 31))])
def test_patches_cover_images_of_any_shape(norm, num_layers, size):
    model = PatchDiscriminator(3, base_width=4, num_layers=num_layers, norm=norm)
    assert model(torch.zeros(2, 3, *size)).shape == (2, 1, *patch_grid(size, num_layers))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules()) == (norm == "group")


def test_a_logit_sees_a_patch_of_its_size():
    for num_layers, patch in ((1, 16), (2, 34), (3, 70)):
        side = 128
        # GroupNorm sees the whole image; spectral norm leaves the patch alone.
        model = PatchDiscriminator(1, base_width=2, num_layers=num_layers, norm="spectral").eval()
        image = torch.rand(1, 1, side, side, requires_grad=True)
        height, width = patch_grid((side, side), num_layers)
        (gradient,) = torch.autograd.grad(model(image)[0, 0, height // 2, width // 2], image)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        assert rows.max() - rows.min() + 1 == patch


def test_images_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, base_width=8, num_layers=2).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=0, atol=1e-12)


def test_widths_double_up_to_eightfold():
    model = PatchDiscriminator(3, base_width=4, num_layers=5)
    widths = [layer.out_channels for layer in model.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_spectral_norm_makes_the_largest_singular_value_one():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, base_width=8, num_layers=1, norm="spectral")
    for _ in range(30):
        model(torch.zeros(1, 3, 8, 8))
    for layer in model.eval().layers:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=1e-2)
