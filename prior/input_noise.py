"""Random codes in place of some that a prior is fed in training, as taming-transformers' `pkeep` (arXiv:2012.09841).

A prior that has seen wrong tokens in training goes on better from its own. Legend: B samples, n tokens fed, V codes.
"""

import torch
from torch import Tensor

from nextblock.data.keyed_random import keyed_uniform

# Apart from other numbers that are drawn of seed, step and sample.
_CHOICE_KEY, _CODE_KEY = 4, 5


def with_random_codes(
    idx: Tensor, keep_rate: float, num_codes: int, *, seed: int, step: int, samples: Tensor
) -> Tensor:
    """Keep a share of the codes and put random ones in the place of the others.

    Args:
        idx: (B, n) int64.
        keep_rate: probability of each code to stay, in [0, 1].
        num_codes: V.
        seed: of the run.
        step: number of the training step.
        samples: (B,) int64, the samples' numbers in the data set; with seed and step they decide alone.

    Returns:
        (B, n) int64; `idx` itself where all stay.
    """
    if keep_rate == 1:
        return idx
    n = idx.shape[1]
    numbers = samples[:, None] * n + torch.arange(n, device=samples.device)
    is_kept, codes = (keyed_uniform(seed, step, key, samples=numbers) for key in (_CHOICE_KEY, _CODE_KEY))
    codes = (codes * num_codes).long().to(idx.device)
    return torch.where((is_kept < keep_rate).to(idx.device), idx, codes)
