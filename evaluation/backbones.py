"""Vision models of `transformers` as networks of features: what they expect of pictures, and which output is taken.

Legend: n pictures, F features, HxW pixels, L tokens.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.hub import find_model

_CONFIG = "config.json"


class Backbone(nn.Module):
    """A frozen model and what it expects of its input.

    Args:
        model: of transformers.
        mean: of the three channels of pictures in [0, 1].
        std: of the three channels.
        side: of the pictures, in pixels.
        output: what is taken of the model: "pooler_output", "class token", "mean of the map" or "image embedding".
        sha256: of configuration and weights.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], side: int, output: str, sha256: str):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.side, self.output, self.sha256 = side, output, sha256
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return features (n, F) of images (n, 3, H, W) in [0, 1]."""
        pixel_values = (images - self.mean) / self.std
        if self.output == "image embedding":
            output = self.model.get_image_features(pixel_values=pixel_values)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.model(pixel_values=pixel_values)
        if self.output == "pooler_output":
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        return hidden[:, 0] if self.output == "class token" else hidden.flatten(2).mean(dim=2)


def load_backbone(source: str) -> Backbone:
    """Load a vision model and what its files say of its input.

    Args:
        source: id on the hub, or folder.

    Returns:
        The model on the CPU in float32.

    Raises:
        ValueError: naming the model that is out of reach, is none of vision, lacks weights, does not say what it
            expects of pictures, or answers the same picture differently.
    """
    from transformers import AutoConfig, AutoModel

    expected = "a file of Inception's weights, or the folder or hub id of a vision model of transformers"
    try:
        where = _found(source) | {"trust_remote_code": False}
        config = AutoConfig.from_pretrained(source, **where)
        _check_attention(source, config)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = AutoModel.from_pretrained(source, **options, **where)
    except (OSError, ValueError, KeyError) as error:
        if str(error).startswith("features is"):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"features is {source!r}; expected {expected} that is reachable: {reason}") from error
    _check_weights(source, model, info["missing_keys"])
    mean, std, side = _input_of(source, config, where["local_files_only"])
    output = "image embedding" if hasattr(model, "get_image_features") else "pooler_output"
    if any(name.startswith("pooler.") for name in info["missing_keys"]):
        # A pooler that was not trained is no feature.
        output = "last_hidden_state"
    backbone = Backbone(model, mean, std, side, output, model_fingerprint(model))
    _try_out(source, backbone)
    return backbone


def _found(source: str) -> dict[str, bool]:
    """Look for a folder with a configuration, or ask the hub for a repository; return what loading either takes."""
    if os.path.exists(source):
        if not Path(source, _CONFIG).is_file():
            raise ValueError(f"the folder has no {_CONFIG}" if any(os.scandir(source)) else "the folder is empty")
        return {"local_files_only": True}
    return find_model(source, _CONFIG, "file or folder")


def _check_attention(source: str, config) -> None:
    """Refuse a configuration that would fetch a kernel from the hub."""
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str) and "/" in attention:
        raise ValueError(f"features is {source!r}, whose attention is {attention!r}; expected one of transformers' own")


def _check_weights(source: str, model: nn.Module, missing: set[str] | list[str]) -> None:
    """Refuse a model that takes no pictures, or whose weights are not all there."""
    if getattr(model, "main_input_name", None) != "pixel_values" and not hasattr(model, "get_image_features"):
        raise ValueError(f"features is {source!r}, a {type(model).__name__}; expected a model that takes pictures")
    drawn = sorted(name for name in missing if not name.startswith("pooler."))
    if drawn:
        raise ValueError(
            f"features is {source!r}, whose file lacks {len(drawn)} tensors of a {type(model).__name__}: {drawn[:8]}; "
            "expected the weights of a trained vision model"
        )


def _input_of(source: str, config, local_files_only: bool) -> tuple[list[float], list[float], int]:
    """Return mean, standard deviation and side of the pictures that a model expects."""
    from transformers import BaseImageProcessor

    try:
        saved, _ = BaseImageProcessor.get_image_processor_dict(source, local_files_only=local_files_only)
    except OSError:
        saved = {}
    mean, std = saved.get("image_mean"), saved.get("image_std")
    if mean is None or std is None:
        raise ValueError(
            f"features is {source!r}, which has no preprocessor_config.json with image_mean and image_std; expected a "
            "vision model with its preprocessor"
        )
    vision = getattr(config, "vision_config", config)
    for size in (saved.get("crop_size"), saved.get("size"), getattr(vision, "image_size", None)):
        side = _side(size)
        if side is not None:
            return list(mean), list(std), side
    raise ValueError(f"features is {source!r}, which names no size of pictures; expected crop_size or size")


def _side(size) -> int | None:
    """Return the side that a size says, in any of transformers' ways of saying it."""
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, (list, tuple)):
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def _try_out(source: str, backbone: Backbone) -> None:
    """Settle the output by one picture; refuse a model that draws random numbers or gives no features."""
    picture = torch.linspace(0, 1, 3 * backbone.side**2).view(1, 3, backbone.side, backbone.side)
    with torch.inference_mode():
        if backbone.output != "image embedding":
            said = backbone.model(pixel_values=picture)
            if backbone.output == "last_hidden_state" or getattr(said, "pooler_output", None) is None:
                backbone.output = "class token" if said.last_hidden_state.ndim == 3 else "mean of the map"
        first, second = backbone(picture), backbone(picture)
    if first.ndim != 2 or len(first) != 1:
        raise ValueError(f"features is {source!r}, which gives {tuple(first.shape)}; expected (pictures, features)")
    if not torch.equal(first, second):
        raise ValueError(f"features is {source!r}, which answers one picture in two ways; expected no random masking")
