"""Sampling digits: what is drawn follows the likelihood, pass by pass, with the images' own numbers."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import CodeDigits
from nextblock.prior import BlockPrior, GPTPrior, LlamaPrior, RARPrior
from nextblock.prior.conditioning import ClassCondition
from nextblock.prior.generation import generate_blocks
from nextblock.prior.head_plan import plan_of
from nextblock.prior.sampling import SamplingOptions, truncate_logits
from nextblock.tokenizer import LearnedCodebook, Quantizer, ScaleCodec, TileCodec

from .heads_of_digits import BASES, CODES, HEADS, V, columns, digits_of

DRAWN = ["grouped", "in turn", "masked, 2 passes", "masked"]
heads = pytest.mark.parametrize("options", [HEADS[name] for name in DRAWN], ids=DRAWN)
LAYOUTS = {"scales": BlockLayout.scales([1, 2, 3]), "rows": BlockLayout.tiles((1, 3), (2, 3))}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
ONE_TOKEN = BlockLayout.tiles(1, 1)


def make_quantizer(layout, bases=BASES):
    torch.manual_seed(0)
    codebook = LearnedCodebook(V, 4, init_scale=1.0)
    codebook.digits = None if bases is None else CodeDigits(bases)
    codec = ScaleCodec(layout, 4) if layout.is_scales else TileCodec(layout)
    return Quantizer(codec, codebook).double().eval()


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def forced_logits(model, quantizer, idx_Bl, class_labels, teacher_input):
    """All scores under teacher forcing, each digit given those drawn before it."""
    idx_BL = torch.cat(idx_Bl, 1)
    with torch.no_grad():
        return model(teacher_input(model, quantizer, idx_Bl), class_labels, idx_BL).logits


@heads
@layouts
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_logits_equal_uncached_ones(options, layout, scale, make_prior, teacher_input):
    model, quantizer, steps = make_prior(layout, **CODES | options), make_quantizer(layout), []
    class_labels = torch.tensor([0, 2, 3])
    given = {"generator": generators([1, 2, 3]), "guidance_scale": scale}
    idx_Bl = model.generate(class_labels, quantizer, on_block_end=steps.append, **given)
    assert torch.cat(idx_Bl, 1).unique().numel() > 4
    conditional = forced_logits(model, quantizer, idx_Bl, class_labels, teacher_input)
    unconditional = forced_logits(model, quantizer, idx_Bl, torch.full_like(class_labels, 3), teacher_input)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), expected, rtol=1e-9, atol=1e-9)


@heads
@pytest.mark.parametrize("truncation", [{}, {"temperature": 1.7, "top_k": 2, "top_p": 0.8}, {"min_p": 0.4}])
def test_every_digit_is_drawn_by_its_own_uniform_number(options, truncation, make_prior):
    layout = LAYOUTS["rows"]
    model, quantizer, steps = make_prior(layout, **CODES | options), make_quantizer(layout), []
    given = {"generator": generators([5, 6]), "guidance_scale": 1.5} | truncation
    idx_BL = torch.cat(model.generate(torch.tensor([1, 0]), quantizer, on_block_end=steps.append, **given), 1)
    bases, L = plan_of(model).bases, layout.num_tokens
    logits = torch.cat([step.logits for step in steps], 1)
    for b, generator in enumerate(generators([5, 6])):
        uniforms = torch.rand(L * len(bases), generator=generator, dtype=torch.float64).view(L, len(bases))
        for n in range(L):
            drawn = []
            for own, uniform in zip(columns(bases), uniforms[n], strict=True):
                kept = truncate_logits(logits[b, n, own], SamplingOptions(**truncation))
                cumulative = kept.softmax(0).cumsum(0)
                drawn.append(int((cumulative <= uniform * cumulative[-1]).sum()))
            assert digits_of(idx_BL[b, n].item(), bases) == drawn


@heads
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_codes_come_as_often_as_the_likelihood_says(options, scale, make_prior):
    num_images, guidance = 8000, SamplingOptions(guidance_scale=scale)
    model, quantizer = make_prior(ONE_TOKEN, **CODES | options).float(), make_quantizer(ONE_TOKEN).float()
    condition = ClassCondition(torch.full((num_images,), 1), null_class=3)
    shape = (num_images, 1, plan_of(model).num_digits)
    uniforms = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        idx = generate_blocks(model, condition, quantizer, guidance, uniforms)[0][:, 0]
        nothing = torch.zeros(V, 0, dtype=torch.int64)
        parts = [model(nothing, torch.full((V,), label), torch.arange(V)[:, None]).logits[:, 0] for label in (1, 3)]
    logits = torch.lerp(parts[1], parts[0], scale).double()
    true = torch.tensor([digits_of(idx, plan_of(model).bases) for idx in range(V)])
    log_p = sum(
        logits[:, own].log_softmax(1).gather(1, true[:, i, None])[:, 0]
        for i, own in enumerate(columns(plan_of(model).bases))
    )
    probabilities = log_p.exp()
    assert abs(probabilities.sum().item() - 1) < 1e-6 and probabilities.max() < 0.97
    deviations = (probabilities * (1 - probabilities) / num_images).sqrt()
    shares = idx.bincount(minlength=V) / num_images
    assert ((shares - probabilities).abs() <= 4.5 * deviations + 4 / num_images).all()


@heads
def test_an_image_does_not_depend_on_the_batch_around_it(options, make_prior):
    layout = LAYOUTS["rows"]
    model, quantizer = make_prior(layout, **CODES | options), make_quantizer(layout)

    def generate(seeds):
        labels = torch.tensor(seeds) % 3
        given = {"generator": generators(seeds), "guidance_scale": 2.0, "top_p": 0.9}
        return torch.cat(model.generate(labels, quantizer, **given), 1)

    four = generate([1, 2, 3, 4])
    assert four.unique(dim=0).shape[0] == 4
    assert torch.equal(generate([3])[0], four[2]) and torch.equal(generate([4, 1]), four[[3, 0]])


@heads
@layouts
def test_known_tokens_stay_and_others_follow_from_them(options, layout, make_prior, teacher_input):
    model, quantizer, steps = make_prior(layout, **CODES | options), make_quantizer(layout), []
    given = layout.split(torch.full((2, layout.num_tokens), -1))
    given[0][:, 0], given[-1][1, -1] = 5, 17
    arguments = {"generator": generators([1, 2]), "given_idx_Bl": given, "on_block_end": steps.append}
    idx_Bl = model.generate(torch.tensor([0, 1]), quantizer, **arguments)
    assert idx_Bl[0][:, 0].tolist() == [5, 5] and idx_Bl[-1][1, -1] == 17
    free = model.generate(torch.tensor([0, 1]), quantizer, generator=generators([1, 2]))
    assert not torch.equal(free[-1], idx_Bl[-1])
    # What was drawn in a known token's place does not matter: blocks after it see the known one.
    logits, start = forced_logits(model, quantizer, idx_Bl, torch.tensor([0, 1]), teacher_input), layout.bounds[-1][0]
    is_drawn = torch.ones(2, layout.num_tokens - start, dtype=torch.bool)
    is_drawn[1, -1] = False
    torch.testing.assert_close(steps[-1].logits[is_drawn], logits[:, start:][is_drawn], rtol=1e-9, atol=1e-9)


@heads
def test_a_receiver_redraws_all_digits_from_the_logits_it_gives(options, make_prior):
    layout = LAYOUTS["rows"]
    model, quantizer, wanted = make_prior(layout, **CODES | options), make_quantizer(layout), [1, 0, 2, 1]
    bases = plan_of(model).bases
    target = CodeDigits(BASES).join(torch.tensor(wanted)).item()

    def receive(step):
        before = step.idx
        step.redraw(step.logits.clone())
        assert torch.equal(step.idx, before)
        logits = torch.zeros_like(step.logits)
        for own, digit in zip(columns(bases), digits_of(target, bases), strict=True):
            logits[..., own.start + digit] = 1e4
        step.redraw(logits)
        assert (step.idx == target).all()

    idx_Bl = model.generate(torch.tensor([0]), quantizer, generator=generators([1]), on_block_end=receive)
    assert all((idx == target).all() for idx in idx_Bl)


@pytest.mark.parametrize("name", ["digits", "in turn", "masked"])
@pytest.mark.parametrize("input_embedding", ["codes", "tokens"])
def test_a_saved_prior_is_the_same(name, input_embedding, make_prior, tmp_path):
    layout = LAYOUTS["rows"]
    model = make_prior(layout, input_embedding=input_embedding, **CODES | HEADS[name]).float()
    model.save_pretrained(tmp_path)
    loaded, quantizer = BlockPrior.from_pretrained(tmp_path).eval(), make_quantizer(layout).float()
    results = [each.generate(torch.tensor([0, 2]), quantizer, generator=generators([1, 2])) for each in (model, loaded)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["digits", "in turn, grouped", "masked"])
def test_half_precision_and_autocast(name, make_prior, teacher_input):
    layout = LAYOUTS["rows"]
    quantizer, labels = make_quantizer(layout).float(), torch.randint(V, (2, layout.num_tokens))
    for dtype, is_cast in ((torch.bfloat16, True), (torch.float32, False)):
        model = make_prior(layout, input_embedding="tokens", **CODES | HEADS[name]).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_cast):
            output = model.train()(labels[:, :-3], torch.tensor([0, 1]), labels)
            output.loss.backward()
            idx_Bl = model.eval().generate(torch.tensor([0, 1]), quantizer, guidance_scale=2.0)
        assert output.loss.dtype == output.logits.dtype == torch.float32 and output.loss.isfinite()
        assert all(parameter.grad is not None for parameter in model.head.parameters())
        assert torch.cat(idx_Bl, 1).max() < V


def test_quantizers_of_other_digits_and_options_without_sense_are_refused(make_prior):
    layout = LAYOUTS["scales"]
    model = make_prior(layout, **CODES | HEADS["grouped"])
    with pytest.raises(ValueError, match=r"quantizer has codes without digits; expected some of the bases \[2, 6, 2\]"):
        model.generate(torch.tensor([0]), make_quantizer(layout, bases=None))
    with pytest.raises(ValueError, match=r"of the bases \[3, 2, 2, 2\]; expected \[2, 6, 2\]"):
        model.generate(torch.tensor([0]), make_quantizer(layout, bases=[3, 2, 2, 2]))
    quantizer = make_quantizer(layout)
    with pytest.raises(ValueError, match=r"top_k is 7; expected an integer from 0 \(off\) to 6, the largest base of a"):
        model.generate(torch.tensor([0]), quantizer, top_k=7)
    with pytest.raises(ValueError, match="is_smooth is True; expected False for a prior of digits"):
        model.generate(torch.tensor([0]), quantizer, is_smooth=True)
    model.generate(torch.tensor([0]), quantizer, top_k=6)
    softmax = make_prior(layout, vocab_size=V)
    softmax.generate(torch.tensor([0]), make_quantizer(layout, bases=None), top_k=V)


@pytest.mark.parametrize("name", ["digits", "in turn, grouped", "masked"])
@pytest.mark.parametrize("family", [LlamaPrior, GPTPrior, RARPrior])
def test_every_family_predicts_digits_alike(family, name, tmp_path):
    layout = BlockLayout.tiles(1, (2, 2))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_classes": 3}
    config = family.config_class(layout=layout.to_dict(), **sizes, **CODES, **HEADS[name])
    model, quantizer, steps = family(config).double().eval(), make_quantizer(layout), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    given = {"generator": generators([1, 2]), "on_block_end": steps.append}
    idx_BL = torch.cat(model.generate(torch.tensor([0, 2]), quantizer, **given), 1)
    with torch.no_grad():
        expected = model(idx_BL[:, :-1], torch.tensor([0, 2]), idx_BL)
        chunked = model(idx_BL[:, :-1], torch.tensor([0, 2]), idx_BL, loss_chunk_size=3)
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chunked.token_loss, expected.token_loss)
    model.save_pretrained(tmp_path)
    loaded = family.from_pretrained(tmp_path, dtype=torch.float64).eval()
    again = loaded.generate(torch.tensor([0, 2]), quantizer, generator=generators([1, 2]))
    assert torch.equal(torch.cat(again, 1), idx_BL)
