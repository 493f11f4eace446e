"""Layers of causal transformers over a prefix and tokens: how their new positions attend with a cache.

Legend: R rows, S positions of the cache, P prefix positions, l new positions, D width.
"""

from typing import Any

from torch import Tensor

from .attention import attention, causal_bias, seen_keys
from .layers import CachedAttention, KeyValueCache
from .step_graphs import StepStack, is_whole_cache_read


class NewPositionsOfAll:
    """What `layers.CachedAttention` computes, with shapes that do not tell the positions: the whole cache, and a mask.

    Args:
        cache: of all layers.
        layer: number of the layer.
        positions: (l,) int64.
        scale: factor on the scores before the softmax.
        bias: (l, S) or (R, 1, l, S).
    """

    def __init__(self, cache: KeyValueCache, layer: int, positions: Tensor, scale: float, bias: Tensor):
        self.keys, self.values = cache.keys[layer], cache.values[layer]
        self.positions, self.scale, self.bias = positions, scale, bias

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write and attend; see `layers.CachedAttention`."""
        keys, values = self.keys[: len(q)], self.values[: len(q)]
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        return attention(q, keys, values, self.scale, self.bias)


class CausalStack(StepStack):
    """All layers; a call of them is one step of sampling, which compiles into one graph.

    A layer takes (R, l, D), what `of_layer` is, and a function that attends; its `scale` is that of its scores.
    """

    def forward(
        self,
        x: Tensor,
        of_layer: Any,
        cache: KeyValueCache,
        span: tuple[int, int, int],
        positions: Tensor,
        prefix_mask: Tensor | None,
    ) -> Tensor:
        """Run new positions through all layers.

        Args:
            x: (R, l, D) their input.
            of_layer: what every layer takes besides, a rotation say; None where they take nothing.
            cache: holds the positions before.
            span: first position that is seen, first new one, the position after the last.
            positions: (l,) int64, the new ones.
            prefix_mask: (R, n) whether a row sees the n positions from the first seen on; None sees all.

        Returns:
            (R, l, D).
        """
        first, _, end = span
        # By itself, a part of the cache is faster than all of it.
        is_whole = is_whole_cache_read(x)
        bias, num_keys = None, cache.keys[0].shape[2] if is_whole else end - first
        if is_whole or prefix_mask is not None or x.shape[1] > 1:
            places = positions if is_whole else positions - first
            key_mask = seen_keys(prefix_mask, first if is_whole else 0, num_keys, x.device)
            bias = causal_bias(places, num_keys, key_mask, x.dtype)
        for i, layer in enumerate(self):
            if is_whole:
                attend = NewPositionsOfAll(cache, i, positions, layer.scale, bias)
            else:
                attend = CachedAttention(cache, i, span, layer.scale, bias)
            x = layer(x, of_layer, attend)
        return x
