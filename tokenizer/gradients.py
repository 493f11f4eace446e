"""How a quantized map passes its gradient on to the features that it was made of, as pure functions.

Straight through (van den Oord et al. 2017, arXiv:1711.00937), the rotation trick (Fifty et al. 2024, arXiv:2410.06424),
index back-propagation (IBQ: Shi et al. 2024, arXiv:2412.02692). Legend: B batch, N vectors, V codes, C code channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# One chunk of the N×V matrix of probabilities in bytes.
_CHUNK_BYTES = 1 << 24


def straight_through(features: Tensor, quantized: Tensor) -> Tensor:
    """Give features the gradient of the quantized map as if they were it.

    Args:
        features: (B, C, …), with gradient.
        quantized: of the same shape; gets no gradient.

    Returns:
        The quantized map.
    """
    return features + (quantized - features).detach()


def rotated(features: Tensor, quantized: Tensor, epsilon: float) -> Tensor:
    """Give features the gradient of the rotation and stretching that take each vector onto its quantized one.

    Args:
        features: (B, C, …), with gradient.
        quantized: of the same shape; gets no gradient, nor do rotation and stretching.
        epsilon: smallest norm that is divided by; a vector opposite to its quantized one is not rotated.

    Returns:
        The quantized map.
    """
    e, q = features.detach(), quantized.detach()
    stretch = q.norm(dim=1, keepdim=True) / e.norm(dim=1, keepdim=True).clamp_min(epsilon)
    e, q = F.normalize(e, dim=1, eps=epsilon), F.normalize(q, dim=1, eps=epsilon)
    between = F.normalize(e + q, dim=1, eps=epsilon)
    # R = I − 2·r·rᵀ + 2·q·eᵀ without a matrix.
    reflected = features - 2 * between * (between * features).sum(1, keepdim=True)
    passed = stretch * (reflected + 2 * q * (e * features).sum(1, keepdim=True))
    return passed + (quantized - passed).detach()


def passes_by_index(codebook) -> bool:
    """Tell whether a codebook's gradient goes through a softmax over all codes."""
    return getattr(codebook, "gradient", None) in ("index", "softmax")


def index_term(features: Tensor, result: Tensor, codebook) -> Tensor:
    """Return what the gradient "index" adds to the loss, the error of a map through which both sides learn.

    Args:
        features: (B, C, …), prepared, with gradient.
        result: of the same shape, from `by_index`.
        codebook: a `protocols.Codebook` that `passes_by_index`; with the gradient "softmax" nothing is added.
    """
    return F.mse_loss(result, features) if codebook.gradient == "index" else result.new_zeros(())


def passed_on(features: Tensor, quantized: Tensor, codebook) -> Tensor:
    """Return a quantized map with the gradient that a codebook asks for, straight through where it asks for none.

    Args:
        features: (B, C, …), prepared, with gradient.
        quantized: of the same shape.
        codebook: a `protocols.Codebook`.
    """
    if getattr(codebook, "gradient", "straight_through") == "rotation":
        return rotated(features, quantized, codebook.epsilon)
    return straight_through(features, quantized)


def codebook_terms(
    features: Tensor, quantized: Tensor, beta: float, gradient: str, *, has_gradient: bool = True
) -> list[Tensor]:
    """Return the loss terms of a table of codes: what draws features to codes, then what draws codes to features.

    Args:
        features: (B, C, …), with gradient.
        quantized: of the same shape, with gradient.
        beta: weight of the first of them; with the gradient "index" of the second, as IBQ has it.
        gradient: how the quantized map passes its gradient on.
        has_gradient: whether anything in the quantized map learns by gradient; the second term is left out if not.
    """
    is_by_index = gradient == "index"
    commitment = F.mse_loss(features, quantized.detach())
    terms = [commitment if is_by_index else beta * commitment]
    if has_gradient:
        codebook = F.mse_loss(quantized, features.detach())
        terms.append(beta * codebook if is_by_index else codebook)
    return terms


def by_index(codes: Tensor, expected: Tensor) -> Tensor:
    """Give the softmax over all codes the gradient of the choice of one.

    Args:
        codes: (…, C) that were chosen, with gradient.
        expected: (…, C) from `expected_codes`.

    Returns:
        The codes.
    """
    return codes + (expected - expected.detach())


def expected_codes(vectors: Tensor, codes: Tensor, *, is_inner: bool = False) -> Tensor:
    """Return the mean code under a softmax over all codes, whose probabilities alone have a gradient.

    The whole N×V matrix never exists: chunks of it are computed again in the backward pass.

    Args:
        vectors: (…, C), with gradient.
        codes: (V, C) of the same dtype, with gradient by the softmax.
        is_inner: whether the softmax is of inner products, else of negative squared distances.

    Returns:
        (…, C).
    """
    rows = max(1, _CHUNK_BYTES // (len(codes) * vectors.element_size()))
    chunks = vectors.flatten(0, -2).split(rows)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    means = [checkpoint(_mean_code, chunk, codes, is_inner, **options) for chunk in chunks]
    return torch.cat(means).view(vectors.shape)


def _mean_code(vectors: Tensor, codes: Tensor, is_inner: bool) -> Tensor:
    """Return the mean codes (N, C) of a chunk."""
    # |z|² is the same for every code and cancels.
    logits = vectors @ codes.t() if is_inner else 2 * vectors @ codes.t() - codes.square().sum(1)
    return logits.softmax(1) @ codes.detach()
