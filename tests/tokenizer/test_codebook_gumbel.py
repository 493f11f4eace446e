"""A codebook that a projection chooses from, beside its description written down in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import codebook_gumbel
from nextblock.tokenizer.codebook_gumbel import GumbelCodebook
from nextblock.tokenizer.codec_scales import ScaleCodec
from nextblock.tokenizer.codec_tiles import TileCodec
from nextblock.tokenizer.protocols import TableCodebook
from nextblock.tokenizer.quantizer import Quantizer

V, C = 13, 5


def build(codec=None):
    torch.manual_seed(0)
    codebook = GumbelCodebook(V, C).double()
    return Quantizer(TileCodec(BlockLayout.tiles(1, [2, 3])) if codec is None else codec, codebook).double().train()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_bytes", [1 << 24, 3 * V * 8, 1])
def test_choice_gradient_and_divergence(num_bytes, monkeypatch):
    monkeypatch.setattr(codebook_gumbel, "_CHUNK_BYTES", num_bytes)
    quantizer = build()
    features, weights = random(2, C, 2, 3).requires_grad_(), random(2, C, 2, 3, seed=1)
    result, loss, idx_BL = quantizer(features)
    ((result * weights).sum() + 1000 * loss).backward()
    found = [features.grad.clone(), *(parameter.grad.clone() for parameter in quantizer.parameters())]
    features.grad = None
    quantizer.zero_grad()

    codebook = quantizer.codebook
    scores = F.conv2d(features, codebook.proj.weight, codebook.proj.bias)
    p = scores.softmax(1)
    hard = F.one_hot(scores.argmax(1), V).movedim(3, 1).double()
    choice = hard - p.detach() + p
    # The table learns from the codes chosen alone, the scores from all.
    expected = torch.einsum("bvhw,vc->bchw", choice, codebook.weight.detach())
    expected = expected + torch.einsum("bvhw,vc->bchw", hard, codebook.weight - codebook.weight.detach())
    divergence = 5e-4 * (p * (p * V).log()).sum(1).mean()
    ((expected * weights).sum() + 1000 * divergence).backward()
    assert torch.equal(idx_BL, scores.argmax(1).flatten(1)) and idx_BL.unique().numel() > 4
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(loss, divergence)
    assert 0 < loss < 5e-4 * math.log(V)
    for gradient, parameter in zip(found, [features, *quantizer.parameters()], strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_first_of_equal_scores_is_taken():
    codebook = GumbelCodebook(V, C)
    with torch.no_grad():
        codebook.proj.weight.zero_()
        codebook.proj.bias.copy_(torch.tensor([0.0, 2, 1, 2, *[0] * 9]))
    assert codebook.assign(random(3, 4, C).float()).tolist() == [[1] * 4] * 3


def test_its_comparison_finds_what_it_assigns():
    codebook = build().codebook
    assert isinstance(codebook, TableCodebook)
    vectors, compared = codebook.compared(random(40, C))
    assert torch.equal(torch.cdist(vectors, compared).argmin(1), codebook.assign(random(40, C)))
    assert torch.equal(codebook.get_codebook()[3], codebook.lookup(torch.tensor(3)))


def test_scales_are_coded_by_it_too():
    quantizer = build(ScaleCodec(BlockLayout.scales([1, 2, [2, 3]]), C, 2, 0.5))
    result, loss, idx_BL = quantizer(random(2, C, 2, 3).requires_grad_())
    torch.testing.assert_close(result, quantizer.idx_to_features(idx_BL))
    (result.square().sum() + loss).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in quantizer.parameters())


def test_codes_start_from_no_vectors():
    with pytest.raises(ValueError, match="codes of a projection start from no vectors"):
        build().start_from(random(2, C, 2, 3), 0)
