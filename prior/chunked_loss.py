"""Output projection and cross-entropy in one, a chunk of tokens at a time: the logits never exist whole.

The gradient of a chunk is formed while its logits are there, so nothing is computed twice (as in Liger Kernel,
arXiv:2410.10989). Legend: B batch, L all tokens, N = B·L, n tokens of a chunk, V codes, D width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nextblock.training.precision import full_precision, in_run_precision, outside_autocast

from .linear import Linear
from .losses import IGNORED_LABEL


def chunked_head_loss(
    head: nn.Module, hidden_states: Tensor, labels: Tensor, *, label_smoothing: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cross-entropy of a head, whatever module it is, with the logits of one chunk at a time.

    Args:
        head: maps (…, D) to (…, V), under autocast in its type. A plain `nn.Linear` takes the way of
            `chunked_cross_entropy`; any other, one with an adapter say, is called on every chunk, and once more in the
            backward pass.
        hidden_states: (B, L, D), what the head takes.
        labels: see `chunked_cross_entropy`, as for the arguments after it.
        label_smoothing: of the loss alone.
        chunk_size: n.

    Returns:
        What `chunked_cross_entropy` does.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    options = {"label_smoothing": label_smoothing, "chunk_size": chunk_size}
    if _is_bare_linear(head):
        given = (hidden_states, head.weight, head.bias)
        factors = [None if factor is None else in_run_precision(factor) for factor in given]
        with outside_autocast(hidden_states.device):
            return chunked_cross_entropy(*factors, labels, **options)
    return in_chunks(partial(_chunk_loss, head, label_smoothing), (hidden_states, labels), labels, chunk_size)


def in_chunks(
    chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]], given: tuple[Tensor, ...], labels: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a loss a chunk of tokens at a time, and once more in the backward pass.

    Args:
        chunk_loss: takes a chunk (n, …) of each tensor given; returns the summed loss, and its tokens' losses and hits
            (n,) without gradient.
        given: tensors (B, L, …).
        labels: (B, L) int64, −100 for tokens to ignore.
        chunk_size: n.

    Returns:
        What `chunked_cross_entropy` does.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    _check_chunk_size(chunk_size)
    smooth_sum, token_loss, token_correct = 0.0, [], []
    for chunk in zip(*(tensor.flatten(0, 1).split(chunk_size) for tensor in given), strict=True):
        chunk_sum, *of_tokens = checkpoint(chunk_loss, *chunk, use_reentrant=False)
        smooth_sum = smooth_sum + chunk_sum
        for parts, part in zip((token_loss, token_correct), of_tokens, strict=True):
            parts.append(part)
    num_labelled = (labels != IGNORED_LABEL).sum()
    return smooth_sum / num_labelled, *(torch.cat(parts).view_as(labels) for parts in (token_loss, token_correct))


def _is_bare_linear(head: nn.Module) -> bool:
    """Tell whether a head is its weight and bias, and nothing happens when it is called."""
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    is_linear = type(head) in (nn.Linear, Linear)
    return is_linear and "forward" not in vars(head) and not any(hooks)


def _chunk_loss(head: nn.Module, label_smoothing: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss of a chunk (n, D), and without gradient its tokens' losses and hits (n,)."""
    logits = full_precision(head(x))
    loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED_LABEL)
    with torch.no_grad():
        token_loss = F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORED_LABEL)
        label_logits = logits.gather(-1, y.clamp_min(0)[:, None])[:, 0]
        return loss, token_loss, (label_logits >= logits.amax(-1)) & (y != IGNORED_LABEL)


def _check_chunk_size(chunk_size: int) -> None:
    """Refuse chunks of nothing."""
    if type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"loss_chunk_size is {chunk_size!r}; expected an integer of at least 1")


