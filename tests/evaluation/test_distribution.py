import numpy as np
import pytest
import torch

from nextblock.evaluation import distribution
from nextblock.evaluation.distribution import class_frechet_distances, inception_score, kernel_distance
from nextblock.evaluation.metrics import frechet_distance


def _features(num_items, seed, shift=0.0, num_features=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_items, num_features, generator=generator, dtype=torch.float64) + shift


def test_kernel_distance_is_torchmetrics_own_on_whole_sets():
    from torchmetrics.image.kid import poly_mmd

    x, y = _features(40, 0), _features(40, 1, shift=0.5)
    found = kernel_distance(x, y, torch.Generator().manual_seed(0))
    assert found.mean == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)
    assert (found.std, found.num_subsets, found.subset_size) == (0, 1, 40)


def test_kernel_distance_is_unbiased_and_averages_subsets(monkeypatch):
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(distribution, "SUBSET_SIZE", 20)
    x, y = _features(50, 2), _features(30, 3, shift=1)
    found = kernel_distance(x, y, torch.Generator().manual_seed(7))
    generator, values = torch.Generator().manual_seed(7), []
    for _ in range(100):
        own, others = (items[torch.randperm(len(items), generator=generator)[:20]] for items in (x, y))
        values.append(poly_mmd(own, others).item())
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)
    assert (found.num_subsets, found.subset_size) == (100, 20)
    same = kernel_distance(_features(400, 4), _features(300, 5), torch.Generator().manual_seed(0))
    assert abs(same.mean) < 0.5 * found.mean and abs(same.mean) < 0.2


def test_inception_score_is_adms():
    probabilities = torch.rand(23, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    scores = []
    for start in range(0, 23, 10):
        part = probabilities[start : start + 10].double().numpy()
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    found = inception_score(probabilities, split_size=10)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9) and found.num_splits == 3


def test_inception_score_is_torchmetrics_own_on_one_split():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.features = [logits]
    expected = metric.compute()[0].item()
    assert inception_score(logits.softmax(1)).mean == pytest.approx(expected, rel=1e-5)


def test_inception_score_of_known_predictions():
    # Sure of ten classes in turn: ten; sorted by class, each split sees one class alone.
    sure = torch.eye(10).repeat(10, 1)
    assert inception_score(sure, split_size=10).mean == pytest.approx(10)
    assert inception_score(sure[sure.argmax(1).argsort()], split_size=10).mean == pytest.approx(1)
    assert inception_score(torch.full((6, 4), 0.25)).mean == pytest.approx(1)
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert inception_score(sure[mixed], split_size=10, order=mixed.argsort()).mean == pytest.approx(10)
    with pytest.raises(ValueError, match=r"class_probabilities are \(0, 4\)"):
        inception_score(torch.zeros(0, 4))


def test_frechet_distances_by_class():
    x, y = _features(30, 6), _features(40, 7, shift=0.5)
    labels_x, labels_y = torch.arange(30) % 3, torch.arange(40) % 4
    labels_x[0] = 9
    found = class_frechet_distances(x, labels_x, y, labels_y)
    assert list(found) == [0, 1, 2]
    assert found[1] == pytest.approx(frechet_distance(x[labels_x == 1], y[labels_y == 1]), rel=1e-12)


def test_sets_that_do_not_fit_are_refused():
    for x, y in ((_features(1, 0), _features(5, 1)), (_features(5, 0), _features(5, 1, num_features=3))):
        with pytest.raises(ValueError, match="features alike and at least 2 items"):
            kernel_distance(x, y, torch.Generator())
