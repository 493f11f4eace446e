"""Code use of large codebooks, counted by entries, against the histogram; entropy of digits against a plain count."""

import math

import pytest
import torch

from nextblock.data.code_digits import CodeDigits
from nextblock.evaluation import codebook
from nextblock.evaluation.codebook import (
    code_counts,
    codebook_curves,
    codebook_statistics,
    codebook_summary,
    digit_entropies,
)
from nextblock.evaluation.reconstruction import merged, reconstruct
from nextblock.evaluation.sparse_counts import SparseCounts
from nextblock.tokenizer import VQVAE, VQVAEConfig

LENGTHS, V = (1, 4, 9), 12
DIGITS = CodeDigits((2, 6))


@pytest.fixture
def both(monkeypatch):
    """The same three batches of tokens as a histogram, and by entries."""
    batches = torch.randint(0, V - 3, (3, 5, 14), generator=torch.Generator().manual_seed(0))
    batches[:, :, 0] = 7
    table = sum(code_counts(idx_BL, LENGTHS, V) for idx_BL in batches)
    monkeypatch.setattr(codebook, "MAX_COUNTED_CODES", 4)
    entries = sum(code_counts(idx_BL, LENGTHS, V) for idx_BL in batches)
    assert isinstance(table, torch.Tensor) and isinstance(entries, SparseCounts)
    return table, entries


def test_every_figure_is_that_of_the_histogram(both):
    table, entries = both
    for counts in (entries, entries.compacted(), entries.cpu()):
        assert (len(counts), counts.shape) == (3, (3, V)) and counts.sum() == table.sum()
        for made in (codebook_statistics, codebook_curves):
            expected, found = (made(each, DIGITS) for each in (table, counts))
            assert expected.keys() == found.keys()
            for name in expected.keys() - {"code_counts"}:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
        summary, expected = (codebook_summary(each, digits=DIGITS) for each in (counts, table))
        assert summary.keys() == expected.keys()
        assert all(summary[name] == pytest.approx(value) for name, value in expected.items())
        pooled = counts.sum(0, keepdim=True)
        assert codebook_curves(pooled).keys() == codebook_curves(table.sum(0, keepdim=True)).keys()
    assert len(entries.compacted().codes) == (table > 0).sum() < len(entries.codes)


def test_nothing_counted_is_no_figure():
    empty = code_counts(torch.empty(0, 14, dtype=torch.int64), LENGTHS, 1 << 20)
    curves = codebook_curves(empty, CodeDigits((2,) * 20))
    assert curves["usage"] == 0 and curves["num_dead_codes"] == 1 << 20
    assert curves["perplexity"].isnan() and curves["digit_entropy"].isnan()


def test_the_largest_codebook_takes_no_more_memory_than_its_tokens():
    idx_BL = torch.tensor([[0, (1 << 32) - 1], [5, 5]])
    curves = codebook_curves(code_counts(idx_BL, (1, 1), 1 << 32), CodeDigits((2,) * 32))
    assert curves["num_dead_codes"] == (1 << 32) - 3
    assert curves["block_0/perplexity"].item() == pytest.approx(2)
    assert curves["perplexity"].item() == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    with pytest.raises(ValueError, match=r"idx_Bl\[1\] spans .* to 4294967296; expected 0 to 4294967295"):
        code_counts(idx_BL + 1, (1, 1), 1 << 32)


def test_entropy_of_digits_is_that_of_their_own_histograms():
    idx_BL = torch.randint(0, 9, (40, 14), generator=torch.Generator().manual_seed(1))
    found = digit_entropies(code_counts(idx_BL, LENGTHS, V), DIGITS)
    digits = DIGITS.split(idx_BL.flatten())
    for value, digit, base in zip(found, digits.T, DIGITS.bases, strict=True):
        p = digit.bincount(minlength=base).double() / digit.numel()
        assert value.item() == pytest.approx(-torch.xlogy(p, p).sum().item() / math.log(base))
    even = code_counts(torch.arange(V)[None, :].expand(3, -1), (V,), V)
    assert digit_entropies(even, DIGITS).tolist() == pytest.approx([1, 1])
    assert digit_entropies(torch.tensor([[3] + [0] * 11]), DIGITS).tolist() == [0, 0]


def test_a_tokenizer_of_a_million_codes_tells_their_use():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "layout": "scales", "scales": [1, 4], "num_phi": 1}
    model = VQVAE(VQVAEConfig(codebook="lfq", vocab_size=1 << 20, embedding_dim=20, **sizes)).eval()
    pixel_values = 2 * torch.rand(6, 3, 16, 16) - 1
    statistics = model(pixel_values).statistics
    assert isinstance(statistics["code_counts"], SparseCounts) and statistics["block_usage"].shape == (2,)
    idx_BL = model.img_to_idx(pixel_values)
    assert statistics["num_dead_codes"] == (1 << 20) - idx_BL.unique().numel()
    assert statistics["digit_entropy"].shape == (20,)
    batches = [{"pixel_values": part, "class_labels": torch.zeros(3)} for part in pixel_values.split(3)]
    whole = reconstruct(model, batches, 1 << 20)
    parts = [reconstruct(model, [batch], 1 << 20) for batch in batches]
    together = merged(parts, [torch.arange(3).numpy(), torch.arange(3, 6).numpy()])
    assert whole.figures() == pytest.approx(together.figures())
    assert whole.figures()["code_usage"] == statistics["usage"].item()
    summary = codebook_summary(whole.code_counts, digits=model.quantizer.digits)
    assert summary["num_tokens"] == 6 * 17 and len(summary["digit_entropy"]) == 20
