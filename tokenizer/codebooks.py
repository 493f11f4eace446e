"""Makes the codebook that a tokenizer's configuration names: the one place that chooses it."""

from .codebook_fsq import FSQCodebook
from .codebook_gumbel import GumbelCodebook
from .codebook_learned import LearnedCodebook
from .codebook_lfq import SignCodebook
from .codebook_product import ProductCodebook
from .codebook_simvq import SimVQCodebook
from .configuration_vqvae import VQVAEConfig
from .protocols import Codebook


def build_codebook(config: VQVAEConfig) -> Codebook:
    """Make the codebook, untrained.

    Args:
        config: the tokenizer's.
    """
    V, C, digit_bases = config.vocab_size, config.embedding_dim, config.codebook_digits
    if config.codebook == "fsq":
        return FSQCodebook(config.fsq_levels, digit_bases=digit_bases)
    common = {"beta": config.beta, "epsilon": config.epsilon}
    if config.codebook in ("lfq", "bsq"):
        return SignCodebook(C, is_spherical=config.codebook == "bsq", digit_bases=digit_bases, **common)
    if config.codebook == "gumbel":
        return GumbelCodebook(V, C)
    if config.codebook == "simvq":
        return SimVQCodebook(V, C, gradient=config.codebook_gradient, **common)
    if digit_bases is None:
        return _learned(config, V, C)
    return ProductCodebook([_learned(config, base, C // len(digit_bases)) for base in digit_bases])


def _learned(config: VQVAEConfig, num_codes: int, dim: int) -> LearnedCodebook:
    """Make a table of learned codes."""
    return LearnedCodebook(
        num_codes,
        dim,
        beta=config.beta,
        epsilon=config.epsilon,
        ema_decay=config.codebook_ema_decay if config.codebook_update == "ema" else None,
        metric=config.codebook_metric,
        has_unit_codes=config.has_unit_codes,
        revival_threshold=config.revival_threshold,
        init_scale=config.codebook_init_scale,
        gradient=config.codebook_gradient,
        count_decay=config.codebook_ema_decay,
    )
