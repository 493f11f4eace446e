"""The codebook: nearest-code search, updates by gradient or moving average, and revival of dead codes.

VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937) and its EMA update (appendix A.1; Razavi et al. 2019).
Legend: N feature vectors, V codes, C code channels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from nextblock.data.keyed_random import keyed_uniform

# One chunk of the N×V score matrix in bytes: small enough for a core's cache on a CPU, large enough to fill a GPU.
_CPU_CHUNK_BYTES = 1 << 20
_GPU_CHUNK_BYTES = 1 << 28
# Fewer scores than this are not worth another thread.
_THREAD_WORK_BYTES = 1 << 24
# Recorded batches are kept until the codebook's update, so a loop that forgets it would fill the memory.
MAX_PENDING = 1024


def full_precision(tensor: Tensor, *others: Tensor) -> Tensor:
    """Upcast half types to float32, and anything to float64 where an operand already is.

    Args:
        tensor: floating point, any shape.
        others: tensors whose precision the result must not fall under.

    Returns:
        The tensor in float32 or float64.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return tensor.to(dtype)


def moved_unhalved(fn, tensor: Tensor) -> Tensor:
    """Apply a module's cast or move, except that a tensor cast to a half type only follows to the new device.

    Args:
        fn: what `nn.Module._apply` applies to every tensor.
        tensor: one of the module's tensors.
    """
    moved = fn(tensor)
    return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved


def nearest_codes(features: Tensor, codes: Tensor) -> Tensor:
    """Find the nearest code of each feature vector by squared Euclidean distance, in chunks.

    Args:
        features: (N, C) floating point.
        codes: (V, C) of the same dtype.

    Returns:
        (N,) int64 indices; of equally near codes the lowest index.
    """
    # |z − e|² = |z|² − 2 z·e + |e|², and |z|² is the same for every code.
    return _best_codes(features, codes, codes.square().sum(1), alpha=-2.0)


def most_similar_codes(features: Tensor, codes: Tensor, epsilon: float) -> Tensor:
    """Find the code of largest cosine with each feature vector, in chunks.

    Args:
        features: (N, C) floating point.
        codes: (V, C) of the same dtype.
        epsilon: smallest norm that is divided by.

    Returns:
        (N,) int64 indices; of equally similar codes the lowest index.
    """
    codes = F.normalize(codes, dim=1, eps=epsilon)
    # A feature's own norm scales all of its cosines alike, so only the codes need normalising.
    return _best_codes(F.normalize(features, dim=1, eps=epsilon), codes, codes.new_zeros(len(codes)), alpha=-1.0)


