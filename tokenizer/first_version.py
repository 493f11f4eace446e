"""Tokenizers saved by version 0.1.0: what it called their options and weights, on which their fingerprints rest."""

from torch import Tensor

from .autoencoder import num_norm_groups

# A pattern for each group of weights that had another name, with today's.
RENAMED_WEIGHTS = {r"^quantizer\.phi\.": "quantizer.codec.phi."}


def as_first_spelled(options: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Name options and weights as version 0.1.0 did: what it made keeps its hash, and tokens their tokenizer.

    Args:
        options: a tokenizer's.
        state: its tensors by name.

    Returns:
        Both, renamed.
    """
    options = dict(options)
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
