"""Choosing tokens from logits: guidance schedules, truncation, one uniform number a token, mixtures of codes.

Legend: B batch, K blocks, l tokens of the block at hand, V codes, n digits of a code, S scores of all digits, C code
channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass, replace
from numbers import Real
from typing import Literal, get_args, get_type_hints

import docstring_parser
import torch
from torch import Generator, Tensor

from .family import Prior
from .head_plan import HeadPlan, plan_of
from .orders import RASTER, check_order_for, read_order

GuidanceSchedule = Literal["constant", "linear", "power-cosine", "power-cosine-open"]
GUIDANCE_SCHEDULES = get_args(GuidanceSchedule)
# Far beyond what is of use, and well inside what float32 and bfloat16 can compute with.
MAX_GUIDANCE_SCALE = 1e3
GUIDANCE_POWERS = (1e-3, 1e3)
TEMPERATURES = (1e-6, 1e6)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn from logits."""

    guidance_scale: float = 1.0
    """Strength s of classifier-free guidance, logits = uncond + s·(cond − uncond), 0 to 1000; 1 is none."""
    guidance_schedule: GuidanceSchedule = "constant"
    """Whether s holds for all blocks ("constant") or grows from 1 at the first to s at the last: "linear" (VAR), or
    "power-cosine" (MDT: 1 + (s − 1)·(1 − cos(π·(k/(K−1))^power))/2); "power-cosine-open" (RAR) has k/K in place of
    k/(K−1), so that s lies beyond the last."""
    guidance_power: float = 1.0
    """Power of the schedules "power-cosine" and "power-cosine-open", 0.001 to 1000; the larger, the later guidance sets
    in. With "power-cosine-open" also 0, which is s for all blocks."""
    temperature: float = 1.0
    """Divides the logits, 1e-6 to 1e6; below 1 sharpens the distribution of tokens, at last to the likeliest alone."""
    top_k: int = 0
    """Draw each token among the k likeliest codes; 0 among all. Of a prior that predicts digits, each digit among its k
    likeliest values, and likewise with `top_p` and `min_p`."""
    top_p: float = 1.0
    """Draw each token among the smallest set of codes whose mass reaches p, in (0, 1]; 1 among all."""
    min_p: float = 0.0
    """Draw each token among the codes at least this many times as likely as the likeliest, in [0, 1]; 0 among all."""
    is_smooth: bool = False
    """Feed on, and decode, a Gumbel-softmax mixture of codes instead of one code a token: smoother pictures, for
    looking at and not for measuring (VAR's demo); scale layouts only."""
    order: Literal["raster"] | tuple[int, ...] = RASTER
    """In which order single tokens are drawn, by a prior that takes orders: "raster", or their places in it as a list.
    Tokens that are known come first, in the order among them."""

    def __post_init__(self):
        self._check_number("guidance_scale", 0, MAX_GUIDANCE_SCALE)
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; expected one of {list(GUIDANCE_SCHEDULES)}"
            )
        if not (self.guidance_schedule == "power-cosine-open" and self.guidance_power == 0):
            self._check_number("guidance_power", *GUIDANCE_POWERS)
        self._check_number("temperature", *TEMPERATURES)
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; expected an integer from 0 (off) to the number of codes")
        self._check_number("top_p", 0, 1, is_open=True)
        self._check_number("min_p", 0, 1)
        if not isinstance(self.is_smooth, bool):
            raise ValueError(f"is_smooth is {self.is_smooth!r}; expected True or False")
        object.__setattr__(self, "order", read_order(self.order))

    def _check_number(self, name: str, low: float, high: float, *, is_open: bool = False) -> None:
        """Refuse what is no number from `low`, which itself is out where the range is open, to `high`."""
        value = getattr(self, name)
        # NaN is in no range.
        is_number = isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
        if not is_number or is_open and float(value) == low:
            expected = f"a number in ({low:g}, {high:g}]" if is_open else f"a number from {low:g} to {high:g}"
            raise ValueError(f"{name} is {value!r}; expected {expected}")
        if type(value) not in (int, float):
            # Of numpy or fractions: half precision would reach into the arithmetic.
            object.__setattr__(self, name, float(value))

    @classmethod
    def stored(cls, values: "SamplingOptions | Mapping | None") -> "SamplingOptions":
        """Read options that were written down.

        Args:
            values: name → value; or options, which are returned; or None for the defaults.

        Returns:
            The options.

        Raises:
            ValueError: naming an option that there is not, or a value outside its range.
        """
        if isinstance(values, cls):
            return values
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"sampling is {values!r}; expected SamplingOptions, a dict of its fields, or None")
        names = [option.name for option in fields(cls)]
        unknown = sorted(set(values or {}) - set(names))
        if unknown:
            raise ValueError(f"sampling holds {unknown}; expected some of {names}")
        return cls(**(values or {}))

    def changed(self, **given) -> "SamplingOptions":
        """Return these options with others in their place; None stands for an option that is not given."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def check_for(self, prior: Prior) -> None:
        """Refuse what a prior cannot serve.

        Args:
            prior: the one to sample from.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        plan = plan_of(prior)
        if self.top_k > plan.largest_base:
            counted = "the number of codes" if plan.num_digits == 1 else "the largest base of a digit"
            raise ValueError(
                f"top_k is {self.top_k}; expected an integer from 0 (off) to {plan.largest_base}, {counted}"
            )
        if self.guidance_scale != 1 and not prior.conditions.has_null:
            has_classes = getattr(prior.conditions, "num_classes", 0)
            what = "that has no null class: none was trained" if has_classes else "without classes"
            raise ValueError(f"guidance_scale is {self.guidance_scale}; expected 1 for a model {what}")
        if self.is_smooth and not prior.layout.is_scales:
            raise ValueError("is_smooth is True; expected False for a tile layout, whose tokens are single codes")
        if self.is_smooth and plan.num_digits > 1:
            raise ValueError("is_smooth is True; expected False for a prior of digits, which weighs no codes")
        check_order_for(prior, self.order)

    def scales(self, num_blocks: int) -> list[float]:
        """Return the guidance scale of each of K blocks; of one block, `guidance_scale` unless the schedule is open."""
        is_open = self.guidance_schedule == "power-cosine-open"
        if self.guidance_schedule == "constant" or num_blocks == 1 and not is_open:
            return [float(self.guidance_scale)] * num_blocks
        shares = [k / (num_blocks if is_open else num_blocks - 1) for k in range(num_blocks)]
        if self.guidance_schedule != "linear":
            shares = [(1 - math.cos(math.pi * share**self.guidance_power)) / 2 for share in shares]
        return [1 + (self.guidance_scale - 1) * share for share in shares]


