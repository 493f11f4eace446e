"""Choosing tokens from logits: guidance schedules, truncation, and one uniform number a token.

Legend: B batch, K blocks, l tokens of the block at hand, V codes.
"""

import torch
from torch import Generator, Tensor

GUIDANCE_SCHEDULES = ("constant", "linear")


def guidance_scales(guidance_scale: float, schedule: str, num_blocks: int) -> list[float]:
    """Spread a guidance scale over the blocks.

    Args:
        guidance_scale: s in logits = uncond + s·(cond − uncond); 1 is no guidance.
        schedule: "constant", or "linear" from 1 at the first block to `guidance_scale` at the last (VAR).
        num_blocks: K.

    Returns:
        K scales; with one block, `guidance_scale`.

    Raises:
        ValueError: if the scale is negative or not finite, or the schedule unknown.
    """
    if not 0 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance_scale is {guidance_scale}; expected a finite number of at least 0")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {schedule!r}; expected one of {list(GUIDANCE_SCHEDULES)}")
    if schedule == "constant" or num_blocks == 1:
        return [float(guidance_scale)] * num_blocks
    return [1 + (guidance_scale - 1) * k / (num_blocks - 1) for k in range(num_blocks)]


def check_truncation(temperature: float, top_k: int, top_p: float, vocab_size: int) -> None:
    """Refuse sampling options outside their range.

    Raises:
        ValueError: naming the option, its value and the range.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    if not isinstance(top_k, int) or not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k!r}; expected an integer from 0 (off) to {vocab_size}, the number of codes")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1]")


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


def truncate_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Remove unlikely codes: all but the top k, then all but the smallest set whose mass reaches p.

    Args:
        logits: (…, V).
        top_k: codes kept, ties included; 0 keeps all.
        top_p: mass kept, in (0, 1]; 1 keeps all.

    Returns:
        (…, V) with −inf in place of what is removed.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        is_tail[..., -1] = False
        logits = logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw one token from each row of logits by inverting its cumulative distribution in float64.

    Args:
        logits: (B, l, V).
        uniforms: (B, l) float64 in [0, 1).
        temperature: divides the logits.
        top_k: see `truncate_logits`.
        top_p: see `truncate_logits`.

    Returns:
        (B, l) int64.
    """
    logits = truncate_logits(logits / temperature, top_k, top_p)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaling by the last entry keeps a uniform number near 1 inside the distribution despite rounding.
    targets = uniforms[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
