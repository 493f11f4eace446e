"""What the calls of every family of priors share: looking at arguments, the end of a forward pass, sampling.

Legend: B batch, K blocks, L_k tokens of block k, L all tokens, V codes, C code channels, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedConfig

from nextblock.data.given import FLOAT_DTYPES, check_tensor

from .conditioning import Condition
from .family import Prior, check_given, check_quantizer
from .generation import BlockStep, generate
from .head_losses import head_output
from .losses import IGNORED_LABEL, PriorOutput
from .sampling import SamplingOptions, image_generators
from .text_condition import TextConditions


def check_teacher_input(prior: Prior, var_input: Tensor, num_samples: int, labels: Tensor | None) -> None:
    """Refuse tensors of a forward pass that do not fit the layout or the vocabulary.

    Args:
        prior: that is called.
        var_input: (B, L − L_1, C), or (B, L − L_1) int64 where the prior takes indices.
        num_samples: B, of the condition.
        labels: (B, L) int64 in [0, V) or −100, or None.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """
    B, L = num_samples, prior.layout.num_tokens
    rest = L - prior.layout.block_lengths[0]
    expected = (B, rest) if prior.takes_indices else (B, rest, prior.embedding_dim)
    kind = "torch.int64 indices" if prior.takes_indices else "floating-point vectors"
    check_tensor("var_input", var_input, f"a tensor {expected} of {kind}")
    if tuple(var_input.shape) != expected:
        raise ValueError(f"var_input has shape {tuple(var_input.shape)}; expected {expected}")
    if var_input.dtype not in ((torch.int64,) if prior.takes_indices else FLOAT_DTYPES):
        raise ValueError(f"var_input has dtype {var_input.dtype}; expected {kind}")
    if prior.takes_indices:
        _check_codes("var_input", var_input, prior.vocab_size)
    if labels is None:
        return
    check_tensor("labels", labels, f"a torch.int64 tensor {(B, L)}, or None")
    if tuple(labels.shape) != (B, L) or labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; expected torch.int64 {(B, L)}")
    _check_codes("labels", labels, prior.vocab_size, ignored=IGNORED_LABEL)


def check_loss_options(labels: Tensor | None, loss_chunk_size: int | None) -> None:
    """Refuse to compute a loss in chunks where there are no labels.

    Raises:
        ValueError: naming both arguments.
    """
    if loss_chunk_size is not None and labels is None:
        raise ValueError(f"loss_chunk_size is {loss_chunk_size} but labels is None; expected None, or labels")


def predicted(
    prior: Prior,
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor | None,
    return_dict: bool | None,
    loss_chunk_size: int | None,
    known_digits: Tensor | None,
) -> PriorOutput | tuple:
    """End a forward pass: scores, the loss, and the output as it was asked for.

    Args:
        prior: that is called, with its `head_plan`, and `label_smoothing` in its configuration.
        head: its head.
        hidden_states: (B, L, D), what the head takes.
        labels: (B, L) int64, or None.
        return_dict: False returns a tuple of what is not None.
        loss_chunk_size: tokens whose logits exist at a time; None computes those of all.
        known_digits: see `head_output`.

    Returns:
        What `head_output` does, by name or as a tuple.
    """
    output = head_output(
        head,
        prior.head_plan,
        hidden_states,
        labels,
        label_smoothing=prior.config.label_smoothing,
        chunk_size=loss_chunk_size,
        known_digits=known_digits,
        is_training=prior.training,
    )
    return returned(output, return_dict, prior.config)


def returned(output: PriorOutput, return_dict: bool | None, config: PreTrainedConfig) -> PriorOutput | tuple:
    """Return an output as it was asked for: by name, or as a tuple of what is not None."""
    is_tuple = return_dict is False or (return_dict is None and not config.return_dict)
    return output.to_tuple() if is_tuple else output


def as_labels(class_labels: Any) -> Tensor:
    """Make a tensor of labels that may be a list or an array, one at least.

    Raises:
        ValueError: naming what is none.
    """
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_labels is {class_labels!r:.80}; expected a torch.int64 tensor (batch,)") from error
    if not labels.numel():
        raise ValueError("class_labels holds no label; expected one an image")
    return labels


def read_condition(
    prior: Prior, class_labels: Any, text_embeds: Tensor | None, text_mask: Tensor | None, *, reads_range: bool
) -> Condition:
    """Read labels, text features or a condition, whichever a model's call was given.

    Args:
        prior: that is called.
        class_labels: (B,) int64, or a condition; None where there are text features.
        text_embeds: (B, T, E), or None.
        text_mask: (B, T), or None.
        reads_range: whether values are looked at, for which a GPU would have to be waited for.

    Raises:
        ValueError: if both or neither are given, or what the prior is not conditioned on.
    """
    is_of_text = isinstance(prior.conditions, TextConditions)
    if text_embeds is None and text_mask is None:
        if class_labels is None and is_of_text:
            raise ValueError("text_embeds is None; expected text features: the prior is conditioned on text")
        return prior.conditions.of(class_labels, reads_range=reads_range)
    if class_labels is not None:
        raise ValueError("class_labels and text_embeds are both given; expected one of them")
    if not is_of_text:
        raise ValueError("text_embeds is given; expected class_labels: the prior is conditioned on classes")
    return prior.conditions.of({"text_embeds": text_embeds, "text_mask": text_mask}, reads_range=reads_range)


def sample_blocks(
    prior: Prior,
    condition: Condition,
    quantizer: nn.Module,
    options: Mapping[str, Any],
    *,
    generator: Generator | list[Generator] | None = None,
    given_idx_Bl: list[Tensor] | None = None,
    on_block_end: Callable[[BlockStep], None] | None = None,
    is_guidance_fixed: bool = True,
) -> list[Tensor]:
    """Check what a family's `generate` was given, and sample the indices of a batch of images, block by block.

    Args:
        prior: of any family.
        condition: of B images.
        quantizer: the tokenizer's quantizer, which turns sampled indices into the next block's input.
        options: fields of `SamplingOptions` by name.
        generator: one for all images, or a list with one for each.
        given_idx_Bl: K tensors (B, L_k) int64 of tokens that are already known, −1 for those to sample; None samples
            all.
        on_block_end: receives each block's `BlockStep`, and may change it.
        is_guidance_fixed: whether `on_block_end` leaves the guidance alone; costs nothing where it does.

    Returns:
        K tensors (B, L_k) int64, fewer if `on_block_end` stops.

    Raises:
        ValueError: if an argument is outside its range or the quantizer does not fit.
    """
    options = SamplingOptions(**options)
    options.check_for(prior)
    check_quantizer(prior, quantizer)
    if on_block_end is not None and not callable(on_block_end):
        raise ValueError(f"on_block_end is {on_block_end!r}; expected a function, or None")
    if given_idx_Bl is not None:
        check_given(prior, given_idx_Bl, len(condition))
    return generate(
        prior,
        condition,
        quantizer,
        options,
        image_generators(generator, len(condition)),
        given_idx_BL=None if given_idx_Bl is None else prior.layout.join(given_idx_Bl),
        on_block_end=on_block_end,
        is_guidance_fixed=is_guidance_fixed,
    )


def _check_codes(name: str, idx: Tensor, vocab_size: int, ignored: int = 0) -> None:
    """Refuse indices on the CPU that are neither codes nor a number that is ignored; a GPU is not waited for."""
    if idx.device.type == "cpu":
        is_wrong = ((idx < 0) & (idx != ignored)) | (idx >= vocab_size)
        if is_wrong.any():
            also = f", or {ignored}" if ignored else ""
            raise ValueError(f"{name} holds {idx[is_wrong][0].item()}; expected 0 to {vocab_size - 1}{also}")
