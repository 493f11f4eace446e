"""Quantizer = codec × codebook: a codec makes tokens of a feature map, a codebook makes an index of a vector.

Any codec works with any codebook. Legend: B batch, K blocks, L_k tokens of block k, L all tokens, N vectors, V codes,
C code channels, h×w latent cells; `idx_BL` holds indices (B, L) in block order.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from nextblock.data.blocks import BlockLayout
from nextblock.data.code_digits import CodeDigits
from nextblock.data.finite import check_finite
from nextblock.data.given import FLOAT_DTYPES, check_tensor
from nextblock.evaluation.codebook import check_codes
from nextblock.training.precision import full_precision, in_float32, moved_unhalved

from .codebook_learned import LearnedCodebook
from .codec_tiles import TileCodec
from .protocols import Codebook, Codec, FactorCodebook, TableCodebook
from .seam_checks import check_parts, try_out


class Quantizer(nn.Module):
    """A codec with its codebook: all of quantization that tokenizer, prior and pipeline see.

    It computes in float32 (or float64) whatever the model is cast to, and whatever autocast and TF32 are in force.

    Args:
        codec: how a map becomes tokens.
        codebook: how a vector becomes an index.

    Raises:
        ValueError: if codec or codebook is none, or the codebook has no floating-point tensor.
    """

    def __init__(self, codec: Codec, codebook: Codebook):
        super().__init__()
        check_parts(codec, codebook)
        if not any(tensor.is_floating_point() for tensor in chain(codebook.parameters(), codebook.buffers())):
            raise ValueError(
                f"codebook is a {type(codebook).__name__} without a floating-point tensor; expected a parameter or "
                "buffer of some size, which tells device and dtype"
            )
        # Optimizers, and the sum in a gradient's norm, follow this order.
        self.codebook = codebook
        self.codec = codec

    @property
    def layout(self) -> BlockLayout:
        """The blocks."""
        return self.codec.layout

    @property
    def num_codes(self) -> int:
        """V."""
        return self.codebook.num_codes

    @property
    def dim(self) -> int:
        """C."""
        return self.codebook.dim

    @property
    def digits(self) -> CodeDigits | None:
        """How an index is written as digits, where the codebook is a product of smaller ones; else None."""
        return getattr(self.codebook, "digits", None)

    def forward(self, features: Tensor, num_scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a feature map, and record it for the codebook in training mode.

        Args:
            features: (B, C, h, w).
            num_scales: (B,) int64 in [1, K]: of a scale layout's image the map shall hold the first scales alone. The
                indices are those of all scales.

        Returns:
            The quantized map (B, C, h, w), which passes gradients on as the codebook has it; the scalar loss; and
            idx_BL.

        Raises:
            ValueError: if the map or `num_scales` has another shape or dtype than it must; in evaluation mode also if
                features, codes or the codec's weights are NaN or infinite: a training loop has a guard of its own and
                no time to wait.
        """
        self._check_features(features)
        options = {} if num_scales is None else {"num_scales": self._checked_num_scales(num_scales, len(features))}
        if not self.training:
            self.check_finite(features)
        with in_float32(features.device):
            return self.codec.encode(full_precision(features, self._like), self.codebook, **options)

    @torch.no_grad()
    def indices(self, features: Tensor, *, is_checked: bool = True) -> Tensor:
        """Return idx_BL of a feature map (B, C, h, w).

        Args:
            features: the map.
            is_checked: whether to look for values that are NaN or infinite, which waits for the device. They would all
                become code 0.

        Raises:
            ValueError: if the map has another shape or dtype than it must, or features, codes or the codec's weights
                are NaN or infinite.
        """
        self._check_features(features)
        if is_checked:
            self.check_finite(features)
        with in_float32(features.device):
            return self.codec.indices(full_precision(features, self._like), self.codebook)

    def training_vectors(self, features: Tensor) -> Tensor:
        """Return the vectors (B, L, C) of a feature map (B, C, h, w) that codes start from."""
        with in_float32(features.device):
            return self.codec.training_vectors(full_precision(features, self._like), self.codebook)

    def idx_to_features(self, idx_BL: Tensor) -> Tensor:
        """Return the quantized map (B, C, h, w) of indices; those that `check_indices` refuses are refused."""
        self.check_indices(idx_BL)
        with in_float32(idx_BL.device):
            return self.codec.decode(idx_BL, self.codebook)

    def var_input(self, idx_BL: Tensor) -> Tensor:
        """Return the prior's input (B, L − L_1, C); indices that `check_indices` refuses are refused."""
        self.check_indices(idx_BL)
        with in_float32(idx_BL.device):
            return self.codec.var_input(idx_BL, self.codebook)

    def start(self, num_images: int) -> Tensor:
        """Return the map (B, C, h, w) that `advance` fills block by block."""
        return self.codec.start(num_images, self.dim, self._like)

    def advance(
        self, canvas: Tensor, content: Tensor, k: int, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Put block k onto the map and give the prior's input for the block after it.

        Args:
            canvas: (B, C, h, w) after the blocks before k; may be written in place.
            content: indices (B, L_k) of block k; scales also take vectors (B, L_k, C) in place of single codes.
            k: block number, from 0.
            places: (B, L_k) int64, tiles only: which tokens of the sequence the indices are in each image, where they
                are drawn in another order than the layout's; None are those of block k.

        Returns:
            The map, and the input (B, L_{k+1}, C) of block k+1, or None after the last block and with places.
        """
        options = {} if places is None else {"places": places}
        with in_float32(canvas.device):
            return self.codec.advance(canvas, content, k, self.codebook, **options)

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of indices as the decoder receives them, (…) → (…, C)."""
        with in_float32(idx.device):
            return self.codebook.lookup(idx)

    def check_indices(self, idx_BL: Tensor) -> None:
        """Refuse what does not fit the layout, and indices that are no codes.

        Args:
            idx_BL: (B, L) int64 in block order.

        Raises:
            ValueError: if shape or dtype do not fit, or one on the CPU is not a code.
        """
        L = self.layout.num_tokens
        check_tensor("idx_BL", idx_BL, f"a torch.int64 tensor (batch, {L})")
        if idx_BL.ndim != 2 or idx_BL.shape[1] != L:
            raise ValueError(f"idx_BL has shape {tuple(idx_BL.shape)}; expected (batch, {L})")
        if idx_BL.dtype != torch.int64:
            raise ValueError(f"idx_BL has dtype {idx_BL.dtype}; expected torch.int64")
        if idx_BL.device.type == "cpu":  # Reading them would wait for a GPU, whose own look-up refuses what is no code.
            check_codes(idx_BL, self.layout.block_lengths, self.num_codes)

    def check_finite(self, features: Tensor | None = None) -> None:
        """Refuse to quantize with values that are NaN or infinite; waits for the device.

        Args:
            features: a map that is to be quantized, if any.

        Raises:
            ValueError: naming what has such values.
        """
        found = {} if features is None else {"the feature map": features}
        # Weights that wait on a disk are looked at when they are used.
        own = {name: tensor for name, tensor in self.state_dict().items() if not tensor.is_meta}
        found |= {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
        check_finite("quantization", found)

    def get_codebook(self) -> Tensor:
        """Return all code vectors (V, C).

        Raises:
            ValueError: if the codebook has no table.
        """
        return self._table_codebook().get_codebook()

    def compared(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return a map's vectors (B·L, C) and all codes (V, C) as the search compares them, with gradient.

        Args:
            features: (B, C, h, w).

        Raises:
            ValueError: if the codebook has no table.
        """
        with in_float32(features.device):
            return self._table_codebook().compared(self.training_vectors(features).flatten(0, 1))

    def factors(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return a map's vectors and all codes as the search compares them, in independent shares of the channels.

        Args:
            features: (B, C, h, w).

        Returns:
            Pairs of vectors (B·L, C_f) and codes (V_f, C_f), with gradient; Σ C_f = C and Π V_f = V.

        Raises:
            ValueError: if the codebook has neither a table nor factors.
        """
        if not isinstance(self.codebook, FactorCodebook):
            return [self.compared(features)]
        with in_float32(features.device):
            return self.codebook.factors(self.training_vectors(features).flatten(0, 1))

    @torch.no_grad()
    def start_from(self, features: Tensor, seed: int) -> None:
        """Place the codes by a feature map of training images.

        Args:
            features: (B, C, h, w); the same on every process.
            seed: chooses among its vectors.

        Raises:
            ValueError: if the map has values that are NaN or infinite.
        """
        self.check_finite(features)
        self.codebook.start_from(self.training_vectors(features).flatten(0, 1), seed)

    def after_step(self, *keys: int, was_skipped: Tensor | None = None) -> None:
        """Let the codebook learn from the forward passes recorded since the last call.

        Args:
            keys: integers such as (seed, step) for what is drawn; equal on every process.
            was_skipped: scalar that is true where the optimizer took no step, on the codebook's device: what was
                recorded is then forgotten. None means that it took one.
        """
        if was_skipped is None:
            self.codebook.after_step(*keys)
            return
        # A choice on the device: asking which it is would make the host wait.
        tensors = list(self.codebook.state_dict().values())
        before = [tensor.clone() for tensor in tensors]
        self.codebook.after_step(*keys)
        for tensor, unmoved in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(was_skipped, unmoved, tensor))

    def try_out(self) -> None:
        """Refuse a codebook that gives other tensors than it must, by a few vectors.

        Raises:
            ValueError: naming the method, what it gave and what was expected.
        """
        with in_float32(self._like.device):
            try_out(self.codebook, self._like)

    def _check_features(self, features: Tensor) -> None:
        """Refuse what is no feature map of the codes' channels and the layout's size."""
        grid = ("h", "w") if self.layout is None else self.layout.grid
        expected = f"a floating-point tensor (batch, {self.dim}, {grid[0]}, {grid[1]})"
        check_tensor("features", features, expected)
        is_map = features.ndim == 4 and features.shape[1] == self.dim and features.dtype in FLOAT_DTYPES
        if not is_map or (self.layout is not None and tuple(features.shape[2:]) != grid):
            raise ValueError(f"features is {features.dtype} {tuple(features.shape)}; expected {expected}")

    def _checked_num_scales(self, num_scales: Tensor, num_images: int) -> Tensor:
        """Refuse what is no number of scales for every image."""
        if self.layout is None or not self.layout.is_scales:
            raise ValueError("num_scales is given; expected None for tiles, which all hold cells of their own")
        K = self.layout.num_blocks
        check_tensor("num_scales", num_scales, f"a torch.int64 tensor ({num_images},) from 1 to {K}")
        is_valid = num_scales.dtype == torch.int64 and tuple(num_scales.shape) == (num_images,)
        if is_valid and num_scales.device.type == "cpu":  # Reading them would wait for a GPU.
            is_valid = bool(((num_scales >= 1) & (num_scales <= K)).all())
        if not is_valid:
            raise ValueError(
                f"num_scales is {num_scales.dtype} {tuple(num_scales.shape)}; expected torch.int64 ({num_images},) "
                f"from 1 to {K}"
            )
        return num_scales

    @property
    def _like(self) -> Tensor:
        """A tensor of the quantizer's device and precision."""
        tensors = chain(self.codebook.parameters(), self.codebook.buffers())
        return next(tensor for tensor in tensors if tensor.is_floating_point())

    def _table_codebook(self) -> TableCodebook:
        """Return the codebook, which must have a table."""
        if not isinstance(self.codebook, TableCodebook):
            raise ValueError(
                f"the codebook is a {type(self.codebook).__name__}, which has no table of its codes; expected one with "
                "get_codebook and compared for smooth sampling and for the entropy term"
            )
        return self.codebook

    def _apply(self, fn, recurse=True):
        """Move with the model, but refuse its half types: distances, averages and residuals need float32."""
        return super()._apply(lambda tensor: moved_unhalved(fn, tensor), recurse)


class VectorQuantizer(nn.Module):
    """Replace every feature vector of a map of any size by its nearest code.

    Args:
        num_embeddings: V.
        embedding_dim: C.
        beta: weight of the commitment loss.
        epsilon: smallest norm that is divided by.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, beta: float = 0.25, epsilon: float = 1e-5):
        super().__init__()
        codebook = LearnedCodebook(num_embeddings, embedding_dim, beta=beta, epsilon=epsilon)
        self.quantizer = Quantizer(TileCodec(layout=None), codebook)

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors."""
        return self.quantizer.get_codebook()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a feature map.

        Args:
            features: (B, C, h, w).

        Returns:
            The quantized map (B, C, h, w), which passes gradients straight through to `features`; the scalar loss:
            codebook MSE + beta · commitment MSE; and the flat indices (B·h·w,) in raster order.
        """
        quantized, loss, idx = self.quantizer(features)
        return quantized, loss, idx.flatten()
