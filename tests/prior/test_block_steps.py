"""What the receiver of sampled blocks sees and may change."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout

SCALES = BlockLayout.scales([1, 2, 3])


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_open_guidance_keeps_the_unconditional_rows_to_the_end(guidance_scale, make_prior, make_quantizer):
    model, quantizer, rows = make_prior(SCALES), make_quantizer(SCALES), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    options = {"guidance_scale": guidance_scale, "guidance_schedule": "constant"}
    fixed = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), **options)
    assert rows == [2 if guidance_scale == 1 else 4] * 3
    rows.clear()
    free = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), is_guidance_fixed=False, **options)
    assert rows == [4] * 3 and torch.equal(torch.cat(free, 1), torch.cat(fixed, 1))
    unconditional = make_prior(SCALES, num_classes=0)
    unconditional.blocks[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    rows.clear()
    unconditional.generate(torch.tensor([0, 0]), quantizer, is_guidance_fixed=False)
    assert rows == [2] * 3


def test_scales_set_on_the_way_guide_the_blocks_after(make_prior, make_quantizer):
    model, quantizer, logits = make_prior(SCALES), make_quantizer(SCALES), {}
    known = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2))

    def run(name, scale, set_to=None):
        def receive(step):
            logits.setdefault(name, []).append(step.logits)
            if set_to is not None and step.block == 0:
                step.scales[1:] = [set_to] * 2

        options = {"given_idx_Bl": known, "on_block_end": receive, "is_guidance_fixed": False}
        model.generate(torch.tensor([0, 1]), quantizer, guidance_scale=scale, **options)

    run("none", 1.0), run("full", 3.0), run("raised", 1.0, 3.0)
    for k, (got, none, full) in enumerate(zip(logits["raised"], logits["none"], logits["full"], strict=True)):
        torch.testing.assert_close(got, full if k else none, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(none, full)


@pytest.mark.parametrize("is_smooth", [False, True])
def test_blocks_are_redrawn_with_the_same_random_numbers_and_tokens_set(is_smooth, make_prior, make_quantizer):
    model, quantizer, steps = make_prior(SCALES), make_quantizer(SCALES), []
    given = [torch.full((2, length), -1) for length in SCALES.block_lengths]
    given[1][:, 0] = 5

    def receive(step):
        steps.append(step)
        idx, vectors = step.idx, step.vectors
        step.redraw(step.logits + 1)
        assert torch.equal(step.idx, idx) and (vectors is None or torch.allclose(step.vectors, vectors))
        step.redraw(torch.randn_like(step.logits))
        assert step.block != 1 or (step.idx[:, 0] == 5).all() and not torch.equal(step.idx, idx)
        step.set_tokens(torch.full_like(idx, 7), torch.ones_like(idx, dtype=torch.bool))
        step.is_last = step.block == 1

    torch.manual_seed(0)
    options = {"given_idx_Bl": given, "on_block_end": receive, "is_smooth": is_smooth}
    idx_Bl = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), **options)
    assert [idx.tolist() for idx in idx_Bl] == [[[7]] * 2, [[7] * 4] * 2]
    for step in steps:
        assert (step.vectors is not None) == is_smooth
        if is_smooth:
            assert torch.equal(step.vectors, quantizer.lookup(step.idx))


def test_a_block_is_put_on_the_map_once_and_anew_after_its_tokens_changed(
    layout_and_input, make_prior, make_quantizer, monkeypatch
):
    layout, input_embedding = layout_and_input
    model, quantizer, calls, maps = make_prior(layout, input_embedding=input_embedding), make_quantizer(layout), [], []
    advance = quantizer.advance
    monkeypatch.setattr(quantizer, "advance", lambda canvas, *args: calls.append(args) or advance(canvas, *args))

    def receive(step):
        before = step.canvas
        for _ in range(2):
            step.advance()
        assert len(calls) == 1 and (step.next_input is None) == (step.block == layout.num_blocks - 1)
        step.set_tokens((step.idx + 1) % 11, torch.ones_like(step.idx, dtype=torch.bool))
        assert step.canvas is before and step.next_input is None
        step.advance()
        maps.append(step.canvas.clone())
        assert len(calls) == 2
        calls.clear()

    idx_Bl = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), on_block_end=receive)
    assert calls == [] and len(maps) == layout.num_blocks
    assert torch.equal(maps[-1], quantizer.idx_to_features(torch.cat(idx_Bl, dim=1)))


def test_the_map_is_whole_whether_or_not_the_receiver_asks_for_it(layout_and_input, make_prior, make_quantizer):
    layout, input_embedding = layout_and_input
    model, quantizer, steps = make_prior(layout, input_embedding=input_embedding), make_quantizer(layout), []
    idx_Bl = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), on_block_end=steps.append)
    steps[-1].advance()
    assert torch.equal(steps[-1].canvas, quantizer.idx_to_features(torch.cat(idx_Bl, dim=1)))


def test_vectors_stand_in_for_codes_on_the_map(make_quantizer, make_indices):
    quantizer, idx_Bl = make_quantizer(SCALES), make_indices(SCALES)
    canvas = other = quantizer.start(2)
    for k, idx in enumerate(idx_Bl):
        canvas, expected = quantizer.advance(canvas, idx, k)
        other, got = quantizer.advance(other, quantizer.get_codebook()[idx], k)
        assert torch.equal(other, canvas)
        assert expected is got is None or torch.equal(got, expected)


def test_unknown_options_are_refused(make_prior, make_quantizer):
    with pytest.raises(TypeError, match="top_q"):
        make_prior(SCALES).generate(torch.tensor([0]), make_quantizer(SCALES), top_q=1)
