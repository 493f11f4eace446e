"""What one call of the pipeline asks for, checked as a whole before anything is computed.

Legend: B images, L all tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Generator, Tensor

from nextblock.prior.conditioning import Condition
from nextblock.prior.sampling import SamplingOptions

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# All images of a call lie in memory.
MAX_IMAGES = 1 << 20
# Without a batch_size, more images than this are sampled in several batches.
MAX_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How many images go into a batch, and whether a batch of fewer is filled up.

    Args:
        num_images: images in every batch but the last.
        is_filled: whether the last batch is padded to as many: all are then computed, and rounded, alike. Only who asks
            for a size pays for rows that nobody wants.
    """

    num_images: int = MAX_BATCH_SIZE
    is_filled: bool = False

    def num_rows(self, num_images: int) -> int:
        """Return how many rows are computed for a batch of images."""
        return self.num_images if self.is_filled else num_images

    def pad(self, rows: Tensor) -> Tensor:
        """Repeat the first row at the end, up to the batch's rows."""
        num_missing = self.num_rows(len(rows)) - len(rows)
        return torch.cat([rows, rows[:1].expand(num_missing, *rows.shape[1:])]) if num_missing else rows


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One call.

    Args:
        condition: of B images.
        generators: B generators.
        given_idx_BL: (B, L) known tokens, −1 for those to sample; or None.
        options: how tokens are drawn.
        batch: how many images are sampled at a time.
        callback: `callback_on_step_end`, or None.
        tensor_inputs: names of the tensors that the callback receives.
    """

    condition: Condition
    generators: list[Generator]
    given_idx_BL: Tensor | None
    options: SamplingOptions
    batch: BatchShape
    callback: Callable | None
    tensor_inputs: tuple[str, ...]


def check_counts(output_type: str, output_types: Sequence[str] = OUTPUT_TYPES, **counts: int | None) -> None:
    """Refuse counts that are not positive integers, and unknown output types; None passes for a count.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    if not isinstance(output_type, str) or output_type not in output_types:
        raise ValueError(f"output_type is {output_type!r}; expected one of {list(output_types)}")
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)


def check_count(name: str, value: int) -> None:
    """Refuse what is no positive integer, or more images than a call can be meant to give.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    if type(value) is not int or not 1 <= value <= MAX_IMAGES:
        raise ValueError(f"{name} is {value!r:.80}; expected a positive integer up to {MAX_IMAGES}")


def check_callback(callback, tensor_inputs, allowed: Sequence[str]) -> tuple[str, ...]:
    """Refuse a callback that cannot be called, or tensors that there are not.

    Args:
        callback: `callback_on_step_end`; one of diffusers' callback classes brings its own tensor inputs.
        tensor_inputs: names asked for.
        allowed: names there are.

    Returns:
        The names of the tensors that the callback receives.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is {callback!r}; expected a function, or None")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    is_listed = isinstance(tensor_inputs, (list, tuple)) and all(name in allowed for name in tensor_inputs)
    if not is_listed:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs is {tensor_inputs!r}; expected a list of names among {list(allowed)}"
        )
    return tuple(tensor_inputs)
