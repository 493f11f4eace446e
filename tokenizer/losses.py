"""Losses of tokenizer training, as pure functions.

Codebook entropy: MAGVIT-v2 (arXiv:2310.05737). Legend: B batch, N features, V codes, C code channels, HxW pixels.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .processes import all_reduced, num_connected_processes
from .quantizer import Quantizer

# One chunk of the N×V assignment probabilities in bytes.
_CHUNK_BYTES = 1 << 24


@dataclass(kw_only=True)
class TokenizerLossConfig:
    """Weights of the terms whose sum is minimised."""

    l1_weight: float = 1.0
    """Weight of the mean absolute error of pixels."""
    l2_weight: float = 1.0
    """Weight of the mean squared error of pixels."""
    vq_weight: float = 1.0
    """Weight of the quantizer's codebook and commitment loss."""
    entropy_weight: float = 0.0
    """Weight of the codebook entropy term, which makes each feature choose one code and all features use every code."""
    entropy_temperature: float = 1.0
    """Squared distance over which a soft assignment of the entropy term falls by a factor e."""
    entropy_diversity: float = 1.0
    """Weight, within the entropy term, of using every code against choosing one."""

    def __post_init__(self):
        for name in ("l1_weight", "l2_weight", "vq_weight", "entropy_weight", "entropy_diversity"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if not self.entropy_temperature > 0:
            raise ValueError(f"entropy_temperature is {self.entropy_temperature}; expected a number above 0")
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


def reconstruction_loss(losses: dict[str, Tensor], config: TokenizerLossConfig) -> Tensor:
    """Return the weighted sum of the pixel terms among `tokenizer_losses`."""
    return config.l1_weight * losses["l1"] + config.l2_weight * losses["l2"]


def assignment_entropy(
    quantizer: Quantizer, features: Tensor, temperature: float, diversity: float = 1.0
) -> Tensor:
    """Compute the entropy term of a feature map under a quantizer's own codes and distance.

    Of a codebook without a table it is the sum over channels taken together to 1024 codes at most (Zhao et al. 2024,
    arXiv:2406.07548): the entropy of a feature's assignment is then exactly that over all V codes, which are assigned
    channel by channel; that of the mean assignment is as if such groups of channels were independent.

    Args:
        quantizer: of a tokenizer.
        features: (B, C, h, w) before quantization.
        temperature: above 0.
        diversity: weight of the entropy of the mean assignment.

    Returns:
        Scalar in [−diversity · ln V, ln V].

    Raises:
        ValueError: if the codes are in no table and no product of such.
    """
    entropies = [assignment_entropies(*factor, temperature) for factor in quantizer.factors(features)]
    return sum(of_each - diversity * of_mean for of_each, of_mean in entropies)


def codebook_entropy(features: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Compute the mean entropy of each feature's soft code assignment minus the entropy of their mean.

    Args:
        features: (N, C), with gradient.
        codes: (V, C) of the same dtype.
        temperature: above 0.

    Returns:
        Scalar in [−ln V, 0].
    """
    of_each, of_mean = assignment_entropies(features, codes, temperature)
    return of_each - of_mean


def assignment_entropies(features: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the mean entropy of each feature's soft code assignment, and the entropy of their mean.

    Assignments are softmax(−squared distance / temperature). Several processes share one mean. The whole N×V matrix
    never exists: chunks of it are computed again in the backward pass.

    Args:
        features: (N, C), with gradient.
        codes: (V, C) of the same dtype.
        temperature: above 0.

    Returns:
        Two scalars in [0, ln V], the first of this process's features alone.
    """
    rows = max(1, _CHUNK_BYTES // (len(codes) * features.element_size()))
    entropy, mean = features.new_zeros(()), features.new_zeros(len(codes))
    recomputed = partial(checkpoint, _assignment_sums, use_reentrant=False, preserve_rng_state=False)
    # A single chunk is kept: computing it again takes a third of the time.
    sums = _assignment_sums if len(features) <= rows else recomputed
    for chunk in features.split(rows):
        chunk_entropy, chunk_mass = sums(chunk, codes, temperature)
        entropy, mean = entropy + chunk_entropy / len(features), mean + chunk_mass / len(features)
    if num_connected_processes() > 1:
        # The value of the mean over all processes with the gradient of this one's: averaged gradients are then exact.
        shared = all_reduced(mean.detach().clone()) / num_connected_processes()
        mean = shared + (mean - mean.detach())
    # A probability that underflows to 0 would have an infinite gradient.
    return entropy, torch.special.entr(mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()


def _assignment_sums(features: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sum over features of the entropies of their assignments, and of the assignments (V,)."""
    # |z|² is the same for every code and cancels.
    logits = torch.addmm(codes.square().sum(1), features, codes.t(), alpha=-2.0) / -temperature
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return -(p * log_p).sum(), p.sum(0)
