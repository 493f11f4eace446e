"""The adversarial half of tokenizer training: schedule, generator term, discriminator loss, LeCam averages.

Legend: B batch, HxW pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nextblock.training.optim import OptimizerConfig
from nextblock.training.precision import full_precision

from .discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    patch_grid,
    r1_penalty,
)


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Adversarial training of the tokenizer against a PatchGAN discriminator."""

    weight: float = 0.0
    """Weight of the adversarial term in the tokenizer's loss; 0 builds no discriminator."""
    loss: Literal["hinge", "non_saturating", "vanilla"] = "hinge"
    """"hinge"; "non_saturating" (logistic); or "vanilla": logistic for the discriminator, while the tokenizer raises
    the mean logit."""
    norm: Literal["group", "spectral"] = "group"
    """"group" (GroupNorm) or "spectral" (spectral norm of every convolution)."""
    num_layers: int = 3
    """Stride-2 convolutions; 3 judge patches of 70 pixels, 2 of 34, 1 of 16."""
    base_width: int = 64
    """Channels of the first convolution."""
    start_step: int = 0
    """Step from which the discriminator trains, from 0."""
    generator_start_step: int | None = None
    """Step from which the tokenizer's loss has the adversarial term; null is start_step."""
    generator_warmup_steps: int = 0
    """Steps over which the adversarial term's weight rises linearly from then on."""
    is_weight_adaptive: bool = True
    """Whether the weight is multiplied by the ratio of the gradient norms of reconstruction and adversarial loss at the
    decoder's last weight."""
    max_adaptive_weight: float = 1e4
    """Largest ratio."""
    lecam_weight: float = 0.0
    """Weight of LeCam regularisation, which helps where data is scarce; 0 leaves it out."""
    lecam_decay: float = 0.99
    """Decay of the moving averages of logits that LeCam holds on to."""
    r1_weight: float = 0.0
    """Weight of the gradient penalty on images (R1); 0 leaves it out."""
    r1_every: int = 16
    """Steps between gradient penalties; each counts that many times."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(betas=[0.5, 0.9], weight_decay=0.0, schedule="constant")
    )
    """The discriminator's optimizer; its schedule begins at start_step."""

    def __post_init__(self):
        for name in ("weight", "max_adaptive_weight", "lecam_weight", "r1_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number of at least 0")
        for name, choices in {
            "loss": ("hinge", "non_saturating", "vanilla"),
            "norm": ("group", "spectral"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {list(choices)}")
        if self.base_width > 1 << 12:
            raise ValueError(f"base_width is {self.base_width}; expected at most {1 << 12}")
        for name, lowest in {
            "num_layers": 1,
            "base_width": 1,
            "start_step": 0,
            "generator_start_step": self.start_step,
            "generator_warmup_steps": 0,
            "r1_every": 1,
        }.items():
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {lowest}")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"lecam_decay is {self.lecam_decay}; expected a number in [0, 1)")


def build_discriminator(config: DiscriminatorConfig, num_channels: int, image_size: list[int]) -> PatchDiscriminator:
    """Make a discriminator that fits the images.

    Args:
        config: its size.
        num_channels: of the images.
        image_size: [H, W].

    Raises:
        ValueError: if not a single patch fits into the image.
    """
    if min(patch_grid(tuple(image_size), config.num_layers)) < 1:
        raise ValueError(
            f"discriminator.num_layers is {config.num_layers}; expected images of at least "
            f"{3 * 2**config.num_layers} pixels a side, got image_size {list(image_size)}"
        )
    return PatchDiscriminator(num_channels, config.base_width, config.num_layers, config.norm)


def generator_weight(step: int, config: DiscriminatorConfig) -> float:
    """Return the adversarial term's weight at a step before any adaptive factor.

    Args:
        step: number of the step about to be taken, from 0.
        config: weight, start and warmup.
    """
    start = config.start_step if config.generator_start_step is None else config.generator_start_step
    if step < start:
        return 0.0
    return config.weight * min(1.0, (step - start + 1) / max(config.generator_warmup_steps, 1))


def last_weight(decoder: nn.Module) -> nn.Parameter:
    """Return the weight of a decoder's last convolution."""
    convolutions = [m for m in decoder.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    return convolutions[-1].weight


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Keep a module's weights without gradient, and its spectral norms without power iteration, for a while."""
    was_training = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(was_training).requires_grad_(True)


class LogitAverages(nn.Module):
    """Moving averages of the mean logits of images and of reconstructions, for LeCam regularisation.

    Args:
        decay: in [0, 1); the first update sets the averages.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def update(self, means: Tensor) -> None:
        """Move towards a step's mean logits (2,) of images and reconstructions, unless they are not finite."""
        moved = torch.where(self.num_updates > 0, torch.lerp(means, self.means, self.decay), means)
        is_finite = means.isfinite().all()
        self.means.copy_(torch.where(is_finite, moved, self.means))
        self.num_updates += is_finite


class Adversary:
    """What the discriminator makes of reconstructions, and what it learns from; the task steps its optimizer.

    Args:
        accelerator: that prepared the discriminator.
        discriminator: prepared `PatchDiscriminator`.
        config: losses, weights and schedule.
    """

    def __init__(self, accelerator: Accelerator, discriminator: nn.Module, config: DiscriminatorConfig):
        self.accelerator = accelerator
        self.discriminator = discriminator
        self.config = config
        parameter = next(discriminator.parameters())
        self.averages = LogitAverages(config.lecam_decay).to(parameter.device)
        if parameter.dtype == torch.float64:
            self.averages.double()

    def is_training_at(self, step: int) -> bool:
        """Tell whether the discriminator trains at a step."""
        return step >= self.config.start_step

    def generator_terms(
        self, reconstruction: Tensor, reconstruction_loss: Tensor, weight: nn.Parameter, step: int
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compute the adversarial term of the tokenizer's loss.

        Args:
            reconstruction: (B, 3, H, W) with gradient.
            reconstruction_loss: weighted sum of the terms that compare images.
            weight: the decoder's last weight, where the adaptive factor compares gradients.
            step: number of the step, from 0.

        Returns:
            What to add to the loss; and `adversarial`, unweighted, and `adversarial_weight`, 0 before the start.
        """
        scheduled = generator_weight(step, self.config)
        if scheduled == 0:
            zero = reconstruction_loss.new_zeros(())
            return 0.0, {"adversarial": zero, "adversarial_weight": zero}
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        with frozen(discriminator):
            term = generator_loss(full_precision(discriminator(reconstruction)), self.config.loss)
        # Filled, not copied from a number of the host's, which would wait for the device.
        total = torch.full_like(term, scheduled)
        if self.config.is_weight_adaptive:
            total = total * self._adaptive_weight(reconstruction_loss, term, weight)
        return total * term, {"adversarial": term, "adversarial_weight": total}

    def discriminator_losses(self, pixel_values: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Compute what the discriminator minimises on a micro-batch.

        Args:
            pixel_values: (B, 3, H, W).
            reconstruction: (B, 3, H, W); no gradient reaches it.
            step: number of the step, from 0.

        Returns:
            `loss`, to minimise; its terms `adversarial`, `lecam` and `r1`, unweighted; mean logits `real` and `fake`.
            `r1` is 0 between penalties and counts `r1_every` times at one, so its mean over steps is the penalty's.
        """
        config = self.config
        is_r1_due = config.r1_weight > 0 and (step - config.start_step) % config.r1_every == 0
        images = pixel_values.detach().requires_grad_(is_r1_due)
        # One pass over both halves: gradients of several processes synchronise once.
        both = torch.cat([images, reconstruction.detach().to(images.dtype)])
        real, fake = full_precision(self.discriminator(both)).chunk(2)
        loss = adversarial = discriminator_loss(real, fake, config.loss)
        lecam = r1 = loss.new_zeros(())
        if config.lecam_weight > 0:
            lecam = lecam_penalty(real, fake, *self.averages.means.unbind())
            loss = loss + config.lecam_weight * lecam
        if is_r1_due:
            r1 = config.r1_every * r1_penalty(real, images, self._loss_scale())
            loss = loss + config.r1_weight * r1
        terms = {"loss": loss, "adversarial": adversarial, "lecam": lecam, "r1": r1}
        return terms | {"real": real.detach().mean(), "fake": fake.detach().mean()}

    def update_averages(self, real: Tensor, fake: Tensor) -> None:
        """Move LeCam's averages towards a step's mean logits over all processes; every process must call it."""
        self.averages.update(self.accelerator.reduce(torch.stack([real, fake]), reduction="mean"))

    def _adaptive_weight(self, reconstruction_loss: Tensor, term: Tensor, weight: nn.Parameter) -> Tensor:
        """Return the ratio of gradient norms, of gradients averaged over processes."""
        scale = self._loss_scale()
        gradients = [
            torch.autograd.grad(loss * scale, weight, retain_graph=True)[0] / scale
            for loss in (reconstruction_loss, term)
        ]
        gradients = self.accelerator.reduce(torch.stack(gradients), reduction="mean")
        return adaptive_weight(*gradients, self.config.max_adaptive_weight)

    def _loss_scale(self) -> Tensor | float:
        """Return fp16's loss scale, 1 in other types."""
        scaler = self.accelerator.scaler
        # Its get_scale would wait for the device.
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))
