"""Texts in a block prior: every layout, mixed lengths, padding that is never seen, both ways to say nothing."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.attention import prefixed_attention
from nextblock.prior.text_condition import TextConditions

from .conftest import VOCAB_SIZE

E, T = 6, 5
LENGTHS = (3, 5, 1)
TEXT = {"text_dim": E, "max_text_positions": T + 2, "num_classes": 0}
KINDS = {
    "prefix and vector": {},
    "prefix alone": {"has_text_vector": False},
    "vector alone": {"has_text_prefix": False},
    "empty text, shared AdaLN": {"num_empty_positions": 2, "use_shared_adaln": True},
}
two_layouts = pytest.mark.parametrize(
    "layout", [BlockLayout.scales([1, (2, 3), (3, 4)]), BlockLayout.tiles((1, 2), (6, 6))], ids=["scales", "tiles"]
)
all_kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def texts(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, T, E, generator=generator, dtype=torch.float64)
    lengths = torch.tensor((LENGTHS * batch)[:batch])
    return {"text_embeds": embeds, "text_mask": torch.arange(T) < lengths[:, None]}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def teacher_logits(model, var_input, condition):
    return model(var_input, condition).logits


def test_prefixed_attention_against_a_naive_masked_softmax(layout):
    generator, P, L = torch.Generator().manual_seed(0), 3, layout.num_tokens
    q, k, v = torch.randn(3, 2, 2, P + L, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 3, [False, True, True]])
    for prefix_mask in (None, mask):
        out = prefixed_attention(q, k, v, layout, 0.7, P, prefix_mask)
        for row in range(2):
            hidden = 1 if prefix_mask is not None and row else 0
            for start, end in [(0, P), *((P + a, P + b) for a, b in layout.bounds)]:
                for i in range(start, end):
                    keys = slice(hidden, end)
                    weights = ((q[row, :, i, None] * k[row, :, keys]).sum(-1) * 0.7).softmax(-1)
                    expected = (weights[..., None] * v[row, :, keys]).sum(1)
                    torch.testing.assert_close(out[row, :, i], expected, rtol=1e-12, atol=1e-12)


@all_kinds
def test_cached_logits_equal_uncached_ones(options, layout, make_prior, make_quantizer, make_indices, teacher_input):
    model, quantizer = make_prior(layout, **TEXT, **options), make_quantizer(layout)
    idx_Bl = make_indices(layout, batch=3)
    condition = model.conditions.of(texts())
    rows = condition.joined(condition.null())
    var_input = teacher_input(model, quantizer, idx_Bl)
    expected = teacher_logits(model, torch.cat([var_input, var_input]), rows)
    context, cache = model.context(rows), model.new_cache(6)
    for k, (start, end) in enumerate(layout.bounds):
        first = layout.block_lengths[0]
        vectors = var_input[:, max(start - first, 0) : end - first]
        content = None if k == 0 else idx_Bl[k - 1] if model.takes_indices else vectors
        hidden = model.decode_block(content, k, context, cache)
        got = model.logits(hidden, context)
        torch.testing.assert_close(got, expected[:, start:end], rtol=1e-9, atol=1e-9)
    # The null differs from every text, or guidance would do nothing.
    assert (expected[:3] - expected[3:]).abs().amax((1, 2)).min() > 1e-3


@two_layouts
@all_kinds
def test_padding_and_neighbours_are_never_seen(options, layout, make_prior, make_quantizer):
    model, quantizer = make_prior(layout, **TEXT, **options), make_quantizer(layout)
    given = texts()
    sampling = {"guidance_scale": 2.0, "guidance_schedule": "constant"}

    def logits_and_tokens(given):
        logits = []
        idx = model.generate(
            quantizer=quantizer,
            **given,
            **sampling,
            generator=generators(3)[-len(given["text_embeds"]) :],
            on_block_end=lambda step: logits.append(step.logits),
        )
        return torch.cat(logits, 1), torch.cat(idx, 1)

    together = logits_and_tokens(given)
    embeds, mask = given["text_embeds"].clone(), given["text_mask"]
    embeds[~mask] = torch.nan
    # Padding of any content, more of it, and on the other side.
    flipped = torch.stack([row.roll(T - n, 0) for row, n in zip(embeds, LENGTHS, strict=True)])
    flipped_mask = torch.stack([row.roll(T - n, 0) for row, n in zip(mask, LENGTHS, strict=True)])
    wide = torch.cat([embeds, embeds.new_full((3, 2, E), torch.inf)], 1)
    wide_mask = torch.cat([mask, mask.new_zeros(3, 2)], 1)
    for other, other_mask in ((embeds, mask), (flipped, flipped_mask), (wide, wide_mask)):
        got = logits_and_tokens({"text_embeds": other, "text_mask": other_mask})
        assert torch.equal(got[1], together[1])
        torch.testing.assert_close(got[0], together[0], rtol=1e-9, atol=1e-9)
    for n, length in enumerate(LENGTHS):
        logits = []
        idx = model.generate(
            quantizer=quantizer,
            text_embeds=given["text_embeds"][n : n + 1, :length],
            **sampling,
            generator=generators(3)[n : n + 1],
            on_block_end=lambda step, logits=logits: logits.append(step.logits),
        )
        assert torch.equal(torch.cat(idx, 1)[0], together[1][n])
        torch.testing.assert_close(torch.cat(logits, 1)[0], together[0][n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_empty_positions", [0, 2])
def test_no_text_is_the_same_whatever_the_text_was(num_empty_positions, layout, make_prior):
    model = make_prior(layout, **TEXT, num_empty_positions=num_empty_positions)
    condition = model.conditions.of(texts()).null()
    rest = layout.num_tokens - layout.block_lengths[0]
    var_input = torch.zeros(3, rest, dtype=torch.int64)
    if not model.takes_indices:
        var_input = torch.zeros(3, rest, model.embedding_dim, dtype=torch.float64)
    logits = teacher_logits(model, var_input, condition)
    for n in (1, 2):
        torch.testing.assert_close(logits[n], logits[0], rtol=1e-9, atol=1e-9)
    if num_empty_positions:
        # The empty text's own features say the same.
        empty = model.text_emb.empty_embeds[None].expand(3, -1, -1)
        same = model(var_input, text_embeds=empty).logits
        torch.testing.assert_close(same, logits, rtol=1e-9, atol=1e-9)
    dropped = model.conditions.of(texts(200)).dropped(0.25, 1, 2, samples=torch.arange(200))
    again = model.conditions.of(texts(200)).dropped(0.25, 1, 2, samples=torch.arange(200))
    assert torch.equal(dropped.is_null, again.is_null) and 30 < dropped.is_null.sum() < 70


@two_layouts
@all_kinds
def test_every_parameter_learns_from_texts_and_dropped_ones(options, layout, make_prior, make_indices):
    model = make_prior(layout, **TEXT, **options).train()
    condition = model.conditions.of(texts()).dropped(0.5, 0, samples=torch.tensor([0, 1, 5]))
    assert 0 < condition.is_null.sum() < 3
    idx = torch.cat(make_indices(layout, batch=3), 1)
    rest = layout.num_tokens - layout.block_lengths[0]
    var_input = torch.randint(VOCAB_SIZE, (3, rest)) if model.takes_indices else torch.randn(3, rest, 4).double()
    model(var_input, condition, idx).loss.backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert without == []


@two_layouts
@all_kinds
def test_a_saved_model_comes_back_equal(options, layout, make_prior, tmp_path):
    model = make_prior(layout, **TEXT, **options).float()
    model.save_pretrained(tmp_path)
    loaded = BlockPrior.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    condition = {name: value.float() if value.is_floating_point() else value for name, value in texts().items()}
    rest = layout.num_tokens - layout.block_lengths[0]
    var_input = torch.zeros(3, rest, dtype=torch.int64) if model.takes_indices else torch.zeros(3, rest, 4)
    assert torch.equal(model(var_input, **condition).logits, loaded(var_input, **condition).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "text_embeds is None; expected text features"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, "expected text_embeds and text_mask"),
        ({"text_embeds": torch.zeros(3, T, E + 1)}, r"text_embeds is torch.float32 \(3, 5, 7\); expected"),
        ({"text_embeds": torch.zeros(3, T, E).long()}, "text_embeds is torch.int64"),
        ({"text_embeds": torch.zeros(3, T + 3, E)}, "8, 8, 8.* valid positions; expected 1 to 7"),
        ({"text_embeds": torch.zeros(3, T, E), "text_mask": torch.zeros(3, T)}, "text_mask is torch.float32"),
        ({"text_embeds": torch.zeros(3, T, E), "text_mask": torch.zeros(3, T) > 0}, "0, 0, 0.* valid positions"),
        ({"text_embeds": torch.full((3, T, E), torch.nan)}, "text_embeds holds NaN"),
        ({"class_labels": torch.zeros(3).long(), "text_embeds": torch.zeros(3, T, E)}, "both given"),
    ],
)
def test_texts_that_do_not_fit_are_refused_by_name(given, message, make_prior):
    model = make_prior(BlockLayout.tiles(1, 3), **TEXT)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(3, 8, dtype=torch.int64), **given)
    classes = make_prior(BlockLayout.tiles(1, 3))
    with pytest.raises(ValueError, match="the prior is conditioned on classes"):
        classes(torch.zeros(3, 8, dtype=torch.int64), text_embeds=torch.zeros(3, T, E))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_dim": 0}, "text_dim is 0"),
        ({"num_classes": 3}, "num_classes is 3 with text_dim 6; expected 0"),
        ({"has_text_prefix": False, "has_text_vector": False}, "expected at least one of them True"),
        ({"num_empty_positions": 8}, "num_empty_positions is 8"),
        ({"max_text_positions": 0}, "max_text_positions is 0"),
        ({"has_text_prefix": 1}, "has_text_prefix is 1; expected true or false"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        BlockPriorConfig(**(TEXT | options))
    assert isinstance(BlockPrior(BlockPriorConfig(**TEXT)).conditions, TextConditions)
