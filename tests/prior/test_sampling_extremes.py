"""Whatever is asked for and whatever finite logits there are, tokens are codes; or the option is refused by name."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior.sampling import SamplingOptions, mix_codes, sample_tokens, truncate_logits

TINY, HUGE = 5e-324, 1.7e308
NUMBERS = (0, -0.0, TINY, 1e-310, 1e-40, 1e-6, 0.5, 1, 1.0, 3, 1e3, 1e6, 1e38, 1e39, HUGE, 10**400)
NUMBERS += (Fraction(1, 10**400), np.float64(2), np.float32(1e-40))
OPTIONS = ("guidance_scale", "guidance_power", "temperature", "top_p", "min_p")
LOGITS = {
    "equal": torch.zeros(6),
    "equal and huge": torch.full((6,), 1e30),
    "far apart": torch.tensor([-1e30, 1e30, 0.0, 1e-40, 1e30, -3e38]),
    "denormal": torch.tensor([0.0, 1e-45, -1e-45, 1e-40, 1e-38, 0.0]),
    "the largest": torch.tensor([3.4e38, -3.4e38, 3.4e38, 0.0, 1.0, -1.0]),
    "usual": torch.tensor([0.5, 2.0, -1.0, 0.0, 3.0, -4.0]),
}


def allowed_options() -> list[SamplingOptions]:
    """All options that are accepted with one or two of the numbers."""
    found = []
    for first, second in itertools.combinations(OPTIONS, 2):
        for one, other in itertools.product(NUMBERS, NUMBERS):
            try:
                options = SamplingOptions(guidance_schedule="power-cosine", **{first: one, second: other})
            except ValueError as error:
                assert str(error).startswith((first, second)) and "expected a number" in str(error)
                continue
            found.append(options)
    return found


@pytest.fixture(scope="module")
def accepted() -> list[SamplingOptions]:
    return allowed_options()


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_accepted_option_draws_codes_that_have_mass(kind, dtype, accepted):
    logits = LOGITS[kind].to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).expand(1, 3, 6)
    uniforms = torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64)
    gumbels, codes = torch.zeros(1, 3, 6), torch.eye(6)
    drawing = {(o.temperature, o.top_p, o.min_p): o for o in accepted}
    assert len(drawing) > 50
    for options in drawing.values():
        for top_k in (0, 1, 6):
            options = SamplingOptions(
                temperature=options.temperature, top_p=options.top_p, min_p=options.min_p, top_k=top_k
            )
            truncated = truncate_logits(logits, options)
            assert not truncated.isnan().any() and (truncated < torch.inf).all()
            idx = sample_tokens(logits, uniforms, options)
            assert truncated.gather(-1, idx[..., None]).isfinite().all(), options
            heaviest, mixed = mix_codes(truncated, gumbels, codes, 0.5)
            assert truncated.gather(-1, heaviest[..., None]).isfinite().all() and mixed.isfinite().all(), options


def test_schedules_of_every_accepted_option_are_finite_and_between_1_and_the_scale(accepted):
    assert len({(o.guidance_scale, o.guidance_power) for o in accepted}) > 20
    for options, schedule in itertools.product(accepted, ("constant", "linear", "power-cosine")):
        changed = options.changed(guidance_schedule=schedule)
        for num_blocks in (1, 2, 10):
            scales = changed.scales(num_blocks)
            low, high = sorted((1, options.guidance_scale))
            assert all(low - 1e-12 <= scale <= high + 1e-12 for scale in scales)
            assert scales[-1] == pytest.approx(options.guidance_scale, abs=1e-12)


def test_the_coldest_temperature_takes_the_likeliest_and_the_hottest_any():
    logits = torch.tensor([[[0.0, 0.1, 0.099, -5.0]]]).expand(1, 400, 4)
    uniforms = torch.rand(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sample_tokens(logits, uniforms, SamplingOptions(temperature=1e-6)).unique().tolist() == [1]
    assert sample_tokens(logits, uniforms, SamplingOptions(temperature=1e6)).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -TINY, -1, "1", [1.0], None, True, 1j, 10**400])
def test_what_is_no_number_in_the_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected a number"):
        SamplingOptions(**{name: value})


def test_numbers_of_other_libraries_become_pythons():
    options = SamplingOptions(guidance_scale=np.float16(3), temperature=np.float32(0.5), top_p=Fraction(1, 2))
    assert [type(value) for value in (options.guidance_scale, options.temperature, options.top_p)] == [float] * 3
    assert type(SamplingOptions(guidance_scale=3).guidance_scale) is int


@pytest.mark.parametrize("guidance_scale", [0, 1e-45, 1, 7.5, 1e3])
def test_guided_logits_of_extreme_priors_draw_codes(guidance_scale, make_prior, make_quantizer, monkeypatch):
    layout = BlockLayout.tiles(1, 3)
    prior = make_prior(layout, num_classes=2)
    generator = torch.Generator().manual_seed(0)

    def logits(hidden_states, context):
        signs = torch.randint(-1, 2, (*hidden_states.shape[:2], prior.vocab_size), generator=generator)
        return signs * 1e30

    monkeypatch.setattr(prior, "logits", logits)
    options = {"guidance_scale": guidance_scale, "temperature": 1e-6}
    idx_Bl = prior.generate(torch.tensor([0, 1]), make_quantizer(layout), **options)
    assert all(0 <= idx.min() and idx.max() < prior.vocab_size for idx in idx_Bl)
