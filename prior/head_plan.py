"""What a head predicts of a token: one softmax over all codes, or one over each digit of the code, drawn pass by pass.

Digits of a token that are drawn in one pass are independent of each other, given the hidden state and the digits of the
passes before. Legend: n digits, b_i base of digit i, V = Π b_i codes, S = Σ b_i scores, P passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nextblock.data.code_digits import CodeDigits
from nextblock.data.keyed_random import keyed_uniform

HeadKind = Literal["softmax", "digits", "digits_in_turn", "masked_digits"]
HEAD_KINDS = get_args(HeadKind)
# Heads that are a small network on the hidden state and the digits known so far.
NETWORK_KINDS = ("digits_in_turn", "masked_digits")
DEFAULT_LAYERS, DEFAULT_PASSES = 2, 4
MAX_HEAD_WIDTH, MAX_HEAD_LAYERS = 1 << 17, 1024
# Apart from other numbers that are drawn of seed, step and sample.
_HIDING_KEY = 3
# The heads that each option belongs to.
_KINDS_OF_FIELDS = {
    "head_groups": HEAD_KINDS[1:],
    "head_passes": ("masked_digits",),
    "head_width": NETWORK_KINDS,
    "head_layers": NETWORK_KINDS,
}


@dataclass(frozen=True)
class HeadPlan:
    """The digits of a token and the passes in which they are drawn.

    Args:
        bases: of the n digits; one softmax over V codes is one digit of base V.
        passes: how many digits each of the P passes draws, the first digits first.
        is_masked: whether the head learns from digits hidden at random, and not from the passes.
    """

    bases: tuple[int, ...]
    passes: tuple[int, ...]
    is_masked: bool = False

    @cached_property
    def digits(self) -> CodeDigits:
        """How indices are read as digits."""
        return CodeDigits(self.bases)

    @property
    def num_digits(self) -> int:
        """n."""
        return len(self.bases)

    @cached_property
    def num_scores(self) -> int:
        """S, the width of the logits: the scores of all digits side by side."""
        return sum(self.bases)

    @property
    def largest_base(self) -> int:
        """The most values that a digit has."""
        return max(self.bases)

    @cached_property
    def pass_bounds(self) -> list[tuple[int, int]]:
        """The first digit of each pass and the one after its last."""
        ends = list(accumulate(self.passes))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def columns(self, start: int, end: int) -> tuple[int, int]:
        """Return where the scores of the digits from `start` to before `end` lie among the S."""
        first = sum(self.bases[:start])
        return first, first + sum(self.bases[start:end])

    def by_base(self, scores: Tensor, start: int = 0, end: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of digits of one base, with their scores.

        Args:
            scores: (…, S).
            start: the first digit.
            end: the digit after the last; None takes all.

        Yields:
            The run's digits as a slice of the n, and their scores (…, run, base), a view.
        """
        for base, run in groupby(range(start, self.num_digits if end is None else end), key=self.bases.__getitem__):
            first, *others = run
            digits = slice(first, first + 1 + len(others))
            low, high = self.columns(digits.start, digits.stop)
            yield digits, scores[..., low:high].unflatten(-1, (-1, base))

    def known_before(self, device: torch.device) -> Tensor:
        """Return which digits are known in each pass, (P, n) bool."""
        return _known_before(self.passes, device)

    def draw_known(self, uniforms: Tensor) -> Tensor:
        """Choose the digits that a masked head is shown: every number of hidden ones is as likely, and every choice.

        Args:
            uniforms: (…, n + 1) in [0, 1).

        Returns:
            (…, n) bool, false for one digit at least.
        """
        num_hidden = 1 + (uniforms[..., :1] * self.num_digits).long().clamp_max(self.num_digits - 1)
        return uniforms[..., 1:].argsort(-1).argsort(-1) >= num_hidden


