"""Random codes in place of some that a prior is fed: how many, which, and by what they are decided."""

import pytest
import torch

from nextblock.prior.input_noise import with_random_codes

KEYS = {"seed": 3, "step": 7}


def test_a_share_of_the_codes_is_replaced_by_codes_of_equal_chance():
    idx, samples = torch.zeros(400, 50, dtype=torch.int64), torch.arange(400)
    noisy = with_random_codes(idx, 0.6, 5, samples=samples, **KEYS)
    shares = torch.bincount(noisy.flatten(), minlength=5) / noisy.numel()
    assert shares[0] == pytest.approx(0.6 + 0.4 / 5, abs=0.01)
    assert torch.allclose(shares[1:], torch.tensor(0.4 / 5), atol=0.006) and len(shares) == 5
    assert with_random_codes(idx, 1.0, 5, samples=samples, **KEYS) is idx
    assert with_random_codes(idx, 0.0, 5, samples=samples, **KEYS).float().mean() == pytest.approx(2, abs=0.05)


def test_seed_step_and_sample_decide_alone():
    idx, samples = torch.full((6, 9), 2), torch.arange(6)
    noisy = with_random_codes(idx, 0.5, 100, samples=samples, **KEYS)
    rows = torch.tensor([4, 1])
    assert torch.equal(with_random_codes(idx[rows], 0.5, 100, samples=samples[rows], **KEYS), noisy[rows])
    for other in ({"seed": 4}, {"step": 8}):
        assert not torch.equal(with_random_codes(idx, 0.5, 100, samples=samples, **KEYS | other), noisy)
    assert len(noisy.unique(dim=0)) == 6
