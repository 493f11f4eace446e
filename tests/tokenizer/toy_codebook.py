"""A codebook from outside the library: the signs of a vector's channels are the bits of its index, without a table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401 -- by this name diffusers sees that the module's models load

from nextblock.tokenizer import VQVAE, VQVAEConfig


class SignCodebook(nn.Module):
    """2^C codes, the corners of a cube whose half side is learned."""

    def __init__(self, dim: int, beta: float):
        super().__init__()
        self.num_codes, self.dim, self.beta = 2**dim, dim, beta
        self.side = nn.Parameter(torch.empty(1))
        self.register_buffer("places", 2 ** torch.arange(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.side, 0.5)

    def prepare(self, features: Tensor) -> Tensor:
        return features.tanh()

    def assign(self, vectors: Tensor) -> Tensor:
        return ((vectors > 0) * self.places).sum(-1)

    def lookup(self, idx: Tensor) -> Tensor:
        return self.side * (2 * (idx[..., None] // self.places % 2) - 1)

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        return [self.beta * F.mse_loss(features, quantized.detach()), F.mse_loss(quantized, features.detach())]

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        pass

    def after_step(self, *keys: int) -> None:
        pass

    def start_from(self, vectors: Tensor, seed: int) -> None:
        with torch.no_grad():
            self.side.fill_(vectors.abs().mean())


class SignVQVAE(VQVAE):
    """A tokenizer with that codebook."""

    def build_codebook(self, config: VQVAEConfig) -> SignCodebook:
        return SignCodebook(config.embedding_dim, config.beta)
