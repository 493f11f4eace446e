import numpy as np
import pytest
import torch

from nextblock.data.digits import load_digits_split
from nextblock.evaluation.digits_judge import DigitSet, class_accuracy, digit_figures, fit_judge, grey_intensities


def _digit_set(split):
    """Real digits, each intensity a flat patch of 4x4 pixels."""
    intensities, class_labels, _ = load_digits_split(split)
    levels = np.round(intensities * 255 / 16).astype(np.uint8)
    images = levels.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    return DigitSet.from_images(images, class_labels)


@pytest.fixture(scope="module")
def train():
    return _digit_set("train")


@pytest.fixture(scope="module")
def heldout():
    return _digit_set("test")


def test_grey_intensities_are_area_means():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, 32, 16, 3), dtype=np.uint8)
    features = grey_intensities(images)
    assert features.dtype == torch.float64 and features.shape == (3, 64)
    assert features[1, 8 * 2 + 5].item() == pytest.approx(images[1, 8:12, 10:12].mean() / 255, abs=1e-15)
    assert grey_intensities(np.full((1, 32, 32, 3), 255, dtype=np.uint8)).unique().tolist() == [1.0]


def test_grey_intensities_refuse_other_sizes():
    with pytest.raises(ValueError, match="divisible by 8"):
        grey_intensities(np.zeros((1, 28, 28, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="class_labels have shape"):
        DigitSet.from_images(np.zeros((2, 32, 32, 3), dtype=np.uint8), np.zeros(3))


def test_judge_knows_real_digits_and_not_wrong_labels(train, heldout):
    judge = fit_judge(train)
    assert class_accuracy(judge, heldout) > 0.98
    wrong = DigitSet(heldout.features, (heldout.class_labels + 1) % 10)
    assert class_accuracy(judge, wrong) < 0.02


def test_figures_of_the_held_out_themselves(train, heldout):
    figures = digit_figures(train, heldout, reconstructions=heldout, samples=heldout)
    assert figures["frechet_samples"] == pytest.approx(0, abs=1e-10)
    assert figures["frechet_reconstructions_ratio"] == pytest.approx(0, abs=1e-8)
    assert figures["frechet_train"] > 0
    assert figures["class_accuracy_samples"] == figures["class_accuracy_heldout"]
    assert figures["nearest_train_p1_ratio"] == 1
    assert figures["diversity_ratio"] == 1


def test_figures_tell_copies_and_collapse(train, heldout):
    copies = digit_figures(train, heldout, heldout, samples=train)
    assert copies["nearest_train_p1_samples"] == copies["nearest_train_p1_ratio"] == 0
    assert copies["frechet_samples_ratio"] == 1

    # every sample of a class is pulled halfway to the mean of its class
    means = torch.stack([train.features[train.class_labels == label].mean(0) for label in range(10)])
    dull = DigitSet((heldout.features + means[heldout.class_labels]) / 2, heldout.class_labels)
    collapsed = digit_figures(train, heldout, heldout, samples=dull)
    assert collapsed["diversity_ratio"] == pytest.approx(0.5, abs=1e-12)
    assert collapsed["frechet_samples_ratio"] > 3


def test_figures_refuse_samples_that_miss_a_class(train, heldout):
    kept = heldout.class_labels != 4
    samples = DigitSet(heldout.features[kept], heldout.class_labels[kept])
    with pytest.raises(ValueError, match=r"samples are of the classes \[0, 1, 2, 3, 5"):
        digit_figures(train, heldout, heldout, samples)