def _given_options() -> type:
    """Make the dataclass of the options that a command was given, each null where it was not."""
    described = {p.arg_name: p.description for p in docstring_parser.parse_from_object(SamplingOptions).params}
    lines = [f"    {option.name}: {' '.join(described[option.name].split())}" for option in fields(SamplingOptions)]
    hints = get_type_hints(SamplingOptions)
    options = make_dataclass(
        "GivenSamplingOptions",
        [(option.name, hints[option.name] | None, None) for option in fields(SamplingOptions)],
        kw_only=True,
        frozen=True,
    )
    options.__module__ = __name__
    options.__doc__ = "\n".join(
        ["How tokens are drawn; null takes what the pipeline was saved with.", "", "Args:", *lines]
    )
    return options


GivenSamplingOptions = _given_options()


def image_generators(generator: Generator | list[Generator] | None, num_images: int) -> list[Generator]:
    """Give every image a generator of its own.

    Args:
        generator: one generator, which yields a 63-bit seed for each image in order; a list with one for each image;
            or None for torch's default generator.
        num_images: B.

    Returns:
        B generators.

    Raises:
        ValueError: if a list has another length, or an entry is no generator.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_images:
            raise ValueError(
                f"generator is a list of {len(generator)}; expected {num_images} torch.Generators, one an image"
            )
        for n, each in enumerate(generator):
            if not isinstance(each, Generator):
                raise ValueError(f"generator[{n}] is {each!r:.80}; expected a torch.Generator")
        return list(generator)
    if generator is not None and not isinstance(generator, Generator):
        raise ValueError(f"generator is {generator!r}; expected a torch.Generator, a list of them, or None")
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (num_images,), generator=generator, device=device).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_uniforms(generators: list[Generator], num_tokens: int) -> Tensor:
    """Draw every image's uniform numbers from its own generator, (B, num_tokens) float64 on the CPU."""
    rows = [torch.rand(num_tokens, generator=g, device=g.device, dtype=torch.float64).cpu() for g in generators]
    return torch.stack(rows)


