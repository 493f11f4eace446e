import math

import pytest
import torch

from nextblock.evaluation.codebook import (
    code_counts,
    codebook_statistics,
    codebook_summary,
    num_dead_codes,
    perplexity,
    usage,
)


def test_code_counts_by_block():
    idx_Bl = [torch.tensor([[3], [3]]), torch.tensor([[0, 1, 1], [1, 3, 0]])]
    counts = code_counts(idx_Bl, num_codes=4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[0, 0, 0, 2], [2, 3, 0, 1]]


def test_code_counts_equal_bincount():
    generator = torch.Generator().manual_seed(0)
    idx_Bl = [torch.randint(0, 17, (5, length), generator=generator) for length in (1, 4, 9, 16)]
    expected = torch.stack([torch.bincount(idx.flatten(), minlength=17) for idx in idx_Bl])
    assert torch.equal(code_counts(idx_Bl, 17), expected)


@pytest.mark.parametrize("wrong", [4, -1])
def test_code_counts_name_the_block_that_is_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"idx_Bl\[1\] spans .* expected 0 to 3"):
        code_counts([torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 3), wrong)], num_codes=4)


def test_perplexity_of_known_histograms():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [1, 1, 0, 0], [2, 1, 1, 0]])
    expected = torch.tensor([4.0, 1.0, 2.0, 2 * math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(perplexity(counts), expected, rtol=1e-14, atol=0)
    assert perplexity(torch.zeros(4, dtype=torch.int64)).isnan()


def test_usage_and_dead_codes_by_row_and_pooled():
    counts = torch.tensor([[4, 0, 0, 1], [0, 0, 0, 9]])
    assert usage(counts).tolist() == [0.5, 0.25]
    assert num_dead_codes(counts).tolist() == [2, 3]
    statistics = codebook_statistics(counts)
    assert statistics["usage"] == 0.5
    assert statistics["num_dead_codes"] == 2
    assert statistics["block_usage"].tolist() == [0.5, 0.25]
    torch.testing.assert_close(statistics["perplexity"], perplexity(torch.tensor([4, 0, 0, 10])))
    assert statistics["code_counts"] is counts


def test_summary_lists_blocks_only_where_they_are_few():
    counts = torch.tensor([[4, 0, 0, 1], [0, 0, 0, 9]])
    summary = codebook_summary(counts)
    assert (summary["num_codes"], summary["num_tokens"], summary["usage"]) == (4, 14, 0.5)
    assert summary["block_num_dead_codes"] == [2, 3]
    assert "code_counts" not in summary
    assert not any(name.startswith("block_") for name in codebook_summary(counts, max_blocks=1))
