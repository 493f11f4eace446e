"""Nearest-code search in chunks: the whole matrix of scores never exists.

Legend: N feature vectors, V codes, C code channels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# One chunk of the N×V score matrix in bytes: small enough for a core's cache on a CPU, large enough to fill a GPU.
_CPU_CHUNK_BYTES = 1 << 20
_GPU_CHUNK_BYTES = 1 << 28
# Fewer scores than this are not worth another thread.
_THREAD_WORK_BYTES = 1 << 24


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


def most_aligned_codes(features: Tensor, codes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Find the code of largest inner product with each feature vector, in chunks.

    Args:
        features: (N, C) floating point.
        codes: (V, C) of the same dtype.
        bias: (V,) that is added to the products, if any.

    Returns:
        (N,) int64 indices; of equal products the lowest index.
    """
    return _best_codes(features, codes, codes.new_zeros(len(codes)) if bias is None else -bias, alpha=-1.0)


def as_distances(features: Tensor, codes: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return vectors whose distances are in the order of inner products: one more channel makes up for lengths.

    Args:
        features: (N, C) floating point.
        codes: (V, C) of the same dtype, with gradient.
        bias: (V,) that is added to the products, if any.

    Returns:
        (N, C + 1) and (V, C + 1), of which the nearest code is the one of largest product; squared distances are a
        constant of the feature minus twice the product.
    """
    squares = codes.square().sum(1) if bias is None else codes.square().sum(1) + 2 * bias
    missing = squares.detach().amax() + torch.finfo(codes.dtype).eps - squares
    return F.pad(features, (0, 1)), torch.cat([codes, missing.sqrt()[:, None]], dim=1)


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
