"""The sampling behind the pipeline's calls: a checked request, blocks of indices batch by batch, maps, pictures.

Legend: B images, n images of a batch, K blocks, L_k tokens of block k, C code channels, h×w latent cells.
"""

import torch
from torch import Tensor

from nextblock.data.pixels import to_output
from nextblock.prior.sampling import SamplingOptions, image_generators
from nextblock.training.offload import run_offload_hook

from .block_loop import BlockLoop
from .sampling_request import BatchShape, SamplingRequest, check_callback, check_counts


def make_request(
    pipe, class_labels, num_images_per_label, generator, idx_Bl, batch_size, callback: tuple, options: dict
) -> SamplingRequest:
    """Check a call as a whole."""
    check_counts("pil", num_images_per_label=num_images_per_label, batch_size=batch_size)
    config = pipe.prior.config
    sampling = SamplingOptions(**options)
    sampling.check(config.num_classes, config.vocab_size, pipe.prior.layout.is_scales)
    tensor_inputs = check_callback(*callback, pipe._callback_tensor_inputs)
    labels = [label for label in pipe.resolve_labels(class_labels) for _ in range(num_images_per_label)]
    if idx_Bl is not None:
        pipe.prior.check_given(idx_Bl, len(labels))
    return SamplingRequest(
        labels=labels,
        # Last: a single generator moves on, which a refused call must not cause.
        generators=image_generators(generator, len(labels)),
        given_idx_Bl=idx_Bl,
        options=sampling,
        batch=BatchShape.choose(len(labels), batch_size, pipe.prior, pipe._execution_device),
        callback=callback[0],
        tensor_inputs=tensor_inputs,
    )


def sample(pipe, request: SamplingRequest, keeps_maps: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Sample all images in batches of one shape.

    Returns K tensors (B, L_k) of indices, −1 where a callback stopped before, and the maps (B, C, h, w) after each
    block, or the last alone.
    """
    labels = torch.tensor(request.labels, device=pipe._execution_device)
    # The prior calls the quantizer while an offloaded tokenizer waits on the CPU.
    pipe.tokenizer.quantizer.to(pipe._execution_device)
    starts, pipe._interrupt, batches, maps = range(0, len(labels), request.batch.num_images), False, [], []
    with pipe.progress_bar(total=len(starts) * pipe.num_timesteps) as bar:
        for start in starts:
            idx_Bl, batch_maps = _sample_batch(pipe, request, labels, start, bar, keeps_maps)
            batches.append(idx_Bl)
            maps.append(batch_maps)
    idx_Bl = [torch.cat(blocks) for blocks in zip(*batches, strict=True)]
    return idx_Bl, [torch.cat(features) for features in zip(*maps, strict=True)]


def _sample_batch(pipe, request: SamplingRequest, labels: Tensor, start: int, bar, keeps_maps: bool):
    """Sample one batch; padded rows are computed and dropped."""
    batch, rows = request.batch, slice(start, start + request.batch.num_images)
    own, given = request.generators[rows], request.given_idx_Bl
    n = len(own)
    # Every batch begins as the call says: an image does not depend on what a callback did to another batch.
    pipe._guidance_scale = request.options.guidance_scale
    loop, idx_Bl = BlockLoop(pipe, request, n, bar, keeps_maps), []
    if not pipe.interrupt:
        idx_Bl = pipe.prior.generate(
            batch.pad(labels[rows]),
            pipe.tokenizer.quantizer,
            generator=own + [torch.Generator().manual_seed(0) for _ in range(batch.num_rows - n)],
            given_idx_Bl=given and [batch.pad(idx[rows]) for idx in given],
            on_block_end=loop,
            is_guidance_fixed=request.callback is None,
            **vars(request.options),
        )
    lengths = pipe.prior.layout.block_lengths[len(idx_Bl) :]
    rest, maps = [labels.new_full((n, length), -1) for length in lengths], loop.maps
    # The last map stands for the blocks that an interruption left out.
    maps += [loop.canvas[:n]] * ((pipe.num_timesteps if keeps_maps else 1) - len(maps))
    return [idx[:n] for idx in idx_Bl] + rest, maps


def decode(pipe, features: Tensor, num_images: int | None, output_type: str):
    """Decode maps (B, C, h, w) in batches of one shape."""
    run_offload_hook(pipe.tokenizer)
    batch = BatchShape.choose(len(features), num_images, pipe.tokenizer, pipe._execution_device)
    images = [
        pipe.tokenizer.decode(batch.pad(part))[: len(part)].clamp(-1, 1).float()
        for part in features.split(batch.num_images)
    ]
    return to_output(torch.cat(images), output_type)
