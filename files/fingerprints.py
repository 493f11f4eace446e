"""Fingerprints of models: equal where their results are."""

import hashlib
import json

import torch


def model_options(model: torch.nn.Module) -> dict:
    """Return a model's configuration without what its results do not depend on, such as paths and versions."""
    options = {k: v for k, v in model.config.to_diff_dict().items() if not k.startswith(("_", "transformers"))}
    return {n: value for n, value in options.items() if n not in ("architectures", "dtype", "tokenizer_fingerprint")}


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hash everything of a model that its results depend on.

    Args:
        model: a transformers model; half-precision weights give another hash than float32 ones. Its method
            `as_fingerprinted`, where it has one, renames options and tensors first.

    Returns:
        A hexadecimal SHA-256 over architecture, names, dtypes, shapes and values; it takes 1 to 2 s a gigabyte.
    """
    options, state = model_options(model), model.state_dict()
    if hasattr(model, "as_fingerprinted"):
        options, state = model.as_fingerprinted(options, state)
    digest = hashlib.sha256()
    digest.update(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
