"""Alarms about a codebook, or a block's part in it, that the model does not use, from the figures of a log line."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_USAGE = re.compile(r"train/codebook/(?:block_(?P<block>\d+)/)?usage")
REMEDY = (
    "set model.codebook_update ema, model.codebook_init data and model.revival_threshold 0.02 or more, make "
    "model.vocab_size smaller or the batch larger; a collapsed codebook seldom recovers by itself"
)
# Codes a batch, averaged over the steps of a log line. Digits, alike as they are, come close to one at their 1×1 scale.
_ONE_CODE, _SEVERAL_CODES, _MANY_CODES = 1.05, 3, 8
# By then a codebook has spread.
_NUM_FIRST_STEPS = 20


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
    since the start, where that is less: coarse scales of images that are alike need few codes. But a block that uses
    one code while another uses many (eight, or half of fewer than sixteen) rings whatever its past, the first steps
    aside: it tells nothing of an image.

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
        for name in values:
            match = _USAGE.fullmatch(name)
            if match is None:
                continue
            message = self._message(step, name, match["block"], values)
            is_silent = name in self._rang_at and step - self._rang_at[name] < self._cooldown
            if message is None or is_silent:
                continue
            self._rang_at[name] = step
            found.append(f"step {step}: {message}")
        return found

    def _message(self, step: int, name: str, block: str | None, values: Mapping[str, float]) -> str | None:
        """Say what is wrong with a figure, or return None."""
        value = values[name]
        expected = attainable = self._attainable(block)
        if block is not None:
            self._highest[name] = max(value, self._highest.get(name, 0.0))
            expected = min(attainable, self._highest[name])
            other = self._busiest_other(name, values)
            if step >= _NUM_FIRST_STEPS and other is not None and self._uses_one_code(value, attainable):
                return (
                    f"block {block} of the codebook uses one code for every image of a batch, while block {other} uses "
                    f"many: it tells nothing of an image, unless all images are alike there. {REMEDY}"
                )
        if value >= self._threshold * expected:
            return None
        where = "the codebook" if block is None else f"block {block} of the codebook"
        past = f"it has used {expected:.1%} and " if expected < attainable else ""
        return (
            f"{where} uses {value:.1%} of the codes a batch, where {past}evenly used codes would reach "
            f"{attainable:.1%}: {REMEDY}"
        )

    def _uses_one_code(self, value: float, attainable: float) -> bool:
        """Tell whether a block's usage is that of one code, where its tokens could take several."""
        num_codes = self._code_usage.num_codes
        return value * num_codes < _ONE_CODE and attainable * num_codes >= _SEVERAL_CODES

    def _busiest_other(self, name: str, values: Mapping[str, float]) -> str | None:
        """Return the number of the block that uses most codes, if these are many and it is another one."""
        blocks = {other: match["block"] for other in values if (match := _USAGE.fullmatch(other)) and match["block"]}
        busiest = max(blocks, key=values.__getitem__, default=name)
        num_codes = self._code_usage.num_codes
        is_many = values[busiest] * num_codes >= min(_MANY_CODES, num_codes / 2)
        return blocks[busiest] if busiest != name and is_many else None

    def _attainable(self, block: str | None) -> float:
        num_tokens = self._code_usage.num_tokens
        return expected_usage(sum(num_tokens) if block is None else num_tokens[int(block)], self._code_usage.num_codes)