def _best_codes(features: Tensor, codes: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """Return argmin_v of offsets[v] + alpha · features·codes[v] without the whole N×V matrix."""
    indices = torch.empty(len(features), dtype=torch.int64, device=features.device)
    # Offsets as one more channel: adding them afterwards would be one more pass over the scores.
    features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    codes_t = torch.cat([alpha * codes, offsets[:, None]], dim=1).t().contiguous()
    if features.device.type == "cpu":
        _search_on_threads(features, codes_t, indices.numpy())
        return indices
    rows = max(1, _GPU_CHUNK_BYTES // (len(codes) * features.element_size()))
    scores = features.new_empty(min(rows, len(features)), len(codes))
    for chunk, best in zip(features.split(rows), indices.split(rows), strict=True):
        torch.argmin(torch.mm(chunk, codes_t, out=scores[: len(chunk)]), dim=1, out=best)
    return indices


def _search_on_threads(features: Tensor, codes_t: Tensor, indices: np.ndarray) -> None:
    """Write the best column of features·codes_t for each row, in parallel where that is worth it."""
    row_bytes = codes_t.shape[1] * codes_t.element_size()
    num_cores = torch.get_num_threads()
    num_threads = max(1, min(num_cores, len(features) * row_bytes // _THREAD_WORK_BYTES))
    rows = max(1, min(len(features), _CPU_CHUNK_BYTES // row_bytes))
    starts = range(0, len(indices), rows)
    # One iterator for all threads: each takes a chunk when it is done with its last one.
    chunks = iter([(features[start : start + rows], indices[start : start + rows]) for start in starts])
    if num_threads == 1:
        _search_chunks(chunks, rows, codes_t)
        return
    # Each thread multiplies by itself: threads of threads would wait for each other.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads) as executor:
            shares = [executor.submit(_search_chunks, chunks, rows, codes_t) for _ in range(num_threads)]
            for share in shares:
                share.result()
    finally:
        torch.set_num_threads(num_cores)


@torch.no_grad()
def _search_chunks(chunks: Iterator[tuple[Tensor, np.ndarray]], rows: int, codes_t: Tensor) -> None:
    """Write the best column of each row of chunks of equal length, of which the last may be shorter."""
    scores = codes_t.new_empty(rows, codes_t.shape[1])
    array = scores.numpy()
    # Threads wait for each other at the interpreter's lock, so what is between the two calls must be little.
    for chunk, best in chunks:
        if len(best) < rows:
            scores, array = scores[: len(best)], array[: len(best)]
        torch.mm(chunk, codes_t, out=scores)
        # numpy's argmin is vectorised, torch's takes five times as long; both take the first of equals.
        array.argmin(1, best)


def _rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def num_connected_processes() -> int:
    """Return the number of processes."""
    return _rank_and_world_size()[1]


def all_reduced(tensor: Tensor) -> Tensor:
    """Sum a tensor in place over all processes, where there are several, and return it."""
    if num_connected_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


class Codebook(nn.Module):
    """A table of V code vectors that stays in float32 (or float64) whatever the model is cast to.

    Args:
        num_embeddings: V.
        embedding_dim: C.
        epsilon: Laplace smoothing of the moving average's counts, and the smallest norm that is divided by.
        ema_decay: None trains the codes by gradient; a decay in (0, 1) replaces the gradient by a moving average of
            the features assigned to each code.
        is_normalized: whether codes are compared by cosine.
        revival_threshold: a code is dead, and moves onto a feature of the last batch, once its moving-average count
            falls under this share of the mean count; 0 revives none.
        init_scale: codes start uniform in ±init_scale; None means 1/V.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        epsilon: float = 1e-5,
        ema_decay: float | None = None,
        is_normalized: bool = False,
        revival_threshold: float = 0.0,
        init_scale: float | None = None,
    ):
        super().__init__()
        self.epsilon = epsilon
        self.ema_decay = ema_decay
        self.is_normalized = is_normalized
        self.revival_threshold = revival_threshold
        self.init_scale = 1.0 / num_embeddings if init_scale is None else init_scale
        weight = torch.empty(num_embeddings, embedding_dim, dtype=torch.float32)
        if ema_decay is None:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("code_sums", torch.empty_like(weight))
        if ema_decay is not None or revival_threshold > 0:
            self.register_buffer("code_counts", torch.empty(num_embeddings, dtype=torch.float32))
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.weight.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes uniformly in ±init_scale and start the moving averages on them."""
        init.uniform_(self.weight, -self.init_scale, self.init_scale)
        self._restart_averages()

    @torch.no_grad()
    def initialize_from(self, features: Tensor, seed: int) -> None:
        """Set every code to one of the given features.

        Args:
            features: (N, C); V of them are picked, without repetition where N ≥ V.
            seed: the pick's key.
        """
        V, N = self.num_embeddings, len(features)
        order = keyed_uniform(seed, samples=torch.arange(N)).argsort()
        picked = order[torch.arange(V) % N].to(features.device)
        self.weight.copy_(features[picked])
        self._restart_averages()

    def _restart_averages(self) -> None:
        """Let every code start as if it had been used once a batch, by itself."""
        # transformers' initialisers leave tensors alone that from_pretrained has just loaded.
        if self.ema_decay is not None:
            init.copy_(self.code_sums, self.weight)
        if hasattr(self, "code_counts"):
            init.ones_(self.code_counts)

    def search(self, features: Tensor) -> Tensor:
        """Return the index of the code for each feature vector, (N, C) → (N,) int64."""
        with torch.no_grad():
            codes = self.weight.to(features.dtype)
            if self.is_normalized:
                return most_similar_codes(features, codes, self.epsilon)
            return nearest_codes(features, codes)

    def lookup(self, idx: Tensor) -> Tensor:
        """Return the code vectors of the indices, (…) → (…, C)."""
        return F.embedding(idx, self.weight)

    def record(self, features: Tensor, idx: Tensor) -> None:
        """Remember which features took which codes until the next `update`.

        Args:
            features: (B, L, C) of this process's part of the batch.
            idx: (B, L) int64.

        Raises:
            RuntimeError: if `update` has long not been called.
        """
        if self.ema_decay is None and self.revival_threshold == 0:
            return
        if len(self._pending) >= MAX_PENDING:
            raise RuntimeError(
                f"{MAX_PENDING} training passes were recorded without an update of the codebook; "
                "call update_codebook after each optimizer step"
            )
        self._pending.append((features.detach().flatten(0, 1), idx.flatten()))

    @torch.no_grad()
    def update(self, *keys: int) -> None:
        """Apply what was recorded since the last call: moving averages first, then revival of dead codes.

        All processes must call it together; sums are taken over all of them, so codes stay equal everywhere.

        Args:
            keys: integers such as (seed, step) that choose which features revived codes take.
        """
        if not self._pending:
            return
        features = torch.cat([pending[0] for pending in self._pending])
        idx = torch.cat([pending[1] for pending in self._pending])
        self._pending.clear()
        decay = 0.99 if self.ema_decay is None else self.ema_decay
        counts = torch.bincount(idx, minlength=self.num_embeddings).to(self.weight.dtype)
        self.code_counts.lerp_(all_reduced(counts), 1 - decay)
        if self.ema_decay is not None:
            sums = torch.zeros_like(self.weight).index_add_(0, idx, features.to(self.weight.dtype))
            self.code_sums.lerp_(all_reduced(sums), 1 - decay)
            self._set_weight_from_averages()
        if self.revival_threshold > 0:
            self._revive(features, *keys)

    def _set_weight_from_averages(self) -> None:
        """Divide sums by counts; Laplace smoothing keeps an unused code from dividing by zero."""
        total = self.code_counts.sum()
        smoothed = (self.code_counts + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
        self.weight.copy_(self.code_sums / smoothed[:, None])

    def _revive(self, features: Tensor, *keys: int) -> None:
        """Move dead codes onto features of the global batch, picked by keys and not by a process's generator."""
        V, N = self.num_embeddings, len(features)
        rank, world_size = _rank_and_world_size()
        draws = keyed_uniform(*keys, samples=torch.arange(V, device=features.device))
        rows = (draws * (N * world_size)).long() - rank * N
        is_here = (rows >= 0) & (rows < N)
        candidates = features[rows.clamp(0, N - 1)].to(self.weight.dtype) * is_here[:, None]
        candidates = all_reduced(candidates)
        mean_count = self.code_counts.mean()
        is_dead = self.code_counts < self.revival_threshold * mean_count
        self.weight.copy_(torch.where(is_dead[:, None], candidates, self.weight))
        self.code_counts.copy_(torch.where(is_dead, mean_count, self.code_counts))
        if self.ema_decay is not None:
            self.code_sums.copy_(torch.where(is_dead[:, None], candidates * mean_count, self.code_sums))

    def _apply(self, fn, recurse=True):
        """Move with the model, but refuse its half types: distances and averages need float32."""
        return super()._apply(lambda tensor: moved_unhalved(fn, tensor), recurse)
