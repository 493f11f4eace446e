"""Heads of every kind over small codebooks, and what they must compute, written down digit by digit."""

import itertools
import math

import torch

# 24 codes: bases that differ, neighbours that do not, and runs of one.
BASES = [2, 2, 3, 2]
V = math.prod(BASES)
HEADS = {
    "digits": {"head": "digits"},
    "grouped": {"head": "digits", "head_groups": [1, 2, 1]},
    "in turn": {"head": "digits_in_turn", "head_width": 12, "head_layers": 1},
    "in turn, grouped": {"head": "digits_in_turn", "head_groups": [2, 2]},
    "masked, 1 pass": {"head": "masked_digits", "head_passes": 1},
    "masked, 2 passes": {"head": "masked_digits", "head_passes": 2, "head_width": 12},
    "masked": {"head": "masked_digits"},
}
CODES = {"code_bases": BASES, "vocab_size": V}


def columns(bases):
    """Where each digit's scores lie."""
    ends = list(itertools.accumulate(bases))
    return [slice(end - base, end) for base, end in zip(bases, ends, strict=True)]


def digits_of(idx: int, bases) -> list[int]:
    digits = []
    for base in bases:
        idx, digit = divmod(idx, base)
        digits.append(digit)
    return digits


def plain_loss(score, plan, idx: int) -> float:
    """The negative logarithm of a code's probability; `score` gives all scores (S,) of a list of digits, −1 unknown."""
    true, known, loss = digits_of(idx, plan.bases), [-1] * len(plan.bases), 0.0
    drawn = iter(range(len(true)))
    for size in plan.passes:
        scores, own = score(known), list(itertools.islice(drawn, size))
        for i in own:
            loss -= scores[columns(plan.bases)[i]].double().log_softmax(0)[true[i]].item()
        for i in own:
            known[i] = true[i]
    return loss


def scores_of(head, hidden):
    """Give the scores of one token's hidden state (D,), as a function of its known digits."""

    def score(known):
        if isinstance(head, torch.nn.Linear):
            return head(hidden)
        return head(hidden[None], torch.tensor([known]))[0]

    return score
