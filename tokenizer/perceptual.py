"""Perceptual loss: distance of features of a frozen vision backbone of `transformers`, or LPIPS of torchmetrics.

The former is LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its learned channel weights, on any backbone.
Legend: B batch, D channels of a stage, HxW pixels, hxw cells, L tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.files.hub import find_model
from nextblock.training.precision import full_precision, outside_autocast

# torchvision's names of LPIPS's networks.
LPIPS_NETWORKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


@dataclass(kw_only=True)
class PerceptualConfig:
    """Perceptual term of the tokenizer's loss."""

    weight: float = 0.0
    """Weight of the term; 0 loads no backbone."""
    backbone: str = "facebook/convnext-small-224"
    """A vision model of transformers: its id on the hub, or the folder of a downloaded one."""
    lpips_network: Literal["vgg", "alex", "squeeze"] | None = None
    """Compare by LPIPS on this network of torchvision, in place of the backbone; null compares by the backbone."""
    image_size: int | None = None
    """Side in pixels that images are resized to for the backbone or LPIPS; null leaves them as they are."""
    mean: list[float] | None = None
    """Means of red, green and blue in [0, 1] that the backbone expects; null reads its preprocessor_config.json."""
    std: list[float] | None = None
    """Standard deviations of the same; null reads its preprocessor_config.json."""

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}; expected a finite number of at least 0")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; expected at least 1, or null")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise ValueError(f"{name} is {values}; expected three numbers, or null")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected numbers above 0")
        if self.lpips_network is not None:
            self._check_lpips()

    def _check_lpips(self) -> None:
        """Refuse an unknown network of LPIPS, and options of the backbone whose place it takes."""
        if self.lpips_network not in LPIPS_NETWORKS:
            raise ValueError(
                f"lpips_network is {self.lpips_network!r}; expected one of {list(LPIPS_NETWORKS)}, or null"
            )
        for name in ("backbone", "mean", "std"):
            value, default = getattr(self, name), getattr(PerceptualConfig, name)
            if value != default:
                raise ValueError(
                    f"{name} is {value!r}; expected the default {default!r} with lpips_network {self.lpips_network!r}"
                )


class PerceptualLoss(nn.Module):
    """Compare images by the features of a frozen backbone.

    Args:
        backbone: a `transformers` model whose output has `feature_maps` or `hidden_states`.
        mean: of the three channels in [0, 1].
        std: of the three channels.
        image_size: side that images are resized to, or None.
    """

    def __init__(self, backbone: nn.Module, mean: list[float], std: list[float], image_size: int | None = None):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in evaluation mode: dropout would make equal images differ."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the distance as a scalar that reaches the reconstruction alone.

        Args:
            reconstruction: (B, 3, H, W).
            pixel_values: (B, 3, H, W) in [-1, 1].
        """
        with torch.no_grad():
            expected = self._features(pixel_values)
        stages = [
            feature_distance(stage, target)
            for stage, target in zip(self._features(reconstruction), expected, strict=True)
        ]
        return torch.stack(stages).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's stages, each (B, D, h, w) or (B, L, D)."""
        images = (resized((images + 1) / 2, self.image_size) - self.mean) / self.std
        if hasattr(self.backbone, "out_features"):
            return list(self.backbone(images).feature_maps)
        # The first hidden state is the embedding of pixels and no feature yet.
        return list(self.backbone(images, output_hidden_states=True).hidden_states[1:])


class LPIPSLoss(nn.Module):
    """Compare images by LPIPS: features of a frozen network, weighed as people judged similarity.

    Args:
        network: takes two batches (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1).
        image_size: side that images are resized to, or None.
    """

    def __init__(self, network: nn.Module, image_size: int | None = None):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.image_size = image_size
        self.eval()

    def train(self, mode: bool = True) -> "LPIPSLoss":
        """Stay in evaluation mode: dropout would make equal images differ."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the mean distance as a scalar that reaches the reconstruction alone.

        Args:
            reconstruction: (B, 3, H, W).
            pixel_values: (B, 3, H, W) in [-1, 1].
        """
        # In float32: the 1e-8 that LPIPS adds under its square root is 0 in fp16.
        with outside_autocast(reconstruction.device):
            images = (full_precision(batch) for batch in (reconstruction, pixel_values.detach()))
            return self.network(*(resized(batch, self.image_size) for batch in images)).mean()


def resized(images: Tensor, size: int | None) -> Tensor:
    """Bring images (B, 3, H, W) to a side in pixels, or leave them as they are."""
    if size is None:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def feature_distance(features: Tensor, expected: Tensor) -> Tensor:
    """Return the mean over positions of the squared difference of unit-normalised feature vectors.

    Args:
        features: (B, D, h, w) or (B, L, D).
        expected: the same shape.

    Returns:
        Scalar in [0, 4], in float32 at least.
    """
    dim = 1 if features.ndim == 4 else -1
    dtype = torch.promote_types(features.dtype, torch.float32)
    difference = F.normalize(features.to(dtype), dim=dim) - F.normalize(expected.to(dtype), dim=dim)
    return difference.square().sum(dim).mean()


def load_perceptual_loss(config: PerceptualConfig) -> PerceptualLoss | LPIPSLoss:
    """Load what images are compared by.

    Args:
        config: names the backbone or LPIPS's network.

    Returns:
        The loss, on the CPU, in float32.

    Raises:
        ValueError: if its weights are out of reach, torchvision is missing for LPIPS, or nothing says how to normalise
            a backbone's input.
    """
    if config.lpips_network is None:
        return _load_backbone(config)
    otherwise = "null compares by perceptual.backbone instead, and perceptual.weight 0 trains without either"
    return LPIPSLoss(load_lpips(config.lpips_network, "perceptual.lpips_network", otherwise), config.image_size)


def load_lpips(network: str, option: str, otherwise: str) -> nn.Module:
    """Load LPIPS's network, its channel weights from torchmetrics, its features from torchvision.

    Args:
        network: one of `LPIPS_NETWORKS`.
        option: that names it, for the messages.
        otherwise: what can be had without it, for the messages.

    Returns:
        What takes two batches (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1); on the CPU, in float32.

    Raises:
        ValueError: if its weights are out of reach, or torchvision is missing.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        with _data_alone():
            metric = LearnedPerceptualImagePatchSimilarity(net_type=network)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} is {network!r}, which needs torchvision; expected it to be installed: run "
            f"`pip install torchvision`; {otherwise}"
        ) from error
    except (OSError, RuntimeError, UnpicklingError) as error:
        model = LPIPS_NETWORKS[network]
        raise ValueError(
            f"{option} is {network!r}, whose weights cannot be loaded ({error}); expected "
            f"download.pytorch.org to be reachable, or the weights in {torch.hub.get_dir()}/checkpoints: run "
            f"`python -c \"import torchvision; torchvision.models.{model}(weights='DEFAULT')\"` where there is a "
            f"network and copy that folder; {otherwise}"
        ) from error
    # Not the metric itself: it refuses reconstructions beyond [-1, 1], and waits for the device to look at them.
    return metric.net.float().requires_grad_(False).eval()


@contextmanager
def _data_alone() -> Iterator[None]:
    """Have torch refuse pickles that could run code, where a library leaves it to unpickle them freely."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _load_backbone(config: PerceptualConfig) -> PerceptualLoss:
    """Load a backbone of transformers and what it expects of its input."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    try:
        where = {} if os.path.exists(config.backbone) else find_model(config.backbone, "config.json")
        backbone_config = AutoConfig.from_pretrained(config.backbone, trust_remote_code=False, **where)
        if type(backbone_config) in MODEL_FOR_BACKBONE_MAPPING:
            # AutoBackbone itself asks the hub about every name, a folder's too.
            backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)]
            # The stem only embeds pixels.
            names = backbone_config.stage_names[1:]
            options = {"out_features": names}
        else:
            backbone_class, options = AutoModel, {}
        options |= {"dtype": torch.float32, "output_loading_info": True, **where}
        backbone, info = backbone_class.from_pretrained(config.backbone, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"perceptual.backbone is {config.backbone!r}, which cannot be loaded; expected a vision model that is "
            f"reachable: run `hf download {config.backbone}` where there is a network, or give the folder of a "
            "downloaded model; perceptual.weight 0 trains without one"
        ) from error
    state = backbone.state_dict()
    # Norms that a backbone adds start as one and zero, and nothing here passes through a pooler.
    drawn = sorted(name for name in info["missing_keys"] if state[name].ndim > 1 and not name.startswith("pooler."))
    if drawn:
        raise ValueError(
            f"perceptual.backbone is {config.backbone!r}, whose file lacks {len(drawn)} tensors of a "
            f"{type(backbone).__name__}: {drawn[:8]}; expected the weights of a trained vision model"
        )
    mean, std = _input_statistics(config, where)
    return PerceptualLoss(backbone, mean, std, config.image_size)


def _input_statistics(config: PerceptualConfig, where: dict[str, bool]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the backbone's input, from the options or the backbone's own file."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    from transformers import BaseImageProcessor

    try:
        saved, _ = BaseImageProcessor.get_image_processor_dict(config.backbone, **where)
    except OSError:
        saved = {}
    mean, std = config.mean or saved.get("image_mean"), config.std or saved.get("image_std")
    if mean is None or std is None:
        raise ValueError(
            f"perceptual.mean is {config.mean} and perceptual.std {config.std}; expected both, since "
            f"{config.backbone!r} has no preprocessor_config.json that gives image_mean and image_std"
        )
    return list(mean), list(std)
