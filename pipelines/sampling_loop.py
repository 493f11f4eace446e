"""The sampling behind the pipeline's calls: a checked request, blocks of indices batch by batch, maps, pictures.

Legend: B images, n images of a batch, K blocks, L_k tokens of block k, C code channels, h×w latent cells.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor

from nextblock.data.finite import check_finite
from nextblock.data.pixels import to_output
from nextblock.prior.conditioning import Condition
from nextblock.prior.family import check_given
from nextblock.prior.generation import generate
from nextblock.prior.sampling import SamplingOptions, image_generators
from nextblock.training.offload import run_offload_hook

from .block_loop import BlockLoop
from .labels import resolve_labels
from .sampling_request import BatchShape, SamplingRequest, check_callback, check_count, check_counts


def make_request(
    pipe,
    class_labels: int | str | Sequence[int | str] | Tensor | None = None,
    num_images_per_label: int = 1,
    **asked,
) -> SamplingRequest:
    """Check what is asked of a pipeline of classes as a whole, before anything is computed.

    Args:
        pipe: the pipeline.
        class_labels: see the pipeline's `__call__`.
        num_images_per_label: images of each label.
        asked: see `request_for`.

    Returns:
        What `run` takes, once: generators move on.

    Raises:
        ValueError: if an argument is outside its range or a class name is unknown.
    """
    check_count("num_images_per_label", num_images_per_label)

    def make_condition() -> Condition:
        labels = resolve_labels(class_labels, pipe.prior.conditions)
        return pipe.prior.conditions.of(torch.tensor(labels).repeat_interleave(num_images_per_label))

    return request_for(pipe, make_condition, **asked)


def request_for(
    pipe,
    make_condition: Callable[[], Condition],
    *,
    options: SamplingOptions,
    generator: Generator | list[Generator] | None = None,
    idx_Bl: list[Tensor] | None = None,
    batch_size: int | None = None,
    callback: Callable | None = None,
    callback_tensor_inputs: Sequence[str] = (),
) -> SamplingRequest:
    """Check what is asked of a pipeline besides the condition, then make the condition, which may take long.

    Args:
        pipe: the pipeline.
        make_condition: gives that of all images.
        options: how tokens are drawn.
        generator: one, or one for each image; see the pipeline's `__call__`, as for the arguments after it.
        idx_Bl: known tokens.
        batch_size: images sampled at a time.
        callback: `callback_on_step_end`.
        callback_tensor_inputs: `callback_on_step_end_tensor_inputs`.

    Returns:
        What `run` takes, once: generators move on.

    Raises:
        ValueError: if an argument is outside its range.
    """
    check_counts("pil", batch_size=batch_size)
    prior = pipe.prior
    options.check_for(prior)
    tensor_inputs = check_callback(callback, callback_tensor_inputs, pipe._callback_tensor_inputs)
    condition = make_condition()
    if idx_Bl is not None:
        check_given(prior, idx_Bl, len(condition))
    return SamplingRequest(
        condition=condition,
        # Last: a single generator moves on, which a refused call must not cause.
        generators=image_generators(generator, len(condition)),
        given_idx_BL=None if idx_Bl is None else prior.layout.join(idx_Bl),
        options=options,
        batch=BatchShape() if batch_size is None else BatchShape(num_images=batch_size, is_filled=True),
        callback=callback,
        tensor_inputs=tensor_inputs,
    )


@torch.no_grad()
def run(pipe, request: SamplingRequest, output_type: str, decode_batch_size: int | None = None):
    """Sample the images of a request.

    Args:
        pipe: the pipeline that the request was made for.
        request: from `make_request`.
        output_type: see the pipeline's `__call__`.
        decode_batch_size: images decoded at a time; None decodes in the batches that were sampled.

    Returns:
        What the pipeline's `__call__` has as `images`.
    """
    with hooks_freed(pipe):
        idx_Bl, maps = _sample(pipe, request)
        if output_type == "latent":
            return idx_Bl
        return _decode_sampled(pipe, maps[-1], request, output_type, decode_batch_size)


@torch.no_grad()
def run_progressively(pipe, request: SamplingRequest, output_type: str, decode_batch_size: int | None = None) -> list:
    """Sample the images of a request and decode them after every block; see `run`."""
    with hooks_freed(pipe):
        _, maps = _sample(pipe, request, keeps_maps=True)
        return [_decode_sampled(pipe, features, request, output_type, decode_batch_size) for features in maps]


def decode(pipe, features: Tensor, batch: BatchShape, output_type: str):
    """Decode maps (B, C, h, w) in batches; refuse those, and images, that are NaN or infinite."""
    run_offload_hook(pipe.tokenizer)
    parts = features.split(batch.num_images)
    # Copies: a graph captured on a GPU writes the next part to the same place.
    images = torch.cat([pipe.tokenizer.decode(batch.pad(part))[: len(part)].clone() for part in parts])
    check_finite("decoding", {"the quantized map": features, "the image": images})
    return to_output(images.clamp(-1, 1).float(), output_type)


def _decode_sampled(pipe, features: Tensor, request: SamplingRequest, output_type: str, decode_batch_size: int | None):
    """Decode in batches of the size asked for, else in those that were sampled; filled up as those were."""
    batch = replace(request.batch, num_images=decode_batch_size or request.batch.num_images)
    return decode(pipe, features, batch, output_type)


@contextmanager
def hooks_freed(pipe) -> Iterator[None]:
    """Offload the models again after work on them, also after work that failed."""
    try:
        yield
    finally:
        pipe.maybe_free_model_hooks()


def _sample(pipe, request: SamplingRequest, keeps_maps: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Sample all images, batch by batch.

    Returns K tensors (B, L_k) of indices, −1 where a callback stopped before, and the maps (B, C, h, w) after each
    block, or the last alone.
    """
    # The prior calls the quantizer while an offloaded tokenizer waits on the CPU.
    pipe.tokenizer.quantizer.to(pipe._execution_device)
    starts, batches, maps = range(0, len(request.condition), request.batch.num_images), [], []
    # What a callback sets on the pipeline is the call's own: threads that sample at once do not meet.
    call = copy.copy(pipe)
    call._interrupt = False
    with pipe.progress_bar(total=len(starts) * pipe.num_timesteps) as bar:
        for start in starts:
            idx_Bl, batch_maps = _sample_batch(call, request, start, bar, keeps_maps)
            batches.append(idx_Bl)
            maps.append(batch_maps)
    idx_Bl = [torch.cat(blocks) for blocks in zip(*batches, strict=True)]
    return idx_Bl, [torch.cat(features) for features in zip(*maps, strict=True)]


