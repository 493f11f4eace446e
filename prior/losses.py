"""What a prior's forward pass gives, and the loss that every family shares.

Legend: B batch, L all tokens, V codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from nextblock.data.blocks import BlockLayout

# Labels of tokens that are not to be learned, as everywhere in transformers.
IGNORED_LABEL = -100
# Past this many blocks, a curve a block is no picture of anything.
MAX_LOGGED_BLOCKS = 16


@dataclass
class PriorOutput(ModelOutput):
    """What a prior's forward pass gives.

    Args:
        loss: scalar mean cross-entropy in nats over the tokens that have a label, with label smoothing; with labels
            only.
        logits: (B, L, V) in float32, or float64 for a float64 model; None where the loss was computed in chunks.
        token_loss: (B, L) cross-entropy without label smoothing, 0 where the label is −100; with labels only; without
            gradient where in chunks.
        token_correct: (B, L) whether no code is likelier than the label, false where that is −100; with labels only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_loss: Tensor | None = None
    token_correct: Tensor | None = None


def prior_output(logits: Tensor, labels: Tensor | None, label_smoothing: float = 0.0) -> PriorOutput:
    """Compare logits with labels.

    Args:
        logits: (B, L, V) in float32 or float64.
        labels: (B, L) int64 in [0, V), or −100 for tokens to ignore; None leaves the logits alone in the output.
        label_smoothing: in [0, 1); of the loss alone.

    Returns:
        A `PriorOutput`.
    """
    if labels is None:
        return PriorOutput(logits=logits)
    # Not transposed to (B, V, L): that would copy all logits.
    flat = logits.flatten(0, 1), labels.flatten()
    token_loss = F.cross_entropy(*flat, reduction="none", ignore_index=IGNORED_LABEL).view_as(labels)
    is_labelled = labels != IGNORED_LABEL
    if label_smoothing:
        loss = F.cross_entropy(*flat, label_smoothing=label_smoothing, ignore_index=IGNORED_LABEL)
    else:
        # Exactly the mean where all are labelled, without waiting for a GPU to know.
        loss = token_loss.mean() * (labels.numel() / is_labelled.sum().to(token_loss.dtype))
    # The largest value is found several times faster than its place.
    label_logits = logits.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    token_correct = (label_logits >= logits.amax(-1)) & is_labelled
    return PriorOutput(loss, logits, token_loss, token_correct)


def block_metrics(layout: BlockLayout) -> tuple[list[str], Tensor]:
    """Name the metrics of a training, of all tokens and of each block where blocks are few.

    Args:
        layout: the blocks.

    Returns:
        The names of all metrics, and the matrix (L, K) in float64 that averages over blocks, K = 0 where they are many.
    """
    names, blocks = ["loss", "accuracy"], layout.bounds if layout.num_blocks <= MAX_LOGGED_BLOCKS else []
    shares = torch.zeros(layout.num_tokens, len(blocks), dtype=torch.float64)
    for k, (start, end) in enumerate(blocks):
        names += [f"block_{k}/loss", f"block_{k}/accuracy"]
        shares[start:end, k] = 1 / (end - start)
    return names, shares