def chunked_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `cross_entropy(linear(hidden_states, weight, bias), labels)` does, with (n, V) in place of (N, V).

    Args:
        hidden_states: (B, L, D).
        weight: (V, D) of the output projection, in the same dtype.
        bias: (V,) likewise, or None.
        labels: (B, L) int64 in [0, V), or −100 for tokens to ignore.
        label_smoothing: in [0, 1); of the loss alone.
        chunk_size: n, tokens at a time, at least 1.

    Returns:
        The scalar mean loss over the tokens that have a label, from which gradients flow back; each token's loss
        without label smoothing (B, L), from which none do; and whether no code is likelier than the label (B, L). The
        last two are 0 and false for tokens to ignore.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    _check_chunk_size(chunk_size)
    # Without this question a validation would form gradients that nobody wants.
    factors = [hidden_states, weight] + ([] if bias is None else [bias])
    is_training = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    loss, token_loss, token_correct = _HeadLoss.apply(
        hidden_states.flatten(0, 1), weight, bias, labels.flatten(), label_smoothing, chunk_size, is_training
    )
    return loss, token_loss.view_as(labels), token_correct.view_as(labels)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear map, (N, D) → scalar, with gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, label_smoothing, chunk_size, is_training):
        # Products in the dtype given; all that follows them in float32 at least.
        N, dtype = len(hidden_states), torch.promote_types(weight.dtype, torch.float32)
        token_loss = torch.empty(N, dtype=dtype, device=weight.device)
        smooth_loss = torch.empty_like(token_loss) if label_smoothing else token_loss
        token_correct = torch.empty(N, dtype=torch.bool, device=weight.device)
        if is_training:
            d_hidden_states = torch.empty_like(hidden_states)
            d_weight, d_bias = torch.zeros_like(weight, dtype=dtype), weight.new_zeros(len(weight), dtype=dtype)
        for start in range(0, N, chunk_size):
            chunk = slice(start, min(start + chunk_size, N))
            x, is_labelled = hidden_states[chunk], labels[chunk] != IGNORED_LABEL
            y = labels[chunk, None].clamp_min(0)
            logits = F.linear(x, weight, bias).to(dtype)
            log_sum = logits.logsumexp(-1, keepdim=True)
            label_logits = logits.gather(-1, y)
            token_loss[chunk] = (log_sum - label_logits)[:, 0].masked_fill_(~is_labelled, 0)
            token_correct[chunk] = (label_logits >= logits.amax(-1, keepdim=True))[:, 0] & is_labelled
            if label_smoothing:
                spread = log_sum[:, 0] - logits.mean(-1)
                smoothed = torch.lerp(token_loss[chunk], spread, label_smoothing)
                smooth_loss[chunk] = smoothed.masked_fill_(~is_labelled, 0)
            if is_training:
                d_logits = _logits_gradient(logits, log_sum, y, is_labelled[:, None], label_smoothing).to(weight.dtype)
                d_hidden_states[chunk] = d_logits @ weight
                if dtype == weight.dtype:
                    d_weight.addmm_(d_logits.T, x)
                else:
                    d_weight += d_logits.T @ x
                if bias is not None:
                    d_bias += d_logits.sum(0)
        # Exactly 1 where all are labelled, without waiting for a GPU to know.
        share = N / (labels != IGNORED_LABEL).sum().to(dtype)
        if is_training:
            ctx.save_for_backward(d_hidden_states, d_weight, d_bias, share)
            ctx.dtype, ctx.has_bias = weight.dtype, bias is not None
        ctx.mark_non_differentiable(token_loss, token_correct)
        return smooth_loss.mean() * share, token_loss, token_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        # The mean's 1/N comes last, after the loss scale: before it, half-precision gradients would vanish.
        *gradients, share = ctx.saved_tensors
        scale = d_loss / len(gradients[0]) * share
        d_hidden_states, d_weight, d_bias = ((gradient * scale).to(ctx.dtype) for gradient in gradients)
        return d_hidden_states, d_weight, d_bias if ctx.has_bias else None, None, None, None, None


def _logits_gradient(
    logits: Tensor, log_sum: Tensor, y: Tensor, is_labelled: Tensor, label_smoothing: float
) -> Tensor:
    """Turn logits (n, V), in place, into the gradient of their summed loss: probabilities less smoothed targets.

    Rows without a label become 0.
    """
    probabilities = logits.sub_(log_sum.masked_fill(~is_labelled, torch.inf)).exp_()
    weight = is_labelled.to(logits.dtype)
    if label_smoothing:
        probabilities -= label_smoothing / logits.shape[-1] * weight
    return probabilities.scatter_add_(-1, y, (label_smoothing - 1) * weight)