def _sample_batch(pipe, request: SamplingRequest, start: int, bar, keeps_maps: bool):
    """Sample one batch; padded rows are computed and dropped."""
    batch, rows = request.batch, slice(start, start + request.batch.num_images)
    own, given = request.generators[rows], request.given_idx_BL
    n, num_rows = len(own), batch.num_rows(len(own))
    # Every batch begins as the call says: an image does not depend on what a callback did to another batch.
    pipe._guidance_scale = request.options.guidance_scale
    loop, idx_Bl = BlockLoop(pipe, request, n, num_rows, bar, keeps_maps), []
    if not pipe.interrupt:
        idx_Bl = generate(
            pipe.prior,
            request.condition[rows].padded(num_rows),
            pipe.tokenizer.quantizer,
            request.options,
            own + [torch.Generator().manual_seed(0) for _ in range(num_rows - n)],
            given_idx_BL=None if given is None else batch.pad(given[rows]),
            on_block_end=loop,
            is_guidance_fixed=request.callback is None,
        )
    lengths, device = pipe.prior.layout.block_lengths[len(idx_Bl) :], pipe._execution_device
    rest, maps = [torch.full((n, length), -1, device=device) for length in lengths], loop.maps
    # The last map stands for the blocks that an interruption left out.
    maps += [loop.canvas[:n]] * ((pipe.num_timesteps if keeps_maps else 1) - len(maps))
    return [idx[:n] for idx in idx_Bl] + rest, maps
