"""Keyed random numbers: known values of splitmix64, independence of everything but the keys."""

import pytest
import torch

from nextblock.data.keyed_random import keyed_uniform

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
