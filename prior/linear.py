"""Linear maps, and which of the ways to compute them is the fast one.

Every block of tokens reads all weights; where blocks are short, as in raster order, sampling waits for nothing else.
Legend: M rows, K inputs, N outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.training.precision import is_plain_on_cpu

# GB/s of weights read on two cores with AVX-512, of 31 that their memory gives, for K = 768 (in brackets 3072):
#     M                    1        2        3        4        5        8       16
#     F.linear        13 (19)   7 (9)    7 (7)   10 (10)  10 (8)   10 (9)    8 (6)
#     transposed      13 (19)  30 (20)  24 (12)  26 (10)  19 (9)   10 (5)   10 (6)
#     oneDNN          24 (20)  17 (23)  16 (19)  17 (21)  17 (19)  14 (10)  11 (7)
#     oneDNN, packed  24 (20)  19 (21)  22 (28)  26 (31)  24 (28)  21 (23)  17 (18)
# and in bfloat16, of which packed rows are the plain product's to the bit, with AVX512-BF16:
#     F.linear        16 (19)  16 (21)           15 (19)                    11 (13)
#     oneDNN, packed  20 (21)  22 (23)           26 (27)                    17 (17)
#     filled to four  25 (26)  26 (28)
# With hundreds of rows oneDNN is ahead by a tenth. A row of it is the same among any others, from two rows on, packed
# or not, and wherever the weights lie. The transposed product depends on both: small weights do without.
MIN_TRANSPOSED_ROWS, MAX_TRANSPOSED_ROWS, MIN_LARGE_WEIGHTS = 2, 4, 2**18
# Packing takes as long as some twenty products gain by it. Fewer rows than four, for which it is slow, are filled up.
MIN_PACKED_USES, MIN_PACKED_ROWS, MAX_PACKED_BYTES = 32, 4, 2**32
_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
_HAS_BF16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_FAST_DTYPES = (torch.float32, torch.bfloat16) if _HAS_BF16 else (torch.float32,)


class PackedWeights:
    """Copies of large weights as oneDNN reads them fastest, for a request that uses them again and again.

    They belong to whoever holds this object, are made where `linear` first wants them, and go with it. Weights that
    were replaced or changed in place are packed anew; 4 GiB at most are packed.

    Args:
        num_uses: how often a weight will be used, such as the blocks of a request; few are not worth a copy.
    """

    def __init__(self, num_uses: int):
        self._pays = num_uses >= MIN_PACKED_USES
        self._num_bytes = 0
        # The weight itself is held, so that its id is nobody else's.
        self._copies: dict[int, tuple[Tensor, tuple, Tensor]] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let `linear` take these copies meanwhile, in this thread alone."""
        token = _packed_weights.set(self if self._pays else None)
        try:
            yield
        finally:
            _packed_weights.reset(token)

    def of(self, weight: Tensor, num_rows: int) -> Tensor | None:
        """Return the copy of a weight (N, K) for about so many rows, or None where it may have none."""
        if weight.is_inference() or not weight.is_contiguous():
            return None
        known, state = self._copies.get(id(weight)), (weight._version, weight.data_ptr())
        if known is not None and known[1] == state:
            return known[2]
        if known is None:
            if self._num_bytes + weight.nbytes > MAX_PACKED_BYTES:
                return None
            self._num_bytes += weight.nbytes
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), max(num_rows, MIN_PACKED_ROWS))
        self._copies[id(weight)] = weight, state, copy
        return copy


_packed_weights: ContextVar[PackedWeights | None] = ContextVar("packed_weights", default=None)


@contextmanager
def weights_used(num_uses: int) -> Iterator[None]:
    """Keep `linear` from packing meanwhile, if a request uses the weights at hand too seldom, `num_uses` times."""
    token = _packed_weights.set(_packed_weights.get() if num_uses >= MIN_PACKED_USES else None)
    try:
        yield
    finally:
        _packed_weights.reset(token)


class Linear(nn.Linear):
    """Linear map that is fast for few rows where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BiasedLinear(nn.Linear):
    """Linear map whose bias comes with the call: added within the product, and kept by whoever calls."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute what `F.linear` does, but for rounding; and the very same where gradients may be wanted.

    Args:
        x: (…, K).
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (…, N).
    """
    if torch.is_grad_enabled() or not is_plain_on_cpu(x, weight, *_FAST_DTYPES):
        return F.linear(x, weight, bias)
    N, K = weight.shape
    num_rows = x.numel() // K
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and (packed_weights := _packed_weights.get()) is not None:
        y = _packed_linear(packed_weights, x, weight, bias, num_rows)
        if y is not None:
            return y
    if weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    # The weights' shape first: where a number of rows is a symbol, asking for it splits a graph.
    if K <= N and K * N >= MIN_LARGE_WEIGHTS and MIN_TRANSPOSED_ROWS <= num_rows <= MAX_TRANSPOSED_ROWS:
        # Contiguous: what follows goes along N.
        y = torch.mm(weight, x.reshape(num_rows, K).t()).t().contiguous()
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], N)
    # Inductor has a way of its own with oneDNN and takes no other.
    if num_rows and _HAS_ONEDNN and not is_compiling:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _packed_linear(
    packed_weights: PackedWeights, x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int
) -> Tensor | None:
    """Compute with a packed copy, or return None where that is not the fast way."""
    N, K = weight.shape
    if K * N < MIN_LARGE_WEIGHTS or not num_rows or not _HAS_ONEDNN:
        return None
    if weight.dtype == torch.float32 and (num_rows == 1 or num_rows == 2 and K <= N):
        return None
    packed = packed_weights.of(weight, num_rows)
    if packed is None:
        return None
    if num_rows >= MIN_PACKED_ROWS:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    filled = F.pad(x.reshape(num_rows, K), (0, 0, 0, MIN_PACKED_ROWS - num_rows))
    y = torch.ops.mkldnn._linear_pointwise(filled, packed, bias, "none", [], "")
    return y[:num_rows].view(*x.shape[:-1], N)
