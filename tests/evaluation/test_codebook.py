import math

import pytest
import torch

from nextblock.evaluation.codebook import (
    code_counts,
    codebook_curves,
    codebook_statistics,
    codebook_summary,
    num_dead_codes,
    perplexity,
    usage,
)


def test_code_counts_by_block():
    counts = code_counts(torch.tensor([[3, 0, 1, 1], [3, 1, 3, 0]]), (1, 3), num_codes=4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[0, 0, 0, 2], [2, 3, 0, 1]]


def test_code_counts_equal_bincount():
    generator = torch.Generator().manual_seed(0)
    idx_Bl = [torch.randint(0, 17, (5, length), generator=generator) for length in (1, 4, 9, 16)]
    expected = torch.stack([torch.bincount(idx.flatten(), minlength=17) for idx in idx_Bl])
    idx_BL = torch.cat(idx_Bl, 1)
    assert torch.equal(code_counts(idx_BL, (1, 4, 9, 16), 17), expected)
    assert torch.equal(code_counts(idx_BL.to(torch.int32), (1, 4, 9, 16), 17), expected)
    # The same blocks of another codebook.
    assert torch.equal(code_counts(idx_BL, (1, 4, 9, 16), 20), torch.nn.functional.pad(expected, (0, 3)))


@pytest.mark.parametrize("wrong", [4, -1])
def test_code_counts_name_the_block_that_is_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"idx_Bl\[1\] spans .* expected 0 to 3"):
        code_counts(torch.tensor([[0, wrong, wrong, wrong]] * 2), (1, 3), num_codes=4)


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


def test_curves_of_all_blocks_and_of_each():
    curves = codebook_curves(torch.tensor([[4, 0, 0, 0], [2, 1, 1, 0]]))
    assert {name: value.item() for name, value in curves.items()} == pytest.approx(
        {
            "usage": 3 / 4,
            "block_0/usage": 1 / 4,
            "block_1/usage": 3 / 4,
            "perplexity": math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.125))),
            "block_0/perplexity": 1,
            "block_1/perplexity": 2 * math.sqrt(2),
            "num_dead_codes": 1,
            "block_0/num_dead_codes": 3,
            "block_1/num_dead_codes": 1,
        },
        rel=1e-14,
    )


def test_curves_of_blocks_are_left_out_where_there_is_one_or_are_too_many():
    counts = torch.randint(0, 3, (17, 5), generator=torch.Generator().manual_seed(0))
    pooled = {"usage", "perplexity", "num_dead_codes"}
    assert codebook_curves(counts).keys() == codebook_curves(counts[:1]).keys() == pooled
    assert len(codebook_curves(counts[:16])) == 3 * 17
    for rows in (1, 16, 17):
        assert codebook_curves(counts[:rows])["perplexity"] == perplexity(counts[:rows].sum(0))


def test_summary_lists_blocks_only_where_they_are_few():
    counts = torch.tensor([[4, 0, 0, 1], [0, 0, 0, 9]])
    summary = codebook_summary(counts)
    assert (summary["num_codes"], summary["num_tokens"], summary["usage"]) == (4, 14, 0.5)
    assert summary["block_num_dead_codes"] == [2, 3]
    assert "code_counts" not in summary
    assert not any(name.startswith("block_") for name in codebook_summary(counts, max_blocks=1))
