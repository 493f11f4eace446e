"""Precision: half types are raised, and nothing is lowered."""

import pytest
import torch

from nextblock.tokenizer.precision import full_precision


@pytest.mark.parametrize(
    ("dtype", "other", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_full_precision_raises_half_types_and_lowers_nothing(dtype, other, result):
    assert full_precision(torch.ones(2, dtype=dtype), torch.ones(1, dtype=other)).dtype == result