def truncate_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Divide logits by the temperature and remove unlikely codes: by top k, then of the rest by top p, then by min p.

    Args:
        logits: (…, V).
        options: how tokens are drawn; ties with the last code kept are kept.

    Returns:
        (…, V) with −inf in place of what is removed.
    """
    descending = None
    if options.temperature != 1:
        # Two infinities in a row would make its distribution NaN.
        logits = (logits / options.temperature).clamp(max=torch.finfo(logits.dtype).max)
    if 0 < options.top_k < logits.shape[-1]:
        if options.top_p < 1:
            descending = logits.topk(options.top_k, dim=-1).values
            threshold = descending[..., -1:]
        else:
            # Half the time of a sorted list.
            threshold = logits.kthvalue(logits.shape[-1] - options.top_k + 1, dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if options.top_p < 1:
        # The top k come sorted: their mass needs no sort of all codes.
        ascending = logits.sort(dim=-1).values if descending is None else descending.flip(-1)
        is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        num_removed = is_tail[..., :-1].sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < ascending.gather(-1, num_removed), -torch.inf)
    if options.min_p > 0:
        # Compared as logits, a ratio needs no normalisation.
        threshold = logits.amax(dim=-1, keepdim=True) + math.log(options.min_p)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Draw one token from each row of logits by inverting its cumulative distribution in float64.

    Args:
        logits: (B, l, …, V).
        uniforms: (B, l, …) float64 in [0, 1).
        options: temperature and truncation.

    Returns:
        (B, l, …) int64.
    """
    cumulative = truncate_logits(logits, options).double().softmax(dim=-1).cumsum_(dim=-1)
    # Scaling by the last entry keeps a uniform number near 1 inside the distribution despite rounding.
    targets = uniforms[..., None] * cumulative[..., -1:]
    idx = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Logits that are NaN lead past the last code, where a GPU would stop for good before anybody has seen them.
    return idx.clamp_max_(logits.shape[-1] - 1)


def sample_digits(
    logits: Tensor, uniforms: Tensor, options: SamplingOptions, plan: HeadPlan, start: int = 0, end: int | None = None
) -> Tensor:
    """Draw some of each token's digits, each as `sample_tokens` draws a token.

    Args:
        logits: (B, l, S).
        uniforms: (B, l, n) float64 in [0, 1).
        options: temperature and truncation, digit by digit.
        plan: which columns are which digit's.
        start: the first digit drawn.
        end: the digit after the last; None draws all.

    Returns:
        (B, l, end − start) int64.
    """
    runs = plan.by_base(logits, start, end)
    return torch.cat([sample_tokens(scores, uniforms[..., digits], options) for digits, scores in runs], dim=-1)


def smooth_temperature(progress: float) -> float:
    """Return the temperature of a block's Gumbel-softmax; progress is k/(K−1)."""
    return max(0.27 * (1 - 0.95 * progress), 0.005)


def draw_gumbels(generators: list[Generator], num_tokens: int, vocab_size: int) -> Tensor:
    """Draw every image's Gumbel noise from its own generator, (B, num_tokens, V) float32 on the CPU."""
    rows = []
    for g in generators:
        noise = torch.empty(num_tokens, vocab_size, device=g.device).exponential_(generator=g)
        rows.append(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log().cpu())
    return torch.stack(rows)


def mix_codes(logits: Tensor, gumbels: Tensor, codes: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """Mix codes by a Gumbel-softmax that sharpens from block to block (VAR's demo).

    Args:
        logits: (B, l, V), tempered and truncated.
        gumbels: (B, l, V) of Gumbel noise.
        codes: (V, C).
        progress: k/(K−1), 0 at the first block.

    Returns:
        The heaviest code (B, l) int64, and the mixture (B, l, C).
    """
    # The largest becomes 0: what follows overflows to −inf alone.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    noisy = logits * (1 + progress) + gumbels.to(logits.dtype)
    weights = (noisy / smooth_temperature(progress)).softmax(dim=-1)
    return noisy.argmax(dim=-1), weights.to(codes.dtype) @ codes
