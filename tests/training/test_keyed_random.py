"""Keyed random numbers: known values of splitmix64, independence of everything but the keys, and guidance dropout."""

import pytest
import torch

from nextblock.data.keyed_random import drop_class_labels, keyed_uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The published generator's output after one step from `state`, on Python's unbounded integers."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize(("seed", "output"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)])
def test_known_values(seed, output):
    drawn = keyed_uniform(samples=torch.tensor([seed]))
    assert drawn.dtype == torch.float64
    assert drawn.item() == (output >> 11) * 2.0**-53


@pytest.mark.parametrize("keys", [(0,), (7, 3), (-1, 5), (2**62, 1, 0)])
def test_keys_are_mixed_in_one_after_the_other(keys):
    samples = [0, 1, 2, 1000, 2**40]
    state = 0
    for key in keys:
        state = splitmix64((state + key) & MASK)
    expected = [(splitmix64((state + sample) & MASK) >> 11) * 2.0**-53 for sample in samples]
    assert keyed_uniform(*keys, samples=torch.tensor(samples)).tolist() == expected


def test_draws_depend_on_the_sample_and_not_on_the_batch_around_it():
    samples = torch.randperm(1000)
    together = keyed_uniform(5, 17, samples=samples)
    apart = torch.cat([keyed_uniform(5, 17, samples=part) for part in samples.split(7)])
    assert torch.equal(together, apart)
    assert torch.equal(together[samples.argsort()], keyed_uniform(5, 17, samples=torch.arange(1000)))


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    keyed_uniform(1, samples=torch.arange(10))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_are_uniform_and_unrelated_between_neighbouring_keys_and_samples():
    num_draws = 40_000
    by_key = [keyed_uniform(seed, step, samples=torch.arange(num_draws)) for seed in (0, 1) for step in (0, 1)]
    for draws in by_key:
        assert 0 <= draws.min() and draws.max() < 1
        histogram = torch.histc(draws, bins=20, min=0, max=1)
        chi_square = ((histogram - num_draws / 20).square() / (num_draws / 20)).sum()
        assert chi_square < 45.3  # 99.94 % quantile with 19 degrees of freedom
        assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.02
    correlations = torch.corrcoef(torch.stack(by_key))
    assert (correlations - torch.eye(4)).abs().max() < 0.02


def test_keys_have_an_order():
    samples = torch.arange(100)
    assert not torch.equal(keyed_uniform(1, 2, samples=samples), keyed_uniform(2, 1, samples=samples))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropped_share_is_the_rate(rate):
    samples = torch.arange(20_000)
    labels = samples % 10
    dropped = drop_class_labels(labels, 10, rate, 0, 1, samples=samples)
    is_dropped = dropped == 10
    assert dropped.dtype == torch.int64
    assert torch.equal(dropped[~is_dropped], labels[~is_dropped])
    assert abs(is_dropped.double().mean() - rate) < 4 * (rate * (1 - rate) / len(samples)) ** 0.5
    # Every class loses its share, not one class all of it.
    for label in range(10):
        assert abs(is_dropped[labels == label].double().mean() - rate) < 0.05


def test_rates_zero_and_one_are_exact():
    labels = torch.arange(500)
    assert torch.equal(drop_class_labels(labels, 1000, 0.0, 3, samples=labels), labels)
    assert torch.equal(drop_class_labels(labels, 1000, 1.0, 3, samples=labels), torch.full_like(labels, 1000))


def test_drops_depend_on_seed_step_and_sample_only():
    samples = torch.arange(200)
    labels = torch.randint(5, (200,))

    def dropped(seed, step, rows):
        return drop_class_labels(labels[rows], 5, 0.3, seed, step, samples=samples[rows]) == 5

    everything = dropped(0, 0, samples)
    shuffled = torch.randperm(200)
    assert torch.equal(dropped(0, 0, shuffled), everything[shuffled])
    assert torch.equal(torch.cat([dropped(0, 0, rows) for rows in samples.split(33)]), everything)
    torch.manual_seed(123)
    assert torch.equal(dropped(0, 0, samples), everything)
    assert not torch.equal(dropped(1, 0, samples), everything)
    assert not torch.equal(dropped(0, 1, samples), everything)
