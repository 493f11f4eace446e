"""Alarms about a codebook that the model no longer uses, from the figures of a log line."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_USAGE = re.compile(r"train/codebook/(?:block_(?P<block>\d+)/)?usage")
REMEDY = (
    "set model.codebook_update ema, model.codebook_init data and model.revival_threshold 0.02 or more, make "
    "model.vocab_size smaller or the batch larger; a collapsed codebook seldom recovers by itself"
)


def expected_usage(num_tokens: int, vocab_size: int) -> float:
    """Return the share of codes that occurs among tokens drawn evenly from all codes.

    Args:
        num_tokens: drawn, at least 1.
        vocab_size: number of codes.

    Returns:
        The expected share, in (0, 1].
    """
    if vocab_size == 1:
        return 1.0
    return -math.expm1(num_tokens * math.log1p(-1 / vocab_size))


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """What there is to use: a task states it whose metrics tell "codebook/usage", and "codebook/block_3/usage" or so.

    Args:
        num_codes: V.
        num_tokens: tokens that usage is measured on at a time, of each block.
    """

    num_codes: int
    num_tokens: Sequence[int]


class UsageAlarm:
    """Warn when the codebook, or one block's part in it, uses far fewer codes than it could.

    Usage is that of a step's batch, so it is compared with what evenly used codes would reach in as many tokens: a
    block of one token an image cannot use 4096 codes in a batch of 64. A block is compared with the most it has used
    since the start, where that is less: coarse scales of images that are alike need few codes.

    Args:
        code_usage: how many codes and tokens there are; None never rings.
        threshold: share of that usage under which the alarm rings; None never rings.
        cooldown: steps that the same figure then stays silent for.
    """

    def __init__(self, code_usage: CodeUsage | None, threshold: float | None, cooldown: int):
        self._code_usage = code_usage
        self._threshold = threshold
        self._cooldown = cooldown
        self._rang_at: dict[str, int] = {}
        self._highest: dict[str, float] = {}

    def messages(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Return a warning for every figure that is too low and not in its cooldown.

        Args:
            step: steps taken.
            values: figures of a log line; "train/codebook/usage" and "train/codebook/block_3/usage" are looked at.
        """
        if self._code_usage is None or self._threshold is None:
            return []
        found = []
        for name, value in values.items():
            match = _USAGE.fullmatch(name)
            if match is None:
                continue
            expected = attainable = self._attainable(match["block"])
            if match["block"] is not None:
                self._highest[name] = max(value, self._highest.get(name, 0.0))
                expected = min(attainable, self._highest[name])
            is_silent = name in self._rang_at and step - self._rang_at[name] < self._cooldown
            if value >= self._threshold * expected or is_silent:
                continue
            self._rang_at[name] = step
            where = "the codebook" if match["block"] is None else f"block {match['block']} of the codebook"
            past = f"it has used {expected:.1%} and " if expected < attainable else ""
            found.append(
                f"step {step}: {where} uses {value:.1%} of the codes a batch, where {past}evenly used codes would "
                f"reach {attainable:.1%}: {REMEDY}"
            )
        return found

    def _attainable(self, block: str | None) -> float:
        num_tokens = self._code_usage.num_tokens
        return expected_usage(sum(num_tokens) if block is None else num_tokens[int(block)], self._code_usage.num_codes)
