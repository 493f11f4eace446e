"""A table of learned codes, trained by gradient or moving average, with revival of dead codes.

VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937) and its EMA update (appendix A.1; Razavi et al. 2019); unit codes
as in LlamaGen (arXiv:2406.06525). Legend: B batch, N feature vectors, V codes, C code channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from nextblock.data.keyed_random import keyed_uniform

from .code_search import as_distances, most_aligned_codes, most_similar_codes, nearest_codes
from .gradients import codebook_terms, expected_codes
from .processes import all_reduced, rank_and_world_size

# Recorded batches are kept until the codebook's update, so a loop that forgets it would fill the memory.
MAX_PENDING = 1024


class LearnedCodebook(nn.Module):
    """A table of V code vectors; it satisfies `protocols.TableCodebook`.

    Args:
        num_codes: V.
        dim: C.
        beta: weight of the commitment loss.
        epsilon: Laplace smoothing of the moving average's counts, and the smallest norm that is divided by.
        ema_decay: None trains the codes by gradient; a decay in (0, 1) replaces the gradient by a moving average of
            the vectors assigned to each code.
        metric: which code is taken: the nearest one, "euclidean", or that of largest "cosine" or "inner_product".
        has_unit_codes: whether features and codes themselves are L2-normalised; with them all metrics find the same.
        revival_threshold: a code is dead, and moves onto a vector of the last batch, once its moving-average count
            falls under this share of the mean count; 0 revives none.
        init_scale: codes start uniform in ±init_scale; None means 1/V.
        gradient: how the quantized map passes its gradient on, "straight_through", "rotation" or "index".
        count_decay: of the counts by which revival goes where codes are trained by gradient, in (0, 1).
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        epsilon: float = 1e-5,
        ema_decay: float | None = None,
        metric: Literal["euclidean", "cosine", "inner_product"] = "euclidean",
        has_unit_codes: bool = False,
        revival_threshold: float = 0.0,
        init_scale: float | None = None,
        gradient: Literal["straight_through", "rotation", "index"] = "straight_through",
        count_decay: float = 0.99,
    ):
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.beta = beta
        self.epsilon = epsilon
        self.ema_decay = ema_decay
        self.count_decay = count_decay if ema_decay is None else ema_decay
        self.metric = metric
        self.has_unit_codes = has_unit_codes
        self.revival_threshold = revival_threshold
        self.gradient = gradient
        self.init_scale = 1.0 / num_codes if init_scale is None else init_scale
        weight = torch.empty(num_codes, dim, dtype=torch.float32)
        if ema_decay is None:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("code_sums", torch.empty_like(weight))
        if ema_decay is not None or revival_threshold > 0:
            self.register_buffer("code_counts", torch.empty(num_codes, dtype=torch.float32))
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes uniformly in ±init_scale and start the moving averages on them."""
        init.uniform_(self.weight, -self.init_scale, self.init_scale)
        self.restart_averages()

    def get_codebook(self) -> Tensor:
        """Return the (V, C) table of code vectors, as `lookup` gives them."""
        return self._normalized(self.weight)

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature map (B, C, …), L2-normalised where codes are."""
        return self._normalized(features, dim=1)

    def assign(self, vectors: Tensor) -> Tensor:
        """Return the index of the code of each vector by the metric, (…, C) → (…) int64."""
        with torch.no_grad():
            flat = vectors.flatten(0, -2)
            if self.metric == "cosine":
                idx = most_similar_codes(flat, self.weight.to(flat.dtype), self.epsilon)
            elif self.metric == "inner_product":
                idx = most_aligned_codes(flat, self.get_codebook().to(flat.dtype))
            else:
                idx = nearest_codes(flat, self.get_codebook().to(flat.dtype))
            return idx.view(vectors.shape[:-1])

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of the indices, (…) → (…, C)."""
        return self._normalized(F.embedding(idx, self.weight))

    def compared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (N, C) and all codes (V, C) as the search compares them, with gradient."""
        codes = self.get_codebook().to(vectors.dtype)
        if self.metric == "cosine":
            return F.normalize(vectors, dim=1, eps=self.epsilon), F.normalize(codes, dim=1, eps=self.epsilon)
        if self.metric == "inner_product":
            return as_distances(vectors, codes)
        return vectors, codes

    def expected(self, vectors: Tensor) -> Tensor:
        """Return the mean code of each vector, (…, C) → (…, C), for the gradient "index"."""
        is_inner = self.metric == "inner_product"
        return expected_codes(vectors, self.get_codebook().to(vectors.dtype), is_inner=is_inner)

    def loss_terms(self, features: Tensor, quantized: Tensor, *, is_composed: bool) -> list[Tensor]:
        """Return the commitment term, then the codebook term where something learns from it.

        Args:
            features: (B, C, h, w), prepared.
            quantized: (B, C, h, w), with gradient.
            is_composed: see `protocols.Codebook`.
        """
        has_gradient = is_composed or self.ema_decay is None
        return codebook_terms(features, quantized, self.beta, self.gradient, has_gradient=has_gradient)

    @torch.no_grad()
    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Set every code to one of the given vectors.

        Args:
            vectors: (N, C); V of them are picked, without repetition where N ≥ V.
            seed: the pick's key.
        """
        V, N = self.num_codes, len(vectors)
        order = keyed_uniform(seed, samples=torch.arange(N)).argsort()
        picked = order[torch.arange(V) % N].to(vectors.device)
        self.weight.copy_(vectors[picked])
        self.restart_averages()

    def record(self, vectors: Tensor, idx: Tensor) -> None:
        """Remember which vectors took which codes until the next `after_step`.

        Args:
            vectors: (…, C) of this process's part of the batch.
            idx: (…) int64.

        Raises:
            RuntimeError: if `after_step` has long not been called.
        """
        if self.ema_decay is None and self.revival_threshold == 0:
            return
        if len(self._pending) >= MAX_PENDING:
            raise RuntimeError(
                f"{MAX_PENDING} training passes were recorded without an update of the codebook; "
                "call update_codebook after each optimizer step"
            )
        self._pending.append((vectors.detach().flatten(0, -2), idx.flatten()))

    @torch.no_grad()
    def after_step(self, *keys: int) -> None:
        """Apply what was recorded since the last call: moving averages first, then revival of dead codes.

        All processes must call it together; sums are taken over all of them, so codes stay equal everywhere.

        Args:
            keys: integers such as (seed, step) that choose which vectors revived codes take.
        """
        if not self._pending:
            return
        vectors = torch.cat([pending[0] for pending in self._pending])
        idx = torch.cat([pending[1] for pending in self._pending])
        self._pending.clear()
        # Not bincount: on a GPU it reads the largest index back and makes the host wait.
        counts = idx.new_zeros(self.num_codes).scatter_add_(0, idx, torch.ones_like(idx)).to(self.weight.dtype)
        self.code_counts.lerp_(all_reduced(counts), 1 - self.count_decay)
        if self.ema_decay is not None:
            sums = torch.zeros_like(self.weight).index_add_(0, idx, vectors.to(self.weight.dtype))
            self.code_sums.lerp_(all_reduced(sums), 1 - self.ema_decay)
            self._set_weight_from_averages()
        if self.revival_threshold > 0:
            self._revive(vectors, *keys)

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Let every code start as if it had been used once a batch, by itself."""
        # transformers' initialisers leave tensors alone that from_pretrained has just loaded.
        if self.ema_decay is not None:
            init.copy_(self.code_sums, self.weight)
        if hasattr(self, "code_counts"):
            init.ones_(self.code_counts)

    def _set_weight_from_averages(self) -> None:
        """Divide sums by counts; Laplace smoothing keeps an unused code from dividing by zero."""
        total = self.code_counts.sum()
        smoothed = (self.code_counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        self.weight.copy_(self.code_sums / smoothed[:, None])

    def _revive(self, vectors: Tensor, *keys: int) -> None:
        """Move dead codes onto vectors of the global batch, picked by keys and not by a process's generator."""
        V, N = self.num_codes, len(vectors)
        rank, world_size = rank_and_world_size()
        draws = keyed_uniform(*keys, samples=torch.arange(V, device=vectors.device))
        rows = (draws * (N * world_size)).long() - rank * N
        is_here = (rows >= 0) & (rows < N)
        candidates = vectors[rows.clamp(0, N - 1)].to(self.weight.dtype) * is_here[:, None]
        candidates = all_reduced(candidates)
        mean_count = self.code_counts.mean()
        is_dead = self.code_counts < self.revival_threshold * mean_count
        self.weight.copy_(torch.where(is_dead[:, None], candidates, self.weight))
        self.code_counts.copy_(torch.where(is_dead, mean_count, self.code_counts))
        if self.ema_decay is not None:
            self.code_sums.copy_(torch.where(is_dead[:, None], candidates * mean_count, self.code_sums))

    def _normalized(self, vectors: Tensor, dim: int = -1) -> Tensor:
        """Normalise where codes have unit norm."""
        return F.normalize(vectors, dim=dim, eps=self.epsilon) if self.has_unit_codes else vectors
