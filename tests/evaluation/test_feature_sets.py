import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.adm_crop import adm_crop
from nextblock.data.images import ImageDataConfig, load_source
from nextblock.evaluation import feature_sets
from nextblock.evaluation.feature_sets import embed, gathered, save_part
from nextblock.evaluation.features import INCEPTION_VARIANTS, Embedded, FeatureExtractor
from nextblock.evaluation.moments import Moments
from nextblock.evaluation.sample_sets import open_samples
from nextblock.evaluation.source_sets import SourceSet

SIDE = 6


def _network(pixel_values):
    """Pixels as features, three classes, and some of the features as spatial ones."""
    features = pixel_values.flatten(1)[:, ::5]
    return Embedded(features, features[:, :3].softmax(1), features[:, :4])


@pytest.fixture
def extractor():
    return FeatureExtractor(_network, INCEPTION_VARIANTS["torch-fidelity"], SIDE, {"features": "pixels"})


@pytest.fixture
def pictures():
    images = np.random.default_rng(0).integers(0, 256, (43, SIDE, SIDE, 3), dtype=np.uint8)
    images[5] = images[30]
    return images, np.arange(43) % 4


def _npz(path, images, labels):
    np.savez(path, images, labels)
    return open_samples(path)


def _set(samples, extractor, tmp_path, world_size=1, max_features=50_000, batch_size=8, through_files=False):
    options = {"max_features": max_features, "batch_size": batch_size, "world_size": world_size}
    parts = [embed(samples, extractor, rank=rank, **options) for rank in range(world_size)]
    if through_files:
        for rank, part in enumerate(parts):
            save_part(tmp_path / f"part-{rank}.npz", part)
        parts = [tmp_path / f"part-{rank}.npz" for rank in range(world_size)]
    return gathered(parts, samples.class_labels, max_features)


def _assert_same(found, expected, but=()):
    for name in expected.__dataclass_fields__.keys() - set(but):
        own, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, Moments):
            assert torch.equal(own.mean, other.mean) and torch.equal(own.covariance, other.covariance)
        elif isinstance(other, torch.Tensor):
            assert torch.equal(own, other), name
        else:
            assert own == other, name


def test_features_are_those_of_the_images_with_their_numbers_and_classes(pictures, extractor, tmp_path):
    images, labels = pictures
    found = _set(_npz(tmp_path / "a.npz", images, labels), extractor, tmp_path)
    assert found.num_items == 43 and sorted(found.numbers.tolist()) == list(range(43))
    expected = extractor(images)
    assert torch.equal(found.features, expected.features[found.numbers])
    assert torch.equal(found.class_labels, torch.from_numpy(labels)[found.numbers])
    assert torch.equal(found.class_probabilities, expected.class_probabilities)
    assert torch.equal(found.content_order, found.numbers)
    np.testing.assert_allclose(found.moments.covariance, np.cov(expected.features.double().numpy(), rowvar=False))
    np.testing.assert_allclose(found.spatial_moments.mean, expected.spatial_features.double().mean(0), rtol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("max_features", [50_000, 10])
def test_equal_for_any_processes_and_batches(world_size, max_features, pictures, extractor, tmp_path):
    samples = _npz(tmp_path / "a.npz", *pictures)
    expected = _set(samples, extractor, tmp_path, max_features=max_features, batch_size=43)
    options = {"world_size": world_size, "max_features": max_features, "through_files": world_size > 1}
    found = _set(samples, extractor, tmp_path, **options)
    # Moments of more images than are kept are sums of the processes' own.
    _assert_same(found, expected, but=() if max_features > 43 else ("moments",))
    torch.testing.assert_close(found.moments.covariance, expected.moments.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_features", [50_000, 10])
def test_equal_for_any_order_of_the_images(max_features, pictures, extractor, tmp_path):
    images, labels = pictures
    order = np.random.default_rng(1).permutation(43)
    expected = _set(_npz(tmp_path / "a.npz", images, labels), extractor, tmp_path, max_features=max_features)
    found = _set(_npz(tmp_path / "b.npz", images[order], labels[order]), extractor, tmp_path, max_features=max_features)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(images_of(found, images[order]), images_of(expected, images))
    torch.testing.assert_close(found.moments.covariance, expected.moments.covariance, rtol=1e-12, atol=1e-12)


def images_of(features, images):
    return torch.from_numpy(images[features.numbers.numpy()])


def test_moments_are_of_all_images_where_few_are_kept(pictures, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_sets, "_MAX_SPATIAL", 10)
    samples = _npz(tmp_path / "a.npz", *pictures)
    whole, few = (_set(samples, extractor, tmp_path, max_features=number) for number in (50_000, 7))
    assert few.num_items == 43 and len(few.features) == len(few.class_labels) == 7
    assert torch.equal(few.features, whole.features[:7]) and few.moments.num_items == 43
    torch.testing.assert_close(few.moments.covariance, whole.moments.covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(few.spatial_moments.covariance, whole.spatial_moments.covariance)
    assert few.class_probabilities.shape == (43, 3)


def test_a_single_image_has_features_and_no_moments(pictures, extractor, tmp_path):
    found = _set(_npz(tmp_path / "a.npz", pictures[0][:1], pictures[1][:1]), extractor, tmp_path, world_size=2)
    assert found.moments is None and found.spatial_moments is None and len(found.features) == 1


def test_a_source_is_a_set_of_its_crops(extractor, tmp_path):
    source = load_source(ImageDataConfig(source="digits"), "test")
    samples = SourceSet(source, "digits", (16, 16))
    assert len(samples) == 360 and samples.class_labels[:3].tolist() == [source.label(n) for n in range(3)]
    whole = np.concatenate([images for _, images in samples.batches(100)])
    halves = {}
    for rank in range(2):
        for numbers, images in samples.batches(100, rank, 2):
            halves |= dict(zip(numbers.tolist(), images, strict=True))
    np.testing.assert_array_equal(np.stack([halves[n] for n in range(360)]), whole)
    np.testing.assert_array_equal(samples.images([5, 2]), whole[[5, 2]])
    expected = source.image(5).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(whole[5], np.asarray(expected))
    assert samples.sha256() == SourceSet(source, "digits", (8, 8)).sha256()


def test_a_source_may_be_cropped_as_adm_does():
    source = load_source(ImageDataConfig(source="digits"), "test")
    found = SourceSet(source, "digits", (12, 12), "adm").images([4])[0]
    np.testing.assert_array_equal(found, np.asarray(adm_crop(source.image(4), 12)))


def test_crops_that_do_not_fit_are_refused():
    source = load_source(ImageDataConfig(source="digits"), "test")
    with pytest.raises(ValueError, match="crop is 'middle'; expected one of"):
        SourceSet(source, "digits", (16, 16), "middle")
    with pytest.raises(ValueError, match="crop is 'adm' for images of 16x8; expected squares"):
        SourceSet(source, "digits", (16, 8), "adm")
