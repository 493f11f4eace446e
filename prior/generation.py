"""Block-by-block sampling with a preallocated key/value cache and classifier-free guidance.

Legend: B images, R rows (conditional, then unconditional), K blocks, L_k tokens of block k, L all tokens, V codes,
C code channels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nextblock.data.blocks import BlockLayout

from .layers import KeyValueCache
from .sampling import draw_gumbels, mix_codes, sample_tokens, truncate_logits


@dataclass
class _TokenSource:
    """Draws a batch's tokens: single codes by uniform numbers, or mixtures of codes by Gumbel noise."""

    layout: BlockLayout
    quantizer: nn.Module
    uniforms: Tensor
    truncation: tuple[float, int, float, float]
    given_idx_Bl: list[Tensor] | None
    smooth_generators: list[Generator] | None

    def noise(self, k: int, logits: Tensor) -> Tensor:
        """Return the random numbers of block k."""
        start, end = self.layout.bounds[k]
        if self.smooth_generators is None:
            return self.uniforms[:, start:end]
        return draw_gumbels(self.smooth_generators, end - start, logits.shape[-1]).to(logits.device)

    def draw(self, k: int, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw block k's tokens (B, L_k), and mixtures (B, L_k, C) where sampling is smooth."""
        if self.smooth_generators is None:
            return sample_tokens(logits, noise, *self.truncation), None
        temperature, *truncation = self.truncation
        logits = truncate_logits(logits / temperature, *truncation)
        progress = k / max(self.layout.num_blocks - 1, 1)
        return mix_codes(logits, noise, self.quantizer.get_codebook(), progress)


class BlockStep:
    """A block being sampled; what its receiver changes holds from then on.

    Attributes:
        block: k, from 0.
        idx: (B, L_k) int64.
        logits: (B, L_k, V), guided, neither tempered nor truncated.
        vectors: (B, L_k, C) mixtures of codes, the codes themselves where tokens are set; None unless smooth.
        scales: K guidance scales; those of later blocks may be set.
        is_last: whether to stop after this block.
    """

    def __init__(self, block: int, scales: list[float], logits: Tensor, source: _TokenSource):
        self.block = block
        self.scales = scales
        self.is_last = False
        self._source, self._noise = source, source.noise(block, logits)
        self.redraw(logits)

    def redraw(self, logits: Tensor) -> None:
        """Draw the tokens from these logits, always with the same random numbers; known tokens stay."""
        self.logits = logits
        self.idx, self.vectors = self._source.draw(self.block, logits, self._noise)
        if self._source.given_idx_Bl is not None:
            given = self._source.given_idx_Bl[self.block]
            self.set_tokens(given, given >= 0)

    def set_tokens(self, idx: Tensor, is_set: Tensor) -> None:
        """Put single codes where a mask (B, L_k) says so."""
        self.idx = torch.where(is_set, idx, self.idx)
        if self.vectors is not None:
            codes = self._source.quantizer.codebook.lookup(self.idx)
            self.vectors = torch.where(is_set[..., None], codes, self.vectors)

    def content(self) -> Tensor:
        """Return what goes onto the quantizer's map: mixtures where sampling is smooth, else indices."""
        return self.idx if self.vectors is None else self.vectors


def num_guided_blocks(scales: list[float]) -> int:
    """Return how many blocks need the unconditional rows: all up to the last one whose scale is not 1."""
    return max((k + 1 for k, s in enumerate(scales) if s != 1), default=0)


def generate_blocks(
    model,
    quantizer,
    class_labels: Tensor,
    scales: list[float],
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    given_idx_Bl: list[Tensor] | None = None,
    smooth_generators: list[Generator] | None = None,
    on_block_end: Callable[[BlockStep], None] | None = None,
    is_guidance_fixed: bool = True,
) -> list[Tensor]:
    """Sample all blocks of a batch.

    Everything that depends on the class alone is computed once, before the first block. Unconditional rows ride in the
    same batch as the conditional ones. They are dropped once every remaining scale is 1; while a later scale is not,
    their keys and values are still needed, so only their head is skipped.

    Args:
        model: a `BlockPrior`.
        quantizer: the tokenizer's quantizer.
        class_labels: (B,) int64.
        scales: K guidance scales.
        uniforms: (B, L) float64 in [0, 1), one a token.
        temperature: divides the logits.
        top_k: see `truncate_logits`.
        top_p: see `truncate_logits`.
        min_p: see `truncate_logits`.
        given_idx_Bl: K tensors (B, L_k) of tokens that are not sampled, −1 where they are; None samples all.
        smooth_generators: B generators of Gumbel noise for mixtures of codes; None draws single codes.
        on_block_end: receives each block's `BlockStep`.
        is_guidance_fixed: False keeps the unconditional rows to the end, for a receiver that sets scales.

    Returns:
        The blocks sampled, up to K tensors (B, L_k) int64.
    """
    truncation = (temperature, top_k, top_p, min_p)
    source = _TokenSource(model.layout, quantizer, uniforms, truncation, given_idx_Bl, smooth_generators)
    idx_Bl = []
    for step in _block_steps(model, quantizer, class_labels, list(scales), source, is_guidance_fixed):
        if on_block_end is not None:
            on_block_end(step)
        idx_Bl.append(step.idx)
        if step.is_last:
            break
    return idx_Bl


def _block_steps(model, quantizer, class_labels: Tensor, scales: list[float], source, is_guidance_fixed: bool):
    """Yield a `BlockStep` for each block, and go on from what it holds when it comes back."""
    B, layout = len(class_labels), model.layout
    num_guided = num_guided_blocks(scales) if is_guidance_fixed else layout.num_blocks
    rows = class_labels
    if num_guided:
        rows = torch.cat([class_labels, torch.full_like(class_labels, model.config.null_class)])
    condition, modulations, head_modulation = model.condition(rows)
    block_input, positions = model.first_input(condition), model.positions()
    cache, canvas = _empty_cache(model, len(rows), block_input), quantizer.start(B)
    for k, (start, end) in enumerate(layout.bounds):
        num_rows = len(rows) if k < num_guided else B
        hidden_states = block_input[:num_rows] + positions[:, start:end]
        for i, layer in enumerate(model.blocks):
            attend = partial(_cached_attention, cache, i, layer.attn.scale, start, end)
            hidden_states = layer(hidden_states, tuple(m[:num_rows] for m in modulations[i]), attend)
        logits = _guided_logits(model, hidden_states, head_modulation, scales[k], B)
        step = BlockStep(k, scales, logits, source)
        yield step
        if k + 1 < layout.num_blocks:
            next_input = step.idx
            if model.config.input_embedding == "codes":
                canvas, next_input = quantizer.advance(canvas, step.content(), k)
            # Unconditional rows see the same tokens as the conditional ones.
            block_input = model.embed_input(next_input).repeat(num_rows // B, 1, 1)


def _empty_cache(model, num_rows: int, like: Tensor) -> KeyValueCache:
    """Allocate keys and values of all layers and tokens."""
    num_heads, D = model.config.num_heads, model.config.hidden_size
    shape = (num_rows, num_heads, model.layout.num_tokens, D // num_heads)
    return KeyValueCache(model.config.num_layers, shape, like.dtype, like.device)


def _cached_attention(
    cache: KeyValueCache, layer: int, scale: float, start: int, end: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend from a block's queries to the keys and values of all blocks up to it, mask-free."""
    keys, values = cache.extend(layer, k, v, start, end)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _guided_logits(model, hidden_states: Tensor, head_modulation, scale: float, B: int) -> Tensor:
    """Return logits (B, l, V), guided where the scale is not 1."""
    if scale == 1:
        return model.logits(hidden_states[:B], tuple(m[:B] for m in head_modulation))
    conditional, unconditional = model.logits(hidden_states, head_modulation).chunk(2)
    return torch.lerp(unconditional, conditional, scale)
