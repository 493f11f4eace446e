"""A prior whose logits are NaN or infinite samples nothing and says at which block."""

import pytest
import torch

from nextblock.data.finite import extremes
from nextblock.prior.generation import _check_logits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"top_k": 3, "top_p": 0.9}, {"is_smooth": True}])
def test_no_token_is_drawn_from_them(layout_and_input, options, bad, make_prior, make_quantizer):
    layout, kind = layout_and_input
    if options.get("is_smooth") and not layout.is_scales:
        pytest.skip("mixtures are for scales")
    model, quantizer = make_prior(layout, input_embedding=kind), make_quantizer(layout)
    with torch.no_grad():
        model.head.bias[-1] = bad
    with pytest.raises(ValueError, match="logits of block 0: the prior gives NaN or infinite values"):
        model.generate(torch.tensor([0, 1]), quantizer, **options)


def test_the_block_is_named(layout, make_prior, make_quantizer):
    model, quantizer, last = make_prior(layout), make_quantizer(layout), layout.num_blocks - 1
    with torch.no_grad():
        model.lvl_embed.weight[last] = torch.nan
    with pytest.raises(ValueError, match=f"logits of block {last}:"):
        model.generate(torch.tensor([0]), quantizer)


def test_codes_are_refused_before_sampling(make_prior, make_quantizer, layout):
    model, quantizer = make_prior(layout), make_quantizer(layout)
    with torch.no_grad():
        quantizer.codebook.weight[3, 1] = torch.nan
    with pytest.raises(ValueError, match="quantization: codebook.weight has 1 of 44 values"):
        model.generate(torch.tensor([0]), quantizer)


def test_several_blocks_are_looked_at_together():
    good, bad = extremes(torch.ones(3)), extremes(torch.tensor([1.0, torch.nan]))
    _check_logits({0: good, 1: good})
    with pytest.raises(ValueError, match="logits of block 2"):
        _check_logits({1: good, 2: bad, 3: bad})
