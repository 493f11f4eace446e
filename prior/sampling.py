"""Choosing tokens from logits: guidance schedules, truncation, one uniform number a token, mixtures of codes.

Legend: B batch, K blocks, l tokens of the block at hand, V codes, C code channels.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Generator, Tensor

GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn from logits.

    Args:
        guidance_scale: s in logits = uncond + s·(cond − uncond); 1 is no guidance.
        guidance_schedule: "constant"; or from 1 at the first block to s at the last, "linear" (VAR) or "power-cosine"
            (MDT: 1 + (s − 1)·(1 − cos(π·(k/(K−1))^power))/2).
        guidance_power: of "power-cosine", above 0; the larger, the later guidance sets in.
        temperature: divides the logits, above 0.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the smallest set of codes whose mass reaches p, in (0, 1].
        min_p: keep codes at least this many times as likely as the likeliest, in [0, 1]; 0 keeps all.
        is_smooth: feed on, and decode, a Gumbel-softmax mixture of codes instead of one code a token: smoother
            pictures, for looking at and not for measuring (VAR's demo); scale layouts only.
    """

    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_power: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    is_smooth: bool = False

    def check(self, num_classes: int, vocab_size: int, is_scales: bool) -> None:
        """Refuse options outside their range, or that a model cannot serve.

        Args:
            num_classes: classes of the prior; 0 if it is unconditional.
            vocab_size: V.
            is_scales: whether the layout's blocks are scales.

        Raises:
            ValueError: naming the option, its value and what was expected.
        """
        check_truncation(self.temperature, self.top_k, self.top_p, vocab_size, self.min_p)
        self.scales(2)
        if num_classes == 0 and self.guidance_scale != 1:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; expected 1 for a model without classes")
        if not isinstance(self.is_smooth, bool):
            raise ValueError(f"is_smooth is {self.is_smooth!r}; expected True or False")
        if self.is_smooth and not is_scales:
            raise ValueError("is_smooth is True; expected False for a tile layout, whose tokens are single codes")

    def scales(self, num_blocks: int) -> list[float]:
        """Return the guidance scale of each block; see `guidance_scales`."""
        return guidance_scales(self.guidance_scale, self.guidance_schedule, num_blocks, self.guidance_power)


def guidance_scales(guidance_scale: float, schedule: str, num_blocks: int, guidance_power: float = 1.0) -> list[float]:
    """Spread a guidance scale over the blocks.

    Args:
        guidance_scale: s in logits = uncond + s·(cond − uncond); 1 is no guidance.
        schedule: see `SamplingOptions`.
        num_blocks: K.
        guidance_power: see `SamplingOptions`.

    Returns:
        K scales; with one block, `guidance_scale`.

    Raises:
        ValueError: if the scale is negative or not finite, the power not above 0, or the schedule unknown.
    """
    _check_number("guidance_scale", guidance_scale, "a finite number of at least 0", lambda s: 0 <= s < math.inf)
    _check_number("guidance_power", guidance_power, "a finite number above 0", lambda p: 0 < p < math.inf)
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {schedule!r}; expected one of {list(GUIDANCE_SCHEDULES)}")
    if schedule == "constant" or num_blocks == 1:
        return [float(guidance_scale)] * num_blocks
    shares = [k / (num_blocks - 1) for k in range(num_blocks)]
    if schedule == "power-cosine":
        shares = [(1 - math.cos(math.pi * share**guidance_power)) / 2 for share in shares]
    return [1 + (guidance_scale - 1) * share for share in shares]


def check_truncation(temperature: float, top_k: int, top_p: float, vocab_size: int, min_p: float = 0.0) -> None:
    """Refuse truncation outside its range.

    Raises:
        ValueError: naming the option, its value and the range.
    """
    _check_number("temperature", temperature, "a finite number above 0", lambda t: 0 < t < math.inf)
    if type(top_k) is not int or not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k!r}; expected an integer from 0 (off) to {vocab_size}, the number of codes")
    _check_number("top_p", top_p, "a number in (0, 1]", lambda p: 0 < p <= 1)
    _check_number("min_p", min_p, "a number in [0, 1]", lambda p: 0 <= p <= 1)


def _check_number(name: str, value: float, expected: str, is_allowed) -> None:
    """Refuse what is no number, or none in the range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not is_allowed(value):
        raise ValueError(f"{name} is {value!r}; expected {expected}")


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
        if len(generator) != num_images or not all(isinstance(g, Generator) for g in generator):
            raise ValueError(
                f"generator is a list of {len(generator)}; expected {num_images} torch.Generators, one an image"
            )
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


def truncate_logits(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Remove unlikely codes: all but the top k, then all but the smallest set whose mass reaches p, then the unlikely.

    Args:
        logits: (…, V).
        top_k: codes kept, ties included; 0 keeps all.
        top_p: mass kept, in (0, 1], ties included; 1 keeps all.
        min_p: share of the likeliest code's probability under which a code is removed; 0 removes none.

    Returns:
        (…, V) with −inf in place of what is removed.
    """
    descending = None
    if 0 < top_k < logits.shape[-1]:
        descending = logits.topk(top_k, dim=-1).values
        logits = logits.masked_fill(logits < descending[..., -1:], -torch.inf)
    if top_p < 1:
        # The top k come sorted: their mass needs no sort of all codes.
        ascending = logits.sort(dim=-1).values if descending is None else descending.flip(-1)
        is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        num_removed = is_tail[..., :-1].sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < ascending.gather(-1, num_removed), -torch.inf)
    if min_p > 0:
        # Compared as logits, a ratio needs no normalisation.
        threshold = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> Tensor:
    """Draw one token from each row of logits by inverting its cumulative distribution in float64.

    Args:
        logits: (B, l, V).
        uniforms: (B, l) float64 in [0, 1).
        temperature: divides the logits.
        top_k: see `truncate_logits`.
        top_p: see `truncate_logits`.
        min_p: see `truncate_logits`.

    Returns:
        (B, l) int64.
    """
    logits = truncate_logits(logits / temperature, top_k, top_p, min_p)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaling by the last entry keeps a uniform number near 1 inside the distribution despite rounding.
    targets = uniforms[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


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
    noisy = logits * (1 + progress) + gumbels.to(logits.dtype)
    weights = (noisy / smooth_temperature(progress)).softmax(dim=-1)
    return noisy.argmax(dim=-1), weights.to(codes.dtype) @ codes
