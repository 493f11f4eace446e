"""Block-by-block sampling with classifier-free guidance, for every family of priors.

Legend: B images, R rows (conditional, then unconditional), K blocks, L_k tokens of block k, L all tokens, V codes,
n digits of a code, S scores of a token, C code channels, h×w latent cells.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from nextblock.data.blocks import BlockLayout
from nextblock.data.finite import all_finite, extremes
from nextblock.training.offload import run_offload_hook

from .conditioning import Condition, Context
from .family import Prior, check_context, check_hidden, check_logits
from .head_plan import HeadPlan, plan_of
from .heads import UNKNOWN
from .linear import PackedWeights
from .orders import in_block_order, in_order, sampling_orders
from .sampling import (
    SamplingOptions,
    draw_gumbels,
    draw_uniforms,
    mix_codes,
    sample_digits,
    sample_tokens,
    truncate_logits,
)


@dataclass
class _TokenSource:
    """Draws a batch's tokens: single codes by uniform numbers, or mixtures of codes by Gumbel noise."""

    prior: Prior
    plan: HeadPlan
    quantizer: nn.Module
    options: SamplingOptions
    uniforms: Tensor
    given_idx_BL: Tensor | None
    smooth_generators: list[Generator] | None
    orders: Tensor | None

    def noise(self, k: int) -> Tensor:
        """Return the random numbers of block k."""
        start, end = self.prior.layout.bounds[k]
        if self.smooth_generators is None:
            return self.uniforms[:, start:end]
        return draw_gumbels(self.smooth_generators, end - start, self.plan.num_scores).to(self.uniforms.device)

    def given(self, k: int) -> Tensor | None:
        """Return block k's known tokens (B, L_k)."""
        start, end = self.prior.layout.bounds[k]
        return None if self.given_idx_BL is None else self.given_idx_BL[:, start:end]

    def draw(self, k: int, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw block k's tokens (B, L_k), and mixtures (B, L_k, C) where sampling is smooth."""
        if self.plan.num_digits > 1:
            return self.plan.digits.join(sample_digits(logits, noise, self.options, self.plan)), None
        if self.smooth_generators is None:
            return sample_tokens(logits, noise, self.options), None
        progress = k / max(self.prior.layout.num_blocks - 1, 1)
        return mix_codes(truncate_logits(logits, self.options), noise, self.quantizer.get_codebook(), progress)

    def draw_in_passes(self, score: Callable[[Tensor | None], Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a block's digits pass by pass; return what each was drawn from, (B, L_k, S), and the tokens."""
        plan, logits, digits = self.plan, [], torch.full_like(noise, UNKNOWN, dtype=torch.int64)
        for start, end in plan.pass_bounds:
            of_pass, (low, high) = score(digits if start else None), plan.columns(start, end)
            logits.append(of_pass[..., low:high])
            digits[..., start:end] = sample_digits(of_pass, noise, self.options, plan, start, end)
        return torch.cat(logits, dim=-1), plan.digits.join(digits)


class BlockStep:
    """A block being sampled; what its receiver changes holds from then on.

    Attributes:
        block: k, from 0; in another order than the layout's, the k-th token predicted.
        idx: (B, L_k) int64.
        places: (B, 1) int64, which token of the layout it is in each image; None where it is block k itself.
        logits: (B, L_k, S), guided, neither tempered nor truncated: scores of the V codes, or of all digits side by
            side, each given the digits that were drawn in the passes before.
        vectors: (B, L_k, C) mixtures of codes, the codes themselves where tokens are set; None unless smooth.
        scales: K guidance scales; those of later blocks may be set.
        is_last: whether to stop after this block.
        canvas: the quantizer's map (B, C, h, w), with this block after `advance`.
        next_input: (B, L_{k+1}, C) for the next block, after `advance`; None after the last block.
    """

    def __init__(
        self,
        block: int,
        scales: list[float],
        score: Callable[[Tensor | None], Tensor],
        source: _TokenSource,
        canvas: Tensor,
    ):
        self.block = block
        self.scales = scales
        self.is_last = False
        self.places = None if source.orders is None else source.orders[:, block : block + 1]
        self._source, self._noise, self._canvas_before = source, source.noise(block), canvas
        if len(source.plan.passes) == 1:
            self.redraw(score(None))
        else:
            self.logits, idx = source.draw_in_passes(score, self._noise)
            self._take(idx, None)
            self._keep_given()

    def redraw(self, logits: Tensor) -> None:
        """Draw the tokens from these logits, always with the same random numbers; known tokens stay.

        Args:
            logits: as the attribute; every digit is drawn from them as they stand.
        """
        self.logits = logits
        self._take(*self._source.draw(self.block, logits, self._noise))
        self._keep_given()

    def set_tokens(self, idx: Tensor, is_set: Tensor) -> None:
        """Put single codes where a mask (B, L_k) says so."""
        idx, vectors = torch.where(is_set, idx, self.idx), self.vectors
        if vectors is not None:
            vectors = torch.where(is_set[..., None], self._source.quantizer.lookup(idx), vectors)
        self._take(idx, vectors)

    def advance(self) -> None:
        """Put the block onto the map, once however often it is asked for, and anew after its tokens changed."""
        if not self._is_advanced:
            content = self.idx if self.vectors is None else self.vectors
            places = {} if self.places is None else {"places": self.places}
            advance = self._source.quantizer.advance
            self.canvas, self.next_input = advance(self._canvas_before, content, self.block, **places)
            self._is_advanced = True

    def _keep_given(self) -> None:
        """Put the known tokens of the block in their places."""
        given = self._source.given(self.block)
        if given is not None:
            self.set_tokens(given, given >= 0)

    def _take(self, idx: Tensor, vectors: Tensor | None) -> None:
        """Hold these tokens, which are not on the map yet."""
        self.idx, self.vectors = idx, vectors
        self.canvas, self.next_input, self._is_advanced = self._canvas_before, None, False


def num_guided_blocks(scales: list[float]) -> int:
    """Return how many blocks need the unconditional rows: all up to the last one whose scale is not 1."""
    return max((k + 1 for k, s in enumerate(scales) if s != 1), default=0)


@torch.no_grad()
def generate(
    prior: Prior,
    condition: Condition,
    quantizer: nn.Module,
    options: SamplingOptions,
    generators: list[Generator],
    *,
    given_idx_BL: Tensor | None = None,
    on_block_end: Callable[[BlockStep], None] | None = None,
    is_guidance_fixed: bool = True,
) -> list[Tensor]:
    """Sample a batch of images, each with random numbers of its own; see `generate_blocks`.

    Nothing is checked: whoever asks has called `options.check_for`, `check_quantizer` and `check_given`.

    Args:
        prior: of any family.
        condition: of B images.
        quantizer: the tokenizer's quantizer.
        options: how tokens are drawn.
        generators: B, one an image.
        given_idx_BL: see `generate_blocks`, as for the arguments after it.
        on_block_end: receives each block's `BlockStep`.
        is_guidance_fixed: whether the receiver leaves the guidance alone.

    Returns:
        The blocks sampled, up to K tensors (B, L_k) int64.

    Raises:
        ValueError: if codes, the codec's weights or logits are NaN or infinite.
    """
    run_offload_hook(prior)
    quantizer.check_finite()
    given = None if given_idx_BL is None else given_idx_BL.to(prior.device)
    L, num_digits = prior.layout.num_tokens, plan_of(prior).num_digits
    uniforms = draw_uniforms(generators, L * num_digits)
    return generate_blocks(
        prior,
        condition.to(prior.device),
        quantizer,
        options,
        (uniforms if num_digits == 1 else uniforms.view(-1, L, num_digits)).to(prior.device),
        given_idx_BL=given,
        orders=sampling_orders(prior, options.order, given, len(condition)),
        smooth_generators=generators if options.is_smooth else None,
        on_block_end=on_block_end,
        is_guidance_fixed=is_guidance_fixed,
    )


def generate_blocks(
    prior: Prior,
    condition: Condition,
    quantizer: nn.Module,
    options: SamplingOptions,
    uniforms: Tensor,
    *,
    given_idx_BL: Tensor | None = None,
    orders: Tensor | None = None,
    smooth_generators: list[Generator] | None = None,
    on_block_end: Callable[[BlockStep], None] | None = None,
    is_guidance_fixed: bool = True,
) -> list[Tensor]:
    """Sample all blocks of a batch.

    Everything that depends on the condition alone is computed once, before the first block. Unconditional rows ride in
    the same batch as the conditional ones. They are dropped once every remaining scale is 1; while a later scale is
    not, their keys and values are still needed, so only their head is skipped.

    Args:
        prior: of any family.
        condition: of B images, on the prior's device.
        quantizer: the tokenizer's quantizer.
        options: how tokens are drawn.
        uniforms: (B, L) float64 in [0, 1), one a token; (B, L, n), one a digit, where the prior predicts digits.
        given_idx_BL: (B, L) int64 tokens that are not sampled, −1 where they are; None samples all.
        orders: (B, L) int64 order in which a prior that `takes_orders` predicts the tokens; None is block order.
        smooth_generators: B generators of Gumbel noise for mixtures of codes; None draws single codes.
        on_block_end: receives each block's `BlockStep`.
        is_guidance_fixed: False keeps the unconditional rows to the end, for a receiver that sets scales.

    Returns:
        The blocks sampled, up to K tensors (B, L_k) int64; in an order of its own all K, −1 where the receiver stopped
        before.

    Raises:
        ValueError: naming the first block whose logits are NaN or infinite: at once on a CPU; a GPU is not waited for
            before the last block.
    """
    # A token's random number and known value are its own in whatever order it is drawn.
    own = in_order(uniforms, orders), given_idx_BL if given_idx_BL is None else in_order(given_idx_BL, orders)
    source = _TokenSource(prior, plan_of(prior), quantizer, options, *own, smooth_generators, orders)
    idx_Bl: list[Tensor] = []
    seen: dict[int, Tensor] = {}
    # A prior that takes indices needs no map; a receiver may look at it.
    keeps_map = on_block_end is not None or not prior.takes_indices
    for step in _block_steps(source, condition, keeps_map, is_guidance_fixed or not condition.has_null):
        seen[step.block] = extremes(step.logits)
        if step.logits.device.type == "cpu":
            _check_logits(seen)
            seen.clear()
        if on_block_end is not None:
            on_block_end(step)
        idx_Bl.append(step.idx)
        if step.is_last:
            break
    _check_logits(seen)
    return idx_Bl if orders is None else _in_blocks(prior.layout, idx_Bl, orders)


def _in_blocks(layout: BlockLayout, idx_Bl: list[Tensor], orders: Tensor) -> list[Tensor]:
    """Sort tokens drawn one by one, each (B, 1), into the K blocks, −1 where none was drawn."""
    missing = orders.new_full((len(orders), layout.num_tokens - len(idx_Bl)), -1)
    return layout.split(in_block_order(torch.cat([*idx_Bl, missing], dim=1), orders))


def _check_logits(extremes_of_blocks: dict[int, Tensor]) -> None:
    """Refuse logits that are NaN or infinite, told by their extremes; waits for the device."""
    if not all_finite(extremes_of_blocks.values()):
        block = next(k for k, pair in extremes_of_blocks.items() if not all_finite([pair]))
        raise ValueError(f"logits of block {block}: the prior gives NaN or infinite values; expected finite ones")


def _block_steps(
    source: _TokenSource, condition: Condition, keeps_map: bool, is_guidance_fixed: bool
) -> Iterator[BlockStep]:
    """Yield a `BlockStep` for each block, and go on from what it holds when it comes back."""
    prior, B, K = source.prior, len(condition), source.prior.layout.num_blocks
    scales = source.options.scales(K)
    num_guided = num_guided_blocks(scales) if is_guidance_fixed else K
    joined = condition.joined(condition.null()) if num_guided else condition
    orders = {} if source.orders is None else {"orders": source.orders.repeat(2 if num_guided else 1, 1)}
    context = prior.context(joined, **orders)
    check_context(context, 2 * B if num_guided else B)
    conditional = context.first(B)
    cache, canvas, content = prior.new_cache(len(context)), source.quantizer.start(B), None
    packed_weights = PackedWeights(num_uses=K)
    for k in range(K):
        rows = context if k < num_guided else conditional
        with packed_weights.used():
            hidden_states = prior.decode_block(content, k, rows, cache)
            check_hidden(prior, k, hidden_states, len(rows))
            score = partial(_guided_logits, prior, k, hidden_states, rows, conditional, scales[k])
            step = BlockStep(k, scales, score, source, canvas)
        yield step
        if k + 1 < K:
            if keeps_map:
                step.advance()
            canvas, content = step.canvas, step.idx if prior.takes_indices else step.next_input


def _guided_logits(
    prior: Prior,
    k: int,
    hidden_states: Tensor,
    rows: Context,
    conditional: Context,
    scale: float,
    digits: Tensor | None = None,
) -> Tensor:
    """Return logits (B, L_k, S) given known digits (B, L_k, n), guided where the scale is not 1."""
    B = len(conditional)
    if scale == 1:
        hidden_states, rows = hidden_states[:B], conditional
    # Unconditional rows are told the same digits as the conditional ones.
    known = () if digits is None else (digits.repeat(len(rows) // B, 1, 1),)
    logits = prior.logits(hidden_states, rows, *known)
    check_logits(prior, k, logits, len(rows))
    if scale == 1:
        return logits
    with_class, without = logits.chunk(2)
    return torch.lerp(without, with_class, scale)
