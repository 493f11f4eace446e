"""What happens after each sampled block: the caller's callback, the progress bar, the map so far.

Legend: n images of a batch, R rows (the images, then padding), K blocks, L_k tokens of block k, V codes, S scores of a
token, C code channels, h×w latent cells.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nextblock.prior.family import Prior
from nextblock.prior.generation import BlockStep
from nextblock.prior.head_plan import plan_of

from .sampling_request import SamplingRequest


class BlockLoop:
    """Receives one batch's blocks.

    Args:
        pipe: the call's own copy of the pipeline, whose `guidance_scale` and `interrupt` a callback may set.
        request: what was asked for.
        num_images: n.
        num_rows: R.
        bar: progress bar that counts blocks.
        keeps_maps: whether to keep the map after every block.
    """

    def __init__(self, pipe, request: SamplingRequest, num_images: int, num_rows: int, bar, keeps_maps: bool):
        self.maps: list[Tensor] = []
        self.canvas = pipe.tokenizer.quantizer.start(num_rows)
        self._pipe, self._request, self._num_images, self._bar = pipe, request, num_images, bar
        self._keeps_maps = keeps_maps
        self._options = request.options

    def __call__(self, step: BlockStep) -> None:
        """Take in a block."""
        if self._request.callback is not None:
            self._call_back(step)
            self._follow_guidance(step)
        step.advance()
        self.canvas = step.canvas
        if self._keeps_maps:
            self.maps.append(self.canvas[: self._num_images].clone())
        step.is_last = self._pipe.interrupt
        self._bar.update()

    def _call_back(self, step: BlockStep) -> None:
        """Show the block to the callback, and take over what it returns."""
        idx, logits, n = step.idx, step.logits, self._num_images
        # Copies: the callback may change them in place.
        given = {name: getattr(step, name)[:n].clone() for name in self._request.tensor_inputs}
        returned = self._request.callback(self._pipe, step.block, step.block, dict(given))
        if not isinstance(returned, dict) or not set(returned) <= set(given):
            raise ValueError(
                f"callback_on_step_end returned {returned!r}; expected a dict whose keys are among {list(given)}"
            )
        given |= returned
        for name, like in (("logits", logits), ("idx", idx)):
            if name in given:
                _check_returned(name, given[name], like[:n], self._pipe.prior)
        if "logits" in given and not torch.equal(given["logits"], logits[:n]):
            step.redraw(torch.cat([given["logits"], logits[n:]]))
        if "idx" in given:
            changed = torch.cat([given["idx"], idx[n:]])
            step.set_tokens(changed, changed != idx)

    def _follow_guidance(self, step: BlockStep) -> None:
        """Spread a guidance scale that the callback has set over the blocks to come."""
        if self._pipe.guidance_scale == self._options.guidance_scale:
            return
        options = replace(self._options, guidance_scale=self._pipe.guidance_scale)
        options.check_for(self._pipe.prior)
        self._options = options
        step.scales[step.block + 1 :] = options.scales(len(step.scales))[step.block + 1 :]


def _check_returned(name: str, tensor: Tensor, like: Tensor, prior: Prior) -> None:
    """Refuse what cannot stand in for a block's tensor."""
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"callback_on_step_end returned {name} of {got}; expected {like.dtype} {tuple(like.shape)}")
    if name == "logits":
        scores = [each for _, each in plan_of(prior).by_base(tensor)]
        if not (tensor < torch.inf).all() or any((each == -torch.inf).all(-1).any() for each in scores):
            raise ValueError("callback_on_step_end returned logits that are no distribution; expected finite numbers")
    elif not 0 <= tensor.min().item() <= tensor.max().item() < prior.vocab_size:
        raise ValueError(
            f"callback_on_step_end returned idx from {tensor.min().item()} to {tensor.max().item()}; "
            f"expected 0 to {prior.vocab_size - 1}"
        )
