"""Several small codebooks, each of which codes an equal share of a vector's channels; an index's digits are their own.

Product quantization (Jégou et al. 2011). Legend: B batch, N vectors, V = Π V_d codes of D codebooks, C code channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nextblock.data.code_digits import CodeDigits

from .codebook_learned import LearnedCodebook


class ProductCodebook(nn.Module):
    """All combinations of the codes of smaller codebooks; it satisfies `protocols.Codebook` and its `DigitCodebook`.

    Args:
        parts: D codebooks of equally many channels; the first gives the lowest digit. They learn in the same way.
    """

    def __init__(self, parts: Sequence[LearnedCodebook]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.digits = CodeDigits(tuple(part.num_codes for part in parts))
        self.num_codes = self.digits.num_codes
        self.dim = sum(part.dim for part in parts)
        self.gradient = parts[0].gradient
        self.epsilon = parts[0].epsilon

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map (B, C, …), each share L2-normalised where its codes are."""
        shares = features.chunk(len(self.parts), dim=1)
        return torch.cat([part.prepare(share) for part, share in zip(self.parts, shares, strict=True)], dim=1)

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of each vector, (…, C) → (…) int64: its digits are the nearest codes of its shares."""
        digits = [part.assign(share) for part, share in self._shares(vectors)]
        return self.digits.join(torch.stack(digits, dim=-1))

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of the indices, (…) → (…, C)."""
        digits = self.digits.split(idx).unbind(-1)
        return torch.cat([part.lookup(digit) for part, digit in zip(self.parts, digits, strict=True)], dim=-1)

    def expected(self, vectors: Tensor) -> Tensor:
        """Return the mean code of each vector, (…, C) → (…, C), for the gradient "index"."""
        return torch.cat([part.expected(share) for part, share in self._shares(vectors)], dim=-1)

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return shares of vectors (N, C) with their codes; see `protocols.FactorCodebook`."""
        return [part.compared(share) for part, share in self._shares(vectors)]

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the terms of a learned codebook for all channels at once; see `protocols.Codebook`."""
        return self.parts[0].loss_terms(features, quantized, is_composed=is_composed)

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Let every part remember its share of vectors and indices until the next `after_step`."""
        digits = self.digits.split(idx).unbind(-1)
        for (part, share), digit in zip(self._shares(vectors), digits, strict=True):
            part.record(share, digit)

    def after_step(self, *keys: int) -> None:
        """Let every part learn from what it recorded; processes call it together, with equal keys."""
        for number, part in enumerate(self.parts):
            part.after_step(*keys, number)

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Set the codes of every part to shares of the given vectors (N, C)."""
        for part, share in self._shares(vectors):
            part.start_from(share, seed)

    def restart_averages(self) -> None:
        """Let the moving averages of every part start from its codes."""
        for part in self.parts:
            part.restart_averages()

    def _shares(self, vectors: Tensor) -> list[tuple[LearnedCodebook, Tensor]]:
        """Return every part with its share (…, C/D) of the channels."""
        return list(zip(self.parts, vectors.chunk(len(self.parts), dim=-1), strict=True))
