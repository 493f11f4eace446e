"""PatchGAN discriminator and the pure functions of adversarial training.

Sources: Isola et al. 2017 (arXiv:1611.07004), spectral norm 1802.05957, LeCam 2104.03310, R1 1801.04406.
Legend: B batch, HxW pixels, P patches an image is judged by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .autoencoder import group_norm

# Wider layers than this gain nothing at any number of layers.
_MAX_WIDTH_FACTOR = 8


class PatchDiscriminator(nn.Module):
    """Judge every patch of an image by a logit: above 0 real, below 0 reconstructed.

    Args:
        num_channels: image channels.
        base_width: channels of the first convolution; each further one doubles them, up to eightfold.
        num_layers: stride-2 convolutions; the more, the larger a patch.
        norm: "group" (GroupNorm) or "spectral" (every convolution's largest singular value is 1).
    """

    def __init__(self, num_channels: int = 3, base_width: int = 64, num_layers: int = 3, norm: str = "group"):
        super().__init__()
        widths = [base_width * min(2**i, _MAX_WIDTH_FACTOR) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(num_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(width_in, width, 4, stride=stride, padding=1))
            if norm == "group":
                layers.append(group_norm(width))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if norm == "spectral":
            layers = [spectral_norm(layer) if isinstance(layer, nn.Conv2d) else layer for layer in layers]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, 1, p_h, p_w) of images (B, C, H, W) in [-1, 1]."""
        return self.layers(pixel_values)


def patch_grid(image_size: tuple[int, int], num_layers: int) -> tuple[int, int]:
    """Return how many patches high and wide the discriminator sees an image; 0 or less where it is too small.

    Args:
        image_size: (H, W).
        num_layers: stride-2 convolutions.
    """
    # Each halving rounds down, and the two last convolutions shrink the map by one cell each.
    height, width = (side // 2**num_layers - 2 for side in image_size)
    return height, width


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str) -> Tensor:
    """Compute what the discriminator minimises.

    Args:
        logits_real: of images, any shape.
        logits_fake: of reconstructions, any shape.
        kind: "hinge", "non_saturating" or "vanilla"; the last two are both logistic.

    Returns:
        Scalar, the mean of the loss on real and on reconstructed patches.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor, kind: str) -> Tensor:
    """Compute the adversarial term that the tokenizer minimises.

    Args:
        logits_fake: of reconstructions, any shape.
        kind: "hinge" and "vanilla": −mean logit, as in VQGAN; "non_saturating": mean −log σ(logit).

    Returns:
        Scalar.
    """
    return F.softplus(-logits_fake).mean() if kind == "non_saturating" else -logits_fake.mean()


def lecam_penalty(logits_real: Tensor, logits_fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """Hold logits near the moving average of the other side (LeCam regularisation).

    Args:
        logits_real: of images, any shape.
        logits_fake: of reconstructions, any shape.
        average_real: scalar moving average of mean logits of images, without gradient.
        average_fake: the same of reconstructions.

    Returns:
        Scalar mean relu(real − average_fake)² + mean relu(average_real − fake)².
    """
    above = F.relu(logits_real - average_fake).square().mean()
    return above + F.relu(average_real - logits_fake).square().mean()


def r1_penalty(logits_real: Tensor, pixel_values: Tensor, gradient_scale: Tensor | float = 1.0) -> Tensor:
    """Compute ½ E‖∇D(x)‖², where D(x) is the mean logit of image x.

    Args:
        logits_real: (B, 1, p_h, p_w), computed from `pixel_values`.
        pixel_values: (B, C, H, W) with requires_grad.
        gradient_scale: factor on the inner gradient while it is computed, which keeps half types from underflow.

    Returns:
        Scalar that can be differentiated with respect to the discriminator's weights.
    """
    outputs = logits_real.flatten(1).mean(1).sum() * gradient_scale
    (gradient,) = torch.autograd.grad(outputs, pixel_values, create_graph=True)
    return 0.5 * (gradient / gradient_scale).square().sum((1, 2, 3)).mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float) -> Tensor:
    """Balance the adversarial term against the reconstruction loss, as VQGAN does.

    Args:
        reconstruction_gradient: of the reconstruction loss with respect to the decoder's last weight.
        adversarial_gradient: of the adversarial term with respect to the same.
        maximum: upper clamp.

    Returns:
        Scalar ‖first‖ / (‖second‖ + 1e-4) in [0, maximum], without gradient.
    """
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return ratio.clamp(0, maximum).detach()
