"""What a codec, which makes tokens of a feature map, and a codebook, which makes an index of a vector, have to offer.

Any codec works with any codebook. Legend: B batch, L_k tokens of block k, L all tokens, N vectors, V codes, C code
channels, h×w latent cells; `idx_BL` holds indices (B, L) in block order.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import CodeDigits


class Codebook(Protocol):
    """How a vector becomes an index: a module with at least one floating-point tensor, which tells device and dtype.

    V may be 2^18 and more and a rule may stand in for a table, so nobody asks for all codes at once; a codebook that
    has them in a table is a `TableCodebook` besides. A codebook with a `reset_parameters` is initialised by it.

    Attributes:
        num_codes: V.
        dim: C.
    """

    num_codes: int
    dim: int

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map (B, C, h, w) as it is to be quantized: as it is, normalised, or bounded.

        The straight-through gradient of the quantized map runs through this.
        """

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of each vector, (…, C) → (…) int64, without gradient."""

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of indices as the decoder receives them, (…) → (…, C)."""

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return scalars that the codec adds to its loss, in this order; none where nothing is to be learned.

        Args:
            features: (B, C, h, w), prepared, with gradient.
            quantized: (B, C, h, w) of codes, with gradient.
            is_composed: whether `quantized` is more than the codes themselves, such as a sum of convolved maps, so that
                weights of the codec learn from the codebook term even where codes need none.
        """

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Take note, in training, that vectors (…, C) were given the indices (…)."""

    def after_step(self, *keys: int) -> None:
        """Learn from what was recorded since the last call; every process calls it, with equal keys."""

    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Place the codes by vectors (N, C) of training images, chosen by a seed, before the first step."""


class GradientCodebook(Protocol):
    """What a codebook offers besides where gradients shall not pass straight through; see gradients.py.

    Attributes:
        gradient: "rotation", "index", or "straight_through" as without it.
        epsilon: smallest norm that a rotation divides by.
    """

    gradient: str
    epsilon: float

    def expected(self, vectors: Tensor) -> Tensor:
        """Return the mean code of vectors, (…, C) → (…, C), under a softmax whose largest is the one assigned.

        Its probabilities alone have a gradient; asked for with the gradient "index".
        """


class DigitCodebook(Protocol):
    """What a codebook offers besides whose codes are all combinations of smaller ones.

    Attributes:
        digits: how an index is written as the numbers of the smaller codes.
    """

    digits: CodeDigits


@runtime_checkable
class TableCodebook(Protocol):
    """What a codebook offers besides where its codes are a table."""

    def get_codebook(self) -> Tensor:
        """Return all codes (V, C), as `Codebook.lookup` gives them."""

    def compared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (N, C) and all codes (V, C) so that the nearest by Euclidean distance is the one assigned.

        Both may have a channel more than C.
        """


@runtime_checkable
class FactorCodebook(Protocol):
    """What a codebook offers besides whose codes are all combinations of the codes of independent channels."""

    def factors(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return shares of vectors (N, C) and the codes of each, (N, C_f) and (V_f, C_f), with gradient.

        In every share the nearest code by Euclidean distance is the one assigned.
        """


class Codec(Protocol):
    """How a feature map becomes tokens, block by block; it holds no codes, every method is given the codebook.

    Attributes:
        layout: the blocks.
    """

    layout: BlockLayout

    def encode(self, features: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a map (B, C, h, w), and record vectors and indices in training mode.

        Returns:
            The quantized map (B, C, h, w), which passes gradients straight through to the prepared features; the scalar
            loss; and idx_BL.
        """

    def indices(self, features: Tensor, codebook: Codebook) -> Tensor:
        """Return idx_BL of a map (B, C, h, w)."""

    def training_vectors(self, features: Tensor, codebook: Codebook) -> Tensor:
        """Return the vectors (B, L, C) of a map that codes start from and the entropy term compares."""

    def decode(self, idx_BL: Tensor, codebook: Codebook) -> Tensor:
        """Return the quantized map (B, C, h, w)."""

    def var_input(self, idx_BL: Tensor, codebook: Codebook) -> Tensor:
        """Return the prior's input (B, L − L_1, C): for each block after the first, what the prior sees there."""

    def start(self, num_images: int, dim: int, like: Tensor) -> Tensor:
        """Return the map (B, C, h, w) before the first block, of the dtype and device of `like`."""

    def advance(self, canvas: Tensor, content: Tensor, k: int, codebook: Codebook) -> tuple[Tensor, Tensor | None]:
        """Put block k onto a map and give the input of the block after it; see `Quantizer.advance`."""
