"""Which samples each step takes: a pure function of (seed, step, rank, world size), so that a resume is exact."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the samples of an epoch in their random order, (num_samples,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class StepSampler(Sampler):
    """Micro-batches of (epoch, index) keys for one process, step after step.

    The global batch of a step is a contiguous piece of the epoch's order. Rank r takes its r-th contiguous part and
    cuts it into the step's micro-batches. An epoch's remainder smaller than a global batch is left out.

    Args:
        num_samples: size of the data set.
        batch_size: samples a step, over all processes and micro-batches.
        num_micro_batches: accumulation steps.
        seed: key of the order.
        steps: the steps to yield.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: if the batch does not divide over processes and micro-batches, or exceeds the data set.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        num_micro_batches: int,
        seed: int,
        steps: range,
        rank: int,
        world_size: int,
    ):
        if batch_size % (world_size * num_micro_batches):
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {world_size} processes × "
                f"{num_micro_batches} gradient_accumulation_steps"
            )
        if not 0 < batch_size <= num_samples:
            raise ValueError(f"batch_size is {batch_size}; expected 1 to {num_samples}, the size of the data set")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        self.steps = steps
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.steps) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_samples // self.batch_size
        share = self.batch_size // self.world_size
        known_epoch, order = None, None
        for step in self.steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != known_epoch:
                known_epoch, order = epoch, epoch_order(self.num_samples, self.seed, epoch)
            start = position * self.batch_size + self.rank * share
            for indices in np.split(order[start : start + share], self.num_micro_batches):
                yield [(epoch, int(index)) for index in indices]
