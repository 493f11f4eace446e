"""Losses of tokenizer training, as pure functions."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class TokenizerLossConfig:
    """Weights of the terms whose sum is minimised."""

    l1_weight: float = 1.0
    """Weight of the mean absolute error of pixels."""
    l2_weight: float = 1.0
    """Weight of the mean squared error of pixels."""
    vq_weight: float = 1.0
    """Weight of the quantizer's codebook and commitment loss."""

    def __post_init__(self):
        for name in ("l1_weight", "l2_weight", "vq_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.l1_weight == self.l2_weight == 0:
            raise ValueError("l1_weight and l2_weight are 0; expected at least one of them above 0")


def tokenizer_losses(
    reconstruction: Tensor, pixel_values: Tensor, vq_loss: Tensor, config: TokenizerLossConfig
) -> dict[str, Tensor]:
    """Compute every term, unweighted, and their weighted sum.

    Args:
        reconstruction: (B, 3, H, W).
        pixel_values: (B, 3, H, W) in [-1, 1].
        vq_loss: scalar from the quantizer.
        config: the weights.

    Returns:
        `l1`, `l2` and `vq`, and the sum to minimise as `loss`; all scalars, in float32 at least.
    """
    if reconstruction.dtype != pixel_values.dtype:
        reconstruction = reconstruction.to(pixel_values.dtype)
    l1, l2 = F.l1_loss(reconstruction, pixel_values), F.mse_loss(reconstruction, pixel_values)
    loss = config.l1_weight * l1 + config.l2_weight * l2 + config.vq_weight * vq_loss
    return {"loss": loss, "l1": l1, "l2": l2, "vq": vq_loss}
