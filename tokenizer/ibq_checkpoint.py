"""IBQ's tokenizers: taming's autoencoder, and the code of largest inner product; in and out.

IBQ: Shi et al. 2024, arXiv:2412.02692.
"""

from torch import Tensor

from nextblock.tokenizer import VQVAE

from .taming_checkpoint import vqvae_from_taming, write_named_as_taming

_IMAGE_SIZE = 256


def vqvae_from_ibq(
    state: dict[str, Tensor], *, image_size: int | list[int] = _IMAGE_SIZE, takes_averages: bool = True
) -> VQVAE:
    """Build a tokenizer from the tensors of an IBQ tokenizer, by default from its averaged weights.

    Args:
        state: tensors by IBQ's names, which are taming's.
        image_size: H and W in pixels.
        takes_averages: whether averaged weights, where there are any, take the place of the plain ones.

    Returns:
        The tokenizer in float32, in evaluation mode.

    Raises:
        ValueError: as `vqvae_from_taming` does.
    """
    arithmetic = {"codebook_metric": "inner_product", "codebook_gradient": "index"}
    return vqvae_from_taming(state, image_size=image_size, takes_averages=takes_averages, **arithmetic)


def vqvae_to_ibq(model: VQVAE) -> dict[str, Tensor]:
    """Write a tokenizer's tensors under IBQ's names, as plain weights.

    Args:
        model: a tokenizer of IBQ's architecture, of any size.

    Returns:
        Float32 tensors by IBQ's names.

    Raises:
        ValueError: if IBQ cannot express the tokenizer.
    """
    return write_named_as_taming(model, "IBQ", {"codebook": ("learned",), "codebook_metric": ("inner_product",)})
