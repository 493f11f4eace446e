"""Linear maps, and which of the ways to compute them is the fast one.

Every block of tokens reads all weights; where blocks are short, as in raster order, sampling waits for nothing else.
Legend: M rows, K inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# GB/s of weights read on two cores with AVX-512, of 31 that their memory gives, for K = 768 (in brackets 3072):
#     M                    1        2        3        4        5        8       16
#     F.linear        13 (19)   7 (9)    7 (7)   10 (10)  10 (8)   10 (9)    8 (6)
#     transposed      13 (19)  30 (20)  24 (12)  26 (10)  19 (9)   10 (5)   10 (6)
#     oneDNN          24 (20)  17 (23)  16 (19)  17 (21)  17 (19)  14 (10)  11 (7)
# With hundreds of rows oneDNN is ahead by a tenth. A row of it is the same among any others, from two rows on, and
# wherever the weights lie. The transposed product depends on both: small weights, which gain nothing, do without.
MIN_TRANSPOSED_ROWS, MAX_TRANSPOSED_ROWS, MIN_TRANSPOSED_WEIGHTS = 2, 4, 2**18
_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    if torch.is_grad_enabled() or not _is_plain_float32_on_cpu(x, weight):
        return F.linear(x, weight, bias)
    N, K = weight.shape
    num_rows = x.numel() // K
    # The weights' shape first: where a number of rows is a symbol, asking for it splits a graph.
    if K <= N and K * N >= MIN_TRANSPOSED_WEIGHTS and MIN_TRANSPOSED_ROWS <= num_rows <= MAX_TRANSPOSED_ROWS:
        y = torch.mm(weight, x.reshape(num_rows, K).t()).t()
        # Contiguous: what follows goes along N.
        return (y if bias is None else y + bias).contiguous().view(*x.shape[:-1], N)
    # Inductor has a way of its own with oneDNN and takes no other.
    if num_rows and _HAS_ONEDNN and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _is_plain_float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Tell whether both are float32 on a CPU, neither cast by autocast nor of a tensor class of its own."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )
