"""Tokenizers saved by versions 0.1.0 and 0.2.0: how they spelled options and weights, on which fingerprints rest."""

import inspect

from torch import Tensor

from .autoencoder import num_norm_groups
from .configuration_vqvae import VQVAEConfig

# A pattern for each group of weights that had another name, with today's.
RENAMED_WEIGHTS = {r"^quantizer\.phi\.": "quantizer.codec.phi."}
# The fields of a tokenizer's configuration that version 0.2.0 had.
_FIELDS_OF_0_2 = (
    *("image_size", "num_channels", "autoencoder", "hidden_dim", "width_multipliers", "num_res_blocks", "dropout"),
    *("min_group_channels", "vocab_size", "embedding_dim", "z_channels", "quant_conv_kernel_size", "layout", "scales"),
    *("tile", "num_phi", "phi_ratio", "beta", "epsilon", "codebook_update", "codebook_ema_decay", "codebook_init"),
    *("codebook_init_scale", "codebook_metric", "has_unit_codes", "revival_threshold", "var_phi_names"),
)
# A later field at its default means what was before it.
_LATER_FIELDS = {
    name: parameter.default
    for name, parameter in inspect.signature(VQVAEConfig.__init__).parameters.items()
    if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and name not in ("self", *_FIELDS_OF_0_2)
}


def as_first_spelled(options: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Name options and weights as version 0.1.0 did: what it made keeps its hash, and tokens their tokenizer.

    Fields that are newer than version 0.2.0 are left out at their defaults.

    Args:
        options: a tokenizer's.
        state: its tensors by name.

    Returns:
        Both, renamed.
    """
    unsaid = object()
    options = {n: value for n, value in options.items() if value != _LATER_FIELDS.get(n, unsaid)}
    is_cosine, has_unit_codes = options["codebook_metric"] == "cosine", options["has_unit_codes"]
    # One option stood for both; what it could not say is hashed as it is.
    if has_unit_codes == (is_cosine and options["layout"] == "tiles"):
        del options["codebook_metric"], options["has_unit_codes"]
        options["normalize_codes"] = is_cosine
    if options["var_phi_names"] == "by_number":
        del options["var_phi_names"]
    if all(num_norm_groups(w, options["min_group_channels"]) == num_norm_groups(w, 1) for w in _norm_widths(options)):
        del options["min_group_channels"]
    return options, {name.replace("quantizer.codec.phi.", "quantizer.phi."): tensor for name, tensor in state.items()}


def _norm_widths(options: dict) -> list[int]:
    """Return the channels of every GroupNorm of a tokenizer."""
    if options["num_res_blocks"] == 0:
        return []
    multipliers = [] if options["autoencoder"] == "simple" else options["width_multipliers"]
    return [options["hidden_dim"] * multiplier for multiplier in (1, *multipliers)]