@lru_cache(maxsize=64)
def _known_before(passes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return which digits are known in each pass, (P, n) bool."""
    # Kept: a copy from the host at every training step would wait for the device.
    with torch.inference_mode(False):
        starts = torch.tensor([0, *accumulate(passes)][:-1]).to(device)
        return torch.arange(sum(passes), device=device) < starts[:, None]


def softmax_plan(vocab_size: int) -> HeadPlan:
    """Return the plan of one softmax over V codes."""
    return HeadPlan((vocab_size,), (1,))


def plan_of(prior) -> HeadPlan:
    """Return a prior's plan: one softmax for a family that knows of no other."""
    return getattr(prior, "head_plan", None) or softmax_plan(prior.vocab_size)


class HeadOptions(NamedTuple):
    """The fields of a prior's configuration that say what is predicted, at what they mean where it has none."""

    head: HeadKind = "softmax"
    head_groups: list[int] | None = None
    head_width: int | None = None
    head_layers: int | None = None
    head_passes: int | None = None
    code_bases: list[int] | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "HeadOptions":
        """Read them from a configuration."""
        return cls(**{name: getattr(config, name) for name in cls._fields if hasattr(config, name)})


def configured_plan(config: PreTrainedConfig) -> HeadPlan:
    """Return the plan that a prior's configuration asks for.

    Args:
        config: with `vocab_size`, and the fields of `HeadOptions` where the family offers them.

    Raises:
        ValueError: naming a field that is out of range or does not go with the others.
    """
    options, V = HeadOptions.of(config), config.vocab_size
    if options.head not in HEAD_KINDS:
        raise ValueError(f"head is {options.head!r}; expected one of {list(HEAD_KINDS)}")
    if options.code_bases is not None:
        _check_bases(options.code_bases, V)
    for field, kinds in _KINDS_OF_FIELDS.items():
        value = getattr(options, field)
        if value is not None and options.head not in kinds:
            raise ValueError(
                f"{field} is {value!r}; expected null for head {options.head!r}: it is an option of {', '.join(kinds)}"
            )
    if options.head == "softmax":
        return softmax_plan(V)
    if options.code_bases is None:
        raise ValueError(f"head is {options.head!r}; expected 'softmax', as the tokenizer's {V} codes have no digits")
    _check_count("head_width", options.head_width, MAX_HEAD_WIDTH)
    _check_count("head_layers", options.head_layers, MAX_HEAD_LAYERS)
    bases = _grouped_bases(options)
    if options.head == "digits":
        return HeadPlan(bases, (len(bases),))
    if options.head == "digits_in_turn":
        return HeadPlan(bases, (1,) * len(bases))
    _check_count("head_passes", options.head_passes, len(bases))
    num_passes = options.head_passes or min(DEFAULT_PASSES, len(bases))
    return HeadPlan(bases, cosine_passes(len(bases), num_passes), is_masked=len(bases) > 1)


def training_digits(plan: HeadPlan, num_tokens: int, seed: int, step: int, samples: Tensor) -> Tensor:
    """Choose the digits that a masked head is shown, a function of seed, step and the samples' numbers alone.

    Args:
        plan: of the head.
        num_tokens: L.
        seed: of the run.
        step: number of the training step, from 0.
        samples: (B,) int64 numbers of the samples in the data set.

    Returns:
        (B, L, n) bool.
    """
    num_uniforms = num_tokens * (plan.num_digits + 1)
    numbers = torch.arange(num_uniforms, device=samples.device) + samples[:, None] * num_uniforms
    uniforms = keyed_uniform(seed, step, _HIDING_KEY, samples=numbers)
    return plan.draw_known(uniforms.view(len(samples), num_tokens, -1))


def check_softmax(config: PreTrainedConfig, whose: str) -> None:
    """Refuse a prior of digits for a format that has none.

    Args:
        config: of the prior.
        whose: format, such as "VAR's".

    Raises:
        ValueError: naming the head.
    """
    if config.head != "softmax":
        raise ValueError(f"head is {config.head!r}; expected 'softmax' in {whose} format")


def cosine_passes(num_digits: int, num_passes: int) -> tuple[int, ...]:
    """Share n digits out among P passes, few to the first, of which the others depend (MaskGIT, arXiv:2202.04200).

    Args:
        num_digits: n.
        num_passes: P, 1 to n.

    Returns:
        P counts of at least 1 that add up to n.
    """
    ends = [0]
    for p in range(1, num_passes + 1):
        reached = round(num_digits * (1 - math.cos(math.pi / 2 * p / num_passes)))
        # One at least to this pass, and to each that follows.
        ends.append(min(max(reached, ends[-1] + 1), num_digits - (num_passes - p)))
    return tuple(end - start for start, end in zip(ends, ends[1:], strict=False))


def _check_bases(bases: Any, vocab_size: int) -> None:
    """Refuse bases that are none, or make other codes."""
    if not isinstance(bases, list):
        raise ValueError(f"code_bases is {bases!r:.80}; expected a list of whole numbers, or None")
    num_codes = CodeDigits(bases).num_codes
    if num_codes != vocab_size:
        raise ValueError(f"code_bases is {bases}, {num_codes} codes; expected {vocab_size}")


def _check_count(field: str, value: Any, highest: int) -> None:
    """Refuse an option that is neither None nor a count up to a bound."""
    if value is not None and (type(value) is not int or not 1 <= value <= highest):
        raise ValueError(f"{field} is {value!r}; expected an integer from 1 to {highest}, or null")


def _grouped_bases(options: HeadOptions) -> tuple[int, ...]:
    """Return the bases of the digits that the head predicts: the codebook's own, or groups of them."""
    digits, sizes = CodeDigits(options.code_bases), options.head_groups
    if sizes is None:
        return digits.bases
    if not isinstance(sizes, list):
        raise ValueError(f"head_groups is {sizes!r:.80}; expected a list of counts of digits, or null")
    try:
        return digits.grouped(tuple(sizes)).bases
    except ValueError as error:
        raise ValueError(
            f"head_groups is {sizes!r:.80}; expected counts that add up to the {digits.num_digits} digits of a code, "
            f"of bases {list(digits.bases)}"
        ) from error
