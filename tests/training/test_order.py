"""The sampler: whole epochs, contiguous parts, and a pure function of the step."""

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from nextblock.training.order import StepSampler, epoch_order

NUM_SAMPLES, BATCH_SIZE = 26, 8
STEPS_PER_EPOCH = 3


def batches(steps: range = range(7), rank: int = 0, world_size: int = 1, num_micro_batches: int = 1, **options):
    keywords = {"num_samples": NUM_SAMPLES, "batch_size": BATCH_SIZE, "seed": 5} | options
    sampler = StepSampler(
        **keywords, steps=steps, rank=rank, world_size=world_size, num_micro_batches=num_micro_batches
    )
    listed = list(sampler)
    assert len(listed) == len(sampler)
    return listed


def test_an_epoch_is_a_permutation_keyed_by_seed_and_epoch():
    order = epoch_order(NUM_SAMPLES, seed=5, epoch=2)
    assert sorted(order) == list(range(NUM_SAMPLES))
    assert np.array_equal(order, np.random.default_rng((5, 2)).permutation(NUM_SAMPLES))
    assert np.array_equal(order, epoch_order(NUM_SAMPLES, seed=5, epoch=2))
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        assert not np.array_equal(order, epoch_order(NUM_SAMPLES, seed, epoch))


def test_steps_walk_through_the_epochs_and_leave_the_remainder_out():
    for step, batch in enumerate(batches(range(7))):
        epoch, position = divmod(step, STEPS_PER_EPOCH)
        order = epoch_order(NUM_SAMPLES, 5, epoch)[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
        assert batch == [(epoch, index) for index in order]
        assert all(type(index) is int for _, index in batch)
    first_epoch = {key for batch in batches(range(STEPS_PER_EPOCH)) for key in batch}
    assert len(first_epoch) == STEPS_PER_EPOCH * BATCH_SIZE


def test_rank_r_takes_the_r_th_contiguous_part():
    alone = batches()
    parts = [batches(rank=rank, world_size=4) for rank in range(4)]
    for step, batch in enumerate(alone):
        assert [part[step] for part in parts] == [batch[0:2], batch[2:4], batch[4:6], batch[6:8]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_cut_a_part_in_order(world_size):
    for rank in range(world_size):
        whole = batches(rank=rank, world_size=world_size)
        cut = batches(rank=rank, world_size=world_size, num_micro_batches=4)
        assert len(cut) == 4 * len(whole)
        assert {len(micro_batch) for micro_batch in cut} == {2 // world_size}
        for step, batch in enumerate(whole):
            assert sum(cut[4 * step : 4 * step + 4], []) == batch


@pytest.mark.parametrize("start", [0, 1, 3, 5, 7])
def test_starting_at_a_step_gives_the_tail(start):
    options = {"rank": 1, "world_size": 2, "num_micro_batches": 2}
    assert batches(range(start, 7), **options) == batches(range(7), **options)[2 * start :]


def test_one_step_may_be_the_whole_data_set():
    assert sorted(batches(range(1), batch_size=NUM_SAMPLES)[0]) == [(0, index) for index in range(NUM_SAMPLES)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_hands_the_keys_to_the_data_set(num_workers):
    class Keys(Dataset):
        def __getitem__(self, key):
            return key

    sampler = StepSampler(
        NUM_SAMPLES, BATCH_SIZE, num_micro_batches=2, seed=5, steps=range(2, 5), rank=1, world_size=2
    )
    loader = DataLoader(Keys(), batch_sampler=sampler, collate_fn=list, num_workers=num_workers)
    assert list(loader) == batches(range(2, 5), rank=1, world_size=2, num_micro_batches=2)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="batch_size is 8; expected a multiple of 3 processes × 1 gradient_acc"):
        batches(world_size=3)
    with pytest.raises(ValueError, match="batch_size is 8; expected a multiple of 2 processes × 8 gradient_acc"):
        batches(world_size=2, num_micro_batches=8)
    with pytest.raises(ValueError, match="batch_size is 27; expected 1 to 26, the size of the data set"):
        batches(batch_size=27)
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 to 26"):
        batches(batch_size=0)
