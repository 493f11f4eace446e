"""Choosing tokens: guidance schedules, truncation by hand-computed examples, inverse-CDF draws against a slow loop."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior.sampling import (
    SamplingOptions,
    draw_gumbels,
    draw_uniforms,
    image_generators,
    mix_codes,
    sample_tokens,
    smooth_temperature,
    truncate_logits,
)


def kept(logits, **options) -> list:
    """Which codes survive truncation."""
    return truncate_logits(torch.as_tensor(logits, dtype=torch.float64), SamplingOptions(**options)).isfinite().tolist()


def guidance_scales(scale, schedule, num_blocks, power=1.0) -> list[float]:
    options = SamplingOptions(guidance_scale=scale, guidance_schedule=schedule, guidance_power=power)
    return options.scales(num_blocks)


def log(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Guidance


def test_constant_schedule_repeats_the_scale():
    assert guidance_scales(1.5, "constant", 3) == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("cfg", [0.0, 0.5, 1.5, 3.0])
def test_linear_schedule_is_vars(cfg):
    # VAR: (1 + t)·cond − t·uncond with t = cfg·k/(K − 1).
    scales = guidance_scales(1 + cfg, "linear", 5)
    assert scales == pytest.approx([1 + cfg * k / 4 for k in range(5)])
    assert scales[0] == 1
    assert guidance_scales(1 + cfg, "linear", 1) == [1 + cfg]


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_bad_guidance_scale_is_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale is .*expected a number from 0 to 1000"):
        guidance_scales(scale, "constant", 3)


def test_unknown_guidance_schedule_is_refused():
    with pytest.raises(ValueError, match="guidance_schedule is 'cosine'; expected one of"):
        guidance_scales(1.5, "cosine", 3)


# Truncation


def test_top_k_keeps_the_k_largest_and_leaves_them_unchanged():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, -2.0, 4.0]])
    truncated = truncate_logits(logits, SamplingOptions(top_k=2))
    inf = float("inf")
    assert truncated.tolist() == [[-inf, 3.0, -inf, 2.0], [5.0, -inf, -inf, 4.0]]


def test_top_k_keeps_all_that_tie_with_the_last():
    assert kept([1.0, 2.0, 1.0, 0.0, 1.0], top_k=2) == [True, True, True, False, True]


@pytest.mark.parametrize("top_k", [0, 4])
def test_top_k_of_none_or_all_changes_nothing(top_k):
    logits = torch.randn(3, 4)
    assert torch.equal(truncate_logits(logits, SamplingOptions(top_k=top_k)), logits)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.3, [False, True, False, False]),
        (0.49, [False, True, False, False]),
        (0.51, [False, True, False, True]),
        (0.79, [False, True, False, True]),
        (0.81, [True, True, False, True]),
        (0.96, [True, True, True, True]),
        (1.0, [True, True, True, True]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    assert kept(log([0.15, 0.5, 0.05, 0.3]), top_p=top_p) == expected


def test_top_p_keeps_the_likeliest_code_whatever_p():
    # In float32, 1 − p rounds to 1: even the whole mass seems not to reach past it.
    for dtype in (torch.float32, torch.float64):
        truncated = truncate_logits(log([0.2, 0.2, 0.4, 0.2]).to(dtype), SamplingOptions(top_p=1e-9))
        assert truncated.isfinite().tolist() == [False, False, True, False]


def test_top_p_against_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    for top_p in (0.2, 0.5, 0.9, 0.99):
        logits = 2 * torch.randn(50, 13, generator=generator, dtype=torch.float64)
        for row, survivors in zip(logits, kept(logits, top_p=top_p), strict=True):
            probabilities = row.softmax(0)
            mass, expected = 0.0, [False] * 13
            for v in probabilities.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                expected[v] = True
                mass += probabilities[v].item()
            assert survivors == expected


def test_top_p_looks_at_what_top_k_left():
    # Of the two largest, renormalised to 5/8 and 3/8, the first alone holds 0.6; of all four it would not.
    logits = log([0.5, 0.3, 0.1, 0.1])
    assert kept(logits, top_k=2, top_p=0.6) == [True, False, False, False]
    assert kept(logits, top_p=0.6) == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0.0; expected a number from 1e-06 to 1e\+06"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, r"top_k is -1; expected an integer from 0 \(off\) to the number of codes"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"is_smooth": 1}, "is_smooth is 1; expected True or False"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_the_ends_of_the_ranges_are_allowed():
    SamplingOptions(guidance_scale=0, temperature=1e-3, top_k=0, top_p=1.0, min_p=0.0)
    SamplingOptions(guidance_scale=100, temperature=100, top_k=11, top_p=1e-6, min_p=1.0)


@pytest.mark.parametrize(
    ("options", "prior_options", "message"),
    [
        ({"top_k": 12}, {}, r"top_k is 12; expected an integer from 0 \(off\) to 11, the number of codes"),
        ({"guidance_scale": 1.5}, {"num_classes": 0}, "guidance_scale is 1.5; expected 1 for a model without classes"),
        ({"is_smooth": True}, {}, "is_smooth is True; expected False for a tile layout"),
    ],
)
def test_what_a_prior_cannot_serve_is_refused_by_name(options, prior_options, message, make_prior):
    prior = make_prior(BlockLayout.tiles(1, 3), **prior_options)
    SamplingOptions(top_k=11).check_for(prior)
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options).check_for(prior)


# Drawing


def slow_draw(logits, uniform: float) -> int:
    """Walk along the cumulative distribution until it passes the uniform number."""
    probabilities = logits.double().softmax(0).tolist()
    total, mass = sum(probabilities), 0.0
    for v, probability in enumerate(probabilities):
        mass += probability
        if mass > uniform * total:
            return v
    raise AssertionError("uniform numbers lie below 1")


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 6, 0.7)]
)
def test_draws_against_a_slow_loop(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 25, 9, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(4, 25, generator=generator, dtype=torch.float64)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = sample_tokens(logits, uniforms, options)
    assert tokens.dtype == torch.int64
    for b in range(4):
        for i in range(25):
            row = truncate_logits(logits[b, i], options)
            assert torch.equal(row[row.isfinite()], (logits[b, i] / temperature)[row.isfinite()])
            assert tokens[b, i] == slow_draw(row, uniforms[b, i].item())
    assert tokens.unique().numel() > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_distribution(dtype):
    num_draws, probabilities = 40_000, torch.tensor([0.4, 0.0, 0.05, 0.25, 0.3])
    logits = probabilities.to(dtype).log().expand(1, num_draws, 5)
    uniforms = torch.rand(1, num_draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = torch.bincount(sample_tokens(logits, uniforms, SamplingOptions()).flatten(), minlength=5) / num_draws
    deviations = (probabilities * (1 - probabilities) / num_draws).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * deviations).all()
    assert frequencies[1] == 0


def test_uniform_numbers_at_the_ends_never_hit_an_impossible_code():
    logits = log([0.0, 0.5, 0.5, 0.0]).expand(1, 2, 4)
    ends = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    assert sample_tokens(logits, ends, SamplingOptions()).tolist() == [[1, 2]]
    many = torch.randn(1, 4000, 7, generator=torch.Generator().manual_seed(0))
    many[..., -2:] = -torch.inf
    assert sample_tokens(many, ends[:, 1:].expand(1, 4000), SamplingOptions()).max() == 4


def test_a_high_temperature_flattens_and_top_k_one_is_greedy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4000, 5, generator=generator)
    uniforms = torch.rand(1, 4000, generator=generator, dtype=torch.float64)
    options = SamplingOptions(temperature=1e6)
    hot = torch.bincount(sample_tokens(logits[:, :1].expand(1, 4000, 5), uniforms, options).flatten(), minlength=5)
    assert (hot - 800).abs().max() < 4 * (4000 * 0.2 * 0.8) ** 0.5
    assert torch.equal(sample_tokens(logits, uniforms, SamplingOptions(top_k=1)), logits.argmax(-1))


# Generators


def test_one_generator_gives_every_image_its_own_whatever_the_batch():
    def first_draws(num_images):
        generators = image_generators(torch.Generator().manual_seed(5), num_images)
        assert len({id(g) for g in generators}) == num_images
        return draw_uniforms(generators, 6)

    eight = first_draws(8)
    assert eight.dtype == torch.float64 and eight.shape == (8, 6)
    assert eight.unique().numel() == 48 and 0 <= eight.min() and eight.max() < 1
    for num_images in (1, 3):
        assert torch.equal(first_draws(num_images), eight[:num_images])


def test_a_list_gives_entry_i_to_image_i():
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9, 4)]
    uniforms = draw_uniforms(image_generators(generators, 3), 6)
    assert torch.equal(uniforms[0], uniforms[2]) and not torch.equal(uniforms[0], uniforms[1])
    expected = torch.rand(6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert torch.equal(uniforms[1], expected)


def test_no_generator_means_torchs_own_and_a_generator_leaves_it_alone():
    torch.manual_seed(3)
    first = draw_uniforms(image_generators(None, 2), 4)
    second = draw_uniforms(image_generators(None, 2), 4)
    torch.manual_seed(3)
    assert torch.equal(draw_uniforms(image_generators(None, 2), 4), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    draw_uniforms(image_generators(torch.Generator().manual_seed(0), 2), 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ([torch.Generator()], "generator is a list of 1; expected 2 torch.Generators"),
        ([torch.Generator()] * 3, "generator is a list of 3; expected 2"),
        ([torch.Generator(), 7], r"generator\[1\] is 7; expected a torch.Generator"),
        (7, "generator is 7; expected a torch.Generator"),
    ],
)
def test_generators_that_do_not_fit_are_refused(generator, message):
    with pytest.raises(ValueError, match=message):
        image_generators(generator, 2)


# Power-cosine guidance, the smallest share of the likeliest code


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        # 1 + 2·(1 − cos(π·share^power))/2 at shares 0, 1/4, 1/2, 3/4, 1.
        (1.0, [1, 1.2928932188, 2, 2.7071067812, 3]),
        (2.0, [1, 1.0192147196, 1.2928932188, 2.1950903220, 3]),
    ],
)
def test_power_cosine_schedule_is_mdts(power, expected):
    assert guidance_scales(3.0, "power-cosine", 5, power) == pytest.approx(expected, abs=1e-9)
    assert guidance_scales(3.0, "power-cosine", 1, power) == [3.0]


@pytest.mark.parametrize("power", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_bad_guidance_power_is_refused(power):
    with pytest.raises(ValueError, match="guidance_power is .*; expected a number from 0.001 to 1000"):
        guidance_scales(1.5, "constant", 3, power)


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (0.0, [True, True, True, True]),
        (0.09, [True, True, True, True]),
        (0.11, [True, True, False, True]),
        (0.31, [False, True, False, True]),
        (0.61, [False, True, False, False]),
        (1.0, [False, True, False, False]),
    ],
)
def test_min_p_keeps_codes_that_are_likely_beside_the_likeliest(min_p, expected):
    # Shares of the likeliest code: 0.3, 1, 0.1, 0.6; whatever the other truncations removed, they stay the same.
    logits = log([0.15, 0.5, 0.05, 0.3])
    assert kept(logits, min_p=min_p) == expected
    assert kept(logits - 7, top_k=3, min_p=min_p) == [is_kept and v != 2 for v, is_kept in enumerate(expected)]


def test_min_p_is_looked_at_in_drawing():
    uniforms = torch.rand(1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = log([0.15, 0.5, 0.05, 0.3]).expand(1, 500, 4)
    assert sample_tokens(logits, uniforms, SamplingOptions(min_p=0.2)).unique().tolist() == [0, 1, 3]
    # Temperature comes first: at 2 the shares are 0.55, 1, 0.32, 0.77.
    for min_p, expected in ((0.4, [0, 1, 3]), (0.6, [1, 3])):
        options = SamplingOptions(temperature=2.0, min_p=min_p)
        assert sample_tokens(logits, uniforms, options).unique().tolist() == expected


@pytest.mark.parametrize("min_p", [-0.1, 1.1, float("nan"), None])
def test_bad_min_p_is_refused(min_p):
    with pytest.raises(ValueError, match=r"min_p is .*; expected a number from 0 to 1"):
        SamplingOptions(min_p=min_p)


# Mixtures of codes


def test_gumbel_noise_comes_from_each_images_own_generator_and_is_gumbel():
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9, 4)]
    noise = draw_gumbels(generators, 50, 400)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert noise.isfinite().all() and noise.shape == (3, 50, 400)
    mean, deviation = 0.5772156649, 1.2825498302  # Euler's constant and π/√6
    assert abs(noise[:2].mean() - mean) < 4 * deviation / 200
    assert abs(noise[:2].std() - deviation) < 0.03


def test_mixtures_are_gumbel_softmax_with_vars_temperatures():
    assert [smooth_temperature(k / 9) for k in (0, 4)] == pytest.approx([0.27, 0.27 * (1 - 0.95 * 4 / 9)])
    assert smooth_temperature(1.0) == pytest.approx(0.0135) and smooth_temperature(1.05) == 0.005
    logits, gumbels = torch.tensor([[[1.0, 0.8, -torch.inf]]]), torch.tensor([[[0.1, 0.2, 9.0]]])
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    idx, mixed = mix_codes(logits, gumbels, codes, 0.5)
    # 1.5·(1, 0.8) + (0.1, 0.2) = (1.6, 1.4), at temperature 0.27·0.525.
    share = 1 / (1 + torch.tensor(-0.2 / 0.14175).exp())
    assert idx.tolist() == [[0]]
    torch.testing.assert_close(mixed, torch.stack([share, 1 - share]).view(1, 1, 2))


def test_the_heaviest_codes_of_mixtures_follow_the_distribution():
    probabilities = torch.tensor([0.4, 0.0, 0.05, 0.25, 0.3])
    gumbels = draw_gumbels([torch.Generator().manual_seed(0)], 40_000, 5)
    idx, _ = mix_codes(probabilities.log().expand(1, 40_000, 5), gumbels, torch.eye(5), 0.0)
    frequencies = torch.bincount(idx.flatten(), minlength=5) / 40_000
    assert ((frequencies - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 40_000).sqrt()).all()
