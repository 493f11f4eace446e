"""Heads: what makes scores of a hidden state, those of all codes or those of each digit.

Digits in parallel as Infinity's bits (Han et al. 2024, arXiv:2412.04431); a network on the digits known so far as BAR's
(Yu et al. 2026, arXiv:2602.09024). Legend: n digits, b_i base of digit i, S = Σ b_i scores, V codes, D width of the
hidden state, W width of the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nextblock.data.code_digits import CodeDigits
from nextblock.training.precision import full_precision

from .head_plan import DEFAULT_LAYERS, NETWORK_KINDS, HeadOptions, configured_plan
from .linear import Linear

UNKNOWN = -1


class DigitEmbedding(nn.Module):
    """The sum of a vector for each digit of a token, over the root of their number.

    Args:
        bases: of the n digits.
        width: of the vectors.
        has_unknown: whether a digit may be −1, which has a vector of its own.
    """

    def __init__(self, bases: tuple[int, ...], width: int, *, has_unknown: bool = False):
        super().__init__()
        self.bases, self.has_unknown = bases, has_unknown
        self.table = nn.Embedding(sum(bases) + len(bases) * has_unknown, width)

    def forward(self, digits: Tensor) -> Tensor:
        """Embed digits, (…, n) int64 → (…, width)."""
        row, embedded = 0, 0
        # One after the other: the vectors of all digits together would be n times what is wanted.
        for digit, base in zip(digits.unbind(-1), self.bases, strict=True):
            if self.has_unknown:
                digit = torch.where(digit == UNKNOWN, base, digit)
            embedded = embedded + self.table(digit + row)
            row += base + self.has_unknown
        return embedded * len(self.bases) ** -0.5


class TokenEmbedding(nn.Module):
    """The input of a prior that takes indices and predicts digits: `DigitEmbedding` of an index.

    Args:
        bases: of the digits of an index.
        width: of the vectors.
    """

    def __init__(self, bases: tuple[int, ...], width: int):
        super().__init__()
        self.digits = CodeDigits(bases)
        self.embedding = DigitEmbedding(bases, width)

    def forward(self, idx: Tensor) -> Tensor:
        """Embed indices, (…) int64 → (…, width)."""
        return self.embedding(self.digits.split(idx))


class HeadLayer(nn.Module):
    """Normalised gated feed-forward (SwiGLU) beside a residual.

    Args:
        width: W.
    """

    def __init__(self, width: int):
        super().__init__()
        # The gate's matrix beside: as many weights as an inner width of 4 W has without one.
        inner = max(1, round(width * 8 / 3))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gate_and_value = Linear(width, 2 * inner)
        self.output = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(self.norm(x)).chunk(2, dim=-1)
        return x + self.output(F.silu(gate) * value)


class DigitNetwork(nn.Module):
    """Scores of all digits, from the hidden state and the digits that are known.

    Args:
        hidden_size: D.
        bases: of the n digits.
        width: W.
        num_layers: of the network.
    """

    def __init__(self, hidden_size: int, bases: tuple[int, ...], width: int, num_layers: int):
        super().__init__()
        self.num_digits = len(bases)
        self.input = Linear(hidden_size, width)
        self.digits = DigitEmbedding(bases, width, has_unknown=True)
        self.layers = nn.ModuleList(HeadLayer(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.output = Linear(width, sum(bases))

    def forward(self, hidden_states: Tensor, digits: Tensor | None = None) -> Tensor:
        """Score all digits.

        Args:
            hidden_states: (…, D).
            digits: (…, n) int64, −1 for those that are not known; None knows none.

        Returns:
            (…, S).
        """
        if digits is None:
            shape = (*hidden_states.shape[:-1], self.num_digits)
            digits = torch.full(shape, UNKNOWN, device=hidden_states.device)
        x = self.input(hidden_states) + self.digits(digits)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def build_head(config: PreTrainedConfig, hidden_size: int, *, has_bias: bool = True) -> nn.Module:
    """Make the head that a configuration asks for; the one place that chooses it.

    Args:
        config: what `configured_plan` reads.
        hidden_size: D.
        has_bias: of a head that is one linear map.

    Returns:
        A module (…, D) → (…, S); where digits are drawn in more than one pass, it takes those that are known besides.
    """
    plan, options = configured_plan(config), HeadOptions.of(config)
    if options.head not in NETWORK_KINDS:
        return Linear(hidden_size, plan.num_scores, bias=has_bias)
    return DigitNetwork(
        hidden_size, plan.bases, options.head_width or hidden_size, options.head_layers or DEFAULT_LAYERS
    )


def build_token_embedding(config: PreTrainedConfig, hidden_size: int) -> nn.Module:
    """Make the table of a prior that takes indices: a row a code, or where the head predicts digits a row a digit.

    Args:
        config: what `configured_plan` reads.
        hidden_size: D.
    """
    if HeadOptions.of(config).head == "softmax":
        return nn.Embedding(config.vocab_size, hidden_size)
    return TokenEmbedding(configured_plan(config).bases, hidden_size)


def num_head_parameters(config: PreTrainedConfig, hidden_size: int) -> int:
    """Return about how many numbers a head learns."""
    plan, options = configured_plan(config), HeadOptions.of(config)
    if options.head not in NETWORK_KINDS:
        return plan.num_scores * hidden_size
    width, num_layers = options.head_width or hidden_size, options.head_layers or DEFAULT_LAYERS
    return width * (hidden_size + 2 * plan.num_scores + 8 * num_layers * width)


def output_projection(head: nn.Module) -> nn.Module:
    """Return the linear map that gives a head's scores."""
    return head.output if isinstance(head, DigitNetwork) else head


def head_scores(head: nn.Module, hidden_states: Tensor, digits: Tensor | None = None) -> Tensor:
    """Apply a head; the products are in the run's precision, the scores in float32 or float64.

    Args:
        head: from `build_head`.
        hidden_states: (…, D).
        digits: (…, n) int64, −1 for those that are not known, where the head takes them; None knows none.

    Returns:
        (…, S).
    """
    # Sharded weights come in the run's half type, while hidden states are float32.
    x = hidden_states.to(torch.promote_types(output_projection(head).weight.dtype, hidden_states.dtype))
    return full_precision(head(x) if digits is None else head(x, digits))
