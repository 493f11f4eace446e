"""Protocols by which figures are published: what samples, reference and network must be, each named where it is not.

"imagenet-256-adm" is the table of guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) and of nearly all
ImageNet papers since; "rfid-imagenet-256" that of tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .distribution import SPLIT_SIZE
from .references import OpenedReference
from .sample_sets import SampleSet

_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Parts of random order miss a few classes; of sorted images they miss nine tenths.
_LEAST_SHARE_OF_CLASSES = 0.9


@dataclass(frozen=True)
class Preset:
    """What a protocol asks for; None asks for nothing.

    Args:
        num_samples: how many.
        num_classes: of them.
        image_size: (H, W).
        formats: how they may be stored.
        has_even_classes: whether all classes have equally many samples.
        needs_mixed_order: whether each part of 5000 samples must hold nearly all classes, as the inception score needs.
        features_sha256: of the file of weights.
        variant: of resizing and scaling.
        reference_sha256: of the reference's file.
        reference_name: what that is called, and where it is published.
        num_reference_images: whose features precision and recall, or all figures, are taken of.
        crop: how images of the reference are brought to size.
    """

    num_samples: int
    num_classes: int | None
    image_size: tuple[int, int]
    formats: tuple[str, ...]
    has_even_classes: bool
    needs_mixed_order: bool
    features_sha256: str
    variant: str
    reference_sha256: str | None
    reference_name: str
    num_reference_images: int
    crop: str | None


PRESETS = {
    "imagenet-256-adm": Preset(
        num_samples=50_000,
        num_classes=1000,
        image_size=(256, 256),
        formats=("npz", "png"),
        has_even_classes=True,
        needs_mixed_order=True,
        features_sha256=_INCEPTION,
        variant="torch-fidelity",
        reference_sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
        reference_name="VIRTUAL_imagenet256_labeled.npz of openai/guided-diffusion (jul-2021/ref_batches/imagenet/256)",
        num_reference_images=10_000,
        crop=None,
    ),
    "rfid-imagenet-256": Preset(
        num_samples=50_000,
        num_classes=None,
        image_size=(256, 256),
        formats=("npz", "png"),
        has_even_classes=False,
        needs_mixed_order=False,
        features_sha256=_INCEPTION,
        variant="torch-fidelity",
        reference_sha256=None,
        reference_name="the 50 000 images of ImageNet's validation set, cut out as ADM does",
        num_reference_images=50_000,
        crop="adm",
    ),
}


def check_samples(name: str, samples: SampleSet) -> None:
    """Refuse samples that break a protocol.

    Args:
        name: of the preset.
        samples: to be measured.

    Raises:
        ValueError: naming all that breaks it.
    """
    preset = preset_of(name)
    problems = []
    if len(samples) != preset.num_samples:
        problems.append(f"there are {len(samples)}; expected {preset.num_samples}")
    if tuple(samples.image_size) != preset.image_size:
        problems.append(f"they are {_size(samples.image_size)}; expected {_size(preset.image_size)}")
    if not set(samples.format.lower().split("+")) <= set(preset.formats):
        problems.append(f"they are stored as {samples.format}; expected {' or '.join(preset.formats)}, without loss")
    if preset.num_classes is not None:
        problems += _class_problems(preset, samples.class_labels)
    if problems:
        raise ValueError(f"samples break the preset {name!r}: {'; '.join(problems)}")


def check_features(name: str, record: dict) -> None:
    """Refuse other features than a protocol's.

    Args:
        name: of the preset.
        record: of the features, see `FeatureExtractor`.

    Raises:
        ValueError: naming what differs.
    """
    preset = preset_of(name)
    if record["features_sha256"] != preset.features_sha256:
        raise ValueError(
            f"features is {record['features']!r} of sha256 {record['features_sha256']}; expected, for the preset "
            f"{name!r}, pt_inception-2015-12-05-6726825d.pth of sha256 {preset.features_sha256}"
        )
    if record["features_variant"] != preset.variant:
        raise ValueError(
            f"features_variant is {record['features_variant']!r}; expected {preset.variant!r} for the preset {name!r}"
        )


def check_reference(name: str, reference: OpenedReference) -> None:
    """Refuse another reference than a protocol's.

    Args:
        name: of the preset.
        reference: as it was opened.

    Raises:
        ValueError: naming what differs.
    """
    preset, problems = preset_of(name), []
    if preset.reference_sha256 is not None and reference.sha256 != preset.reference_sha256:
        problems.append(f"its sha256 is {reference.sha256}; expected {preset.reference_sha256}")
    num_images = 0 if reference.images is None else len(reference.images)
    if num_images != preset.num_reference_images:
        problems.append(f"it holds {num_images} images; expected {preset.num_reference_images}")
    if preset.crop is not None and reference.crop not in (None, preset.crop):
        problems.append(f"its images are cut out by the crop {reference.crop!r}; expected {preset.crop!r}")
    if problems:
        raise ValueError(
            f"reference {reference.name!r} breaks the preset {name!r}: {'; '.join(problems)}; expected "
            f"{preset.reference_name}"
        )


def preset_of(name: str) -> Preset:
    """Return a preset by name; raises a ValueError that lists all."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {list(PRESETS)}")
    return PRESETS[name]


def _class_problems(preset: Preset, class_labels: np.ndarray | None) -> list[str]:
    """Say what is wrong with the samples' classes and their order."""
    if class_labels is None:
        return [f"they have no classes; expected {preset.num_classes}"]
    labels, counts = np.unique(class_labels, return_counts=True)
    if len(labels) != preset.num_classes or labels[0] != 0 or labels[-1] != preset.num_classes - 1:
        return [
            f"they are of {len(labels)} classes, {labels[0]} to {labels[-1]}; expected all from 0 to "
            f"{preset.num_classes - 1}"
        ]
    problems = []
    if preset.has_even_classes and counts.min() != counts.max():
        least, most = labels[counts.argmin()], labels[counts.argmax()]
        expected = preset.num_samples // preset.num_classes
        problems.append(f"class {least} has {counts.min()} and class {most} {counts.max()}; expected {expected} each")
    if preset.needs_mixed_order:
        parts = range(0, len(class_labels), SPLIT_SIZE)
        shares = [len(np.unique(class_labels[first : first + SPLIT_SIZE])) / preset.num_classes for first in parts]
        if min(shares) < _LEAST_SHARE_OF_CLASSES:
            problems.append(
                f"{SPLIT_SIZE} in a row are of only {min(shares):.0%} of the classes; expected an order of mixed "
                "classes, without which the inception score is of few classes at a time"
            )
    return problems


def _size(image_size: tuple[int, int]) -> str:
    """Return a size in words."""
    return "x".join(map(str, image_size))
