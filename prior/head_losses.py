"""The loss of every head under teacher forcing, all tokens at once or a chunk at a time.

Legend: B batch, L all tokens, N tokens, n digits of a token, S scores of all its digits, P passes, V codes, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunked_loss import chunked_head_loss, in_chunks
from .head_plan import HeadPlan
from .heads import UNKNOWN, head_scores
from .losses import IGNORED_LABEL, PriorOutput, prior_output


def head_output(
    head: nn.Module,
    plan: HeadPlan,
    hidden_states: Tensor,
    labels: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    known_digits: Tensor | None = None,
    is_training: bool = False,
) -> PriorOutput:
    """Compare a head's scores with labels.

    The loss of a token is the negative logarithm of the probability with which sampling draws its code, in nats: of one
    softmax, or the sum over digits, each given those of the passes before. A masked head in training is shown digits at
    random instead, and n/m times the loss of the m hidden ones is an unbiased estimate of the any-order bound on that
    (Hoogeboom et al. 2022, arXiv:2110.02037).

    Args:
        head: from `build_head`.
        plan: its digits and passes.
        hidden_states: (B, L, D), what the head takes.
        labels: (B, L) int64 in [0, V), or −100 for tokens to ignore; None leaves the scores alone in the output, of
            digits those given that none is known.
        label_smoothing: in [0, 1), of each softmax; of the loss alone.
        chunk_size: tokens whose scores exist at a time; None takes all and returns them.
        known_digits: (B, L, n) bool, the digits that a masked head is shown; None chooses them at random with torch's
            default generator where `is_training`, and else goes by the passes.
        is_training: whether the loss is to be learned from.

    Returns:
        A `PriorOutput`; its `logits` are the scores (B, L, S) that the loss is made of, and a token is correct where
        every digit predicted is at least as likely as any other.

    Raises:
        ValueError: if `chunk_size` or `known_digits` is not as it must be.
    """
    _check_known(known_digits, plan, hidden_states)
    if labels is None:
        return PriorOutput(logits=head_scores(head, hidden_states))
    if plan.num_digits == 1:
        if chunk_size is None:
            return prior_output(head_scores(head, hidden_states), labels, label_smoothing)
        loss, token_loss, token_correct = chunked_head_loss(
            head, hidden_states, labels, label_smoothing=label_smoothing, chunk_size=chunk_size
        )
        return PriorOutput(loss=loss, token_loss=token_loss, token_correct=token_correct)
    if plan.is_masked and is_training and known_digits is None:
        known_digits = plan.draw_known(torch.rand(*labels.shape, plan.num_digits + 1, device=labels.device))
    return _digits_output(head, plan, hidden_states, labels, label_smoothing, chunk_size, known_digits)


def _digits_output(
    head: nn.Module,
    plan: HeadPlan,
    hidden_states: Tensor,
    labels: Tensor,
    label_smoothing: float,
    chunk_size: int | None,
    known_digits: Tensor | None,
) -> PriorOutput:
    """Compare scores of digits with labels; see `head_output`."""

    def compare(x: Tensor, y: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digits = plan.digits.split(y.clamp_min(0))
        scores = forced_scores(head, plan, x, digits, known)
        return *_digit_losses(plan, scores, digits, known, y != IGNORED_LABEL, label_smoothing), scores

    given = (hidden_states, labels) if known_digits is None else (hidden_states, labels, known_digits)
    if chunk_size is None:
        smooth_loss, token_loss, token_correct, scores = compare(*given)
        loss = smooth_loss.sum() / (labels != IGNORED_LABEL).sum()
        return PriorOutput(loss, scores, token_loss, token_correct)
    loss, token_loss, token_correct = in_chunks(_summed(compare), given, labels, chunk_size)
    return PriorOutput(loss=loss, token_loss=token_loss, token_correct=token_correct)


def forced_scores(
    head: nn.Module, plan: HeadPlan, hidden_states: Tensor, digits: Tensor, known: Tensor | None = None
) -> Tensor:
    """Score each digit given the true ones that are known when it is drawn.

    Args:
        head: from `build_head`.
        plan: its digits and passes.
        hidden_states: (…, D).
        digits: (…, n) int64.
        known: (…, n) bool, the digits shown at once; None takes each pass with those before it.

    Returns:
        (…, S).
    """
    if known is not None:
        return head_scores(head, hidden_states, torch.where(known, digits, UNKNOWN))
    if len(plan.passes) == 1:
        return head_scores(head, hidden_states)
    shown = torch.where(plan.known_before(digits.device), digits[..., None, :], UNKNOWN)
    of_passes = head_scores(head, hidden_states[..., None, :], shown)
    columns = [slice(*plan.columns(*bounds)) for bounds in plan.pass_bounds]
    return torch.cat([of_passes[..., p, own] for p, own in enumerate(columns)], dim=-1)


def _digit_losses(
    plan: HeadPlan, scores: Tensor, digits: Tensor, known: Tensor | None, is_labelled: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's loss to learn from, its loss without label smoothing, and its hit, (…) each."""
    smooth, plain, correct = [], [], []
    for where, logits in plan.by_base(scores):
        true = digits[..., where]
        flat = logits.flatten(0, -2), true.flatten()
        plain.append(F.cross_entropy(*flat, reduction="none").view_as(true))
        if label_smoothing:
            smooth.append(F.cross_entropy(*flat, reduction="none", label_smoothing=label_smoothing).view_as(true))
        correct.append(logits.gather(-1, true[..., None])[..., 0] >= logits.amax(-1))
    is_correct = torch.cat(correct, dim=-1)
    if known is not None:
        is_correct = is_correct | known
        num_hidden = (~known).sum(-1, keepdim=True).clamp_min(1)
        weights = ~known * (plan.num_digits / num_hidden.to(scores.dtype))
    sums = []
    for parts in (smooth or plain, plain):
        losses = torch.cat(parts, dim=-1)
        sums.append((losses if known is None else losses * weights).sum(-1).masked_fill(~is_labelled, 0))
    return *sums, is_correct.all(-1) & is_labelled


def _summed(compare: Callable) -> Callable:
    """Make of a comparison one whose first result is a sum, for chunks, and whose others have no gradient."""

    def chunk(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        smooth_loss, token_loss, token_correct, _ = compare(*given)
        return smooth_loss.sum(), token_loss.detach(), token_correct

    return chunk


def _check_known(known_digits: Tensor | None, plan: HeadPlan, hidden_states: Tensor) -> None:
    """Refuse digits to show that are none of a masked head's."""
    if known_digits is None:
        return
    if not plan.is_masked:
        raise ValueError("known_digits is given; expected None for a head that is not trained with hidden digits")
    expected = (*hidden_states.shape[:-1], plan.num_digits)
    if getattr(known_digits, "shape", None) != expected or known_digits.dtype != torch.bool:
        got = getattr(known_digits, "shape", known_digits)
        raise ValueError(f"known_digits is {got!r:.80}; expected a torch.bool tensor {expected}")
