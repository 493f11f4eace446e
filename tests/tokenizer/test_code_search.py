"""Nearest-code search against brute force: all metrics, ties, chunks of any size, several threads."""

import threading

import pytest
import torch
from torch.nn import functional as F

from nextblock.tokenizer import code_search
from nextblock.tokenizer.code_search import most_aligned_codes, most_similar_codes, nearest_codes

C = 4


def random_vectors(count: int, channels: int = C, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nearest_by_brute_force(features, codes):
    """Every distance in float64, one code after the other; the first of equals wins."""
    distances = torch.stack([(features.double() - code.double()).square().sum(1) for code in codes], dim=1)
    return distances.argmin(1)


def most_similar_by_brute_force(features, codes):
    cosines = torch.stack([F.cosine_similarity(features.double(), code.double()[None]) for code in codes], dim=1)
    return cosines.argmax(1)


def cosine_search(features, codes):
    return most_similar_codes(features, codes, epsilon=1e-12)


def most_aligned_by_brute_force(features, codes):
    return torch.stack([(features.double() * code.double()).sum(1) for code in codes], dim=1).argmax(1)


SEARCHES = {"euclid": (nearest_codes, nearest_by_brute_force), "cosine": (cosine_search, most_similar_by_brute_force)}
SEARCHES |= {"inner product": (most_aligned_codes, most_aligned_by_brute_force)}
both_searches = pytest.mark.parametrize(("search", "brute_force"), SEARCHES.values(), ids=SEARCHES.keys())


@both_searches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_agrees_with_brute_force(search, brute_force, dtype):
    features, codes = random_vectors(700, 6, 1, dtype), 1.3 * random_vectors(50, 6, 2, dtype)
    idx = search(features, codes)
    assert idx.dtype == torch.int64
    assert torch.equal(idx, brute_force(features, codes))
    assert idx.unique().numel() > 30  # The longest codes have most of the largest products.


@both_searches
@pytest.mark.parametrize("num_features", [1, 2, 5, 64])
def test_equally_near_codes_give_the_lowest_index(search, brute_force, num_features):
    # Small powers of two: every sum and every norm is exact, so ties are ties in any order of summation.
    distinct = torch.tensor([[2.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, -1.0, 0], [0, 0, 0, 8.0]])
    codes = distinct[[1, 0, 1, 2, 0, 3, 3, 2]]
    features = distinct[[3, 1, 0, 2]].repeat(16, 1)[:num_features]
    idx = search(features, codes)
    assert idx.tolist() == ([5, 0, 1, 3] * 16)[:num_features]
    assert torch.equal(idx, brute_force(features, codes))


@both_searches
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_of_any_size_give_the_same_indices(search, brute_force, rows, monkeypatch):
    features, codes = random_vectors(100, 6, 3), random_vectors(20, 6, 4)
    whole = search(features, codes)
    monkeypatch.setattr(code_search, "_CPU_CHUNK_BYTES", rows * len(codes) * 4)
    score_rows, mm = [], torch.mm

    def recording_mm(*args, out):
        score_rows.append(len(out))
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "mm", recording_mm)
    assert torch.equal(search(features, codes), whole)
    assert max(score_rows) == rows and sum(score_rows) == 100


@both_searches
def test_several_threads_give_the_same_indices(search, brute_force, monkeypatch):
    features, codes = random_vectors(200, 6, 3), random_vectors(20, 6, 4).repeat(2, 1)
    monkeypatch.setattr(code_search, "_CPU_CHUNK_BYTES", 8 * len(codes) * 4)
    monkeypatch.setattr(code_search, "_THREAD_WORK_BYTES", 64 * len(codes) * 4)
    calls, mm = [], torch.mm

    def recording_mm(*args, out):
        calls.append((threading.get_ident(), torch.get_num_threads(), len(out)))
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "mm", recording_mm)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with torch.inference_mode():
            idx = search(features.requires_grad_(), codes)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    # 200 rows are enough work for three of the four threads.
    assert sorted(size for _, _, size in calls) == [8] * 25 and {threads for _, threads, _ in calls} == {1}
    assert threading.get_ident() not in {thread for thread, _, _ in calls}
    assert torch.equal(idx, brute_force(features, codes)) and idx.max() < 20


def test_a_budget_smaller_than_one_row_still_searches(monkeypatch):
    features, codes = random_vectors(5, seed=5), random_vectors(8, seed=6)
    monkeypatch.setattr(code_search, "_CPU_CHUNK_BYTES", 1)
    assert torch.equal(nearest_codes(features, codes), nearest_by_brute_force(features, codes))


def test_a_zero_vector_has_a_cosine_too():
    assert cosine_search(torch.zeros(2, C), random_vectors(5)).tolist() == [0, 0]
