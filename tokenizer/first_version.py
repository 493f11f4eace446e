"""Tokenizers saved by version 0.1.0: what it called their options and weights, on which their fingerprints rest."""

from torch import Tensor

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
    return options, {name.replace("quantizer.codec.phi.", "quantizer.phi."): tensor for name, tensor in state.items()}
