"""Values that are NaN or infinite are refused by stage and name, whatever their type and place."""

import pytest
import torch

from nextblock.data.finite import all_finite, check_finite, extremes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_anywhere_is_found(dtype, bad):
    good = torch.arange(-30, 30, dtype=dtype).view(3, 4, 5)
    check_finite("stage", {"first": good, "second": good, "none": good[:0]})
    for place in (0, 31, 59):
        broken = good.clone()
        broken.view(-1)[place] = bad
        assert not all_finite([extremes(good), extremes(broken)])
        with pytest.raises(ValueError, match="stage: second has 1 of 60 values NaN or infinite"):
            check_finite("stage", {"first": good, "second": broken})


def test_nothing_is_finite():
    assert all_finite([])
    check_finite("stage", {})
