"""The codebook: search against brute force, moving averages against a slow loop, revival, initialisation, precision."""

import threading

import pytest
import torch
from torch.nn import functional as F

from nextblock.tokenizer import codebook as codebook_module
from nextblock.tokenizer.codebook import Codebook, full_precision, most_similar_codes, nearest_codes

V, C = 9, 4


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


SEARCHES = {"euclid": (nearest_codes, nearest_by_brute_force), "cosine": (cosine_search, most_similar_by_brute_force)}
both_searches = pytest.mark.parametrize(("search", "brute_force"), SEARCHES.values(), ids=SEARCHES.keys())


@both_searches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_agrees_with_brute_force(search, brute_force, dtype):
    features, codes = random_vectors(700, 6, 1, dtype), 1.3 * random_vectors(50, 6, 2, dtype)
    idx = search(features, codes)
    assert idx.dtype == torch.int64
    assert torch.equal(idx, brute_force(features, codes))
    assert idx.unique().numel() > 40


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
    monkeypatch.setattr(codebook_module, "_CPU_CHUNK_BYTES", rows * len(codes) * 4)
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
    monkeypatch.setattr(codebook_module, "_CPU_CHUNK_BYTES", 8 * len(codes) * 4)
    monkeypatch.setattr(codebook_module, "_THREAD_WORK_BYTES", 64 * len(codes) * 4)
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
    monkeypatch.setattr(codebook_module, "_CPU_CHUNK_BYTES", 1)
    assert torch.equal(nearest_codes(features, codes), nearest_by_brute_force(features, codes))


def test_a_zero_vector_has_a_cosine_too():
    assert cosine_search(torch.zeros(2, C), random_vectors(5)).tolist() == [0, 0]


def test_codes_start_uniform_in_one_over_v():
    torch.manual_seed(0)
    weight = Codebook(50, 40).weight.detach()
    assert weight.abs().max() <= 1 / 50
    assert weight.abs().max() > 0.99 / 50
    assert weight.std() == pytest.approx(1 / 50 / 3**0.5, rel=0.05)
    assert Codebook(50, 40, init_scale=0.7).weight.detach().abs().max() == pytest.approx(0.7, rel=0.01)


def test_gradient_codes_are_a_parameter_and_moving_average_codes_a_buffer():
    assert [name for name, _ in Codebook(V, C).named_parameters()] == ["weight"]
    assert dict(Codebook(V, C).named_buffers()) == {}
    assert set(dict(Codebook(V, C, revival_threshold=0.1).named_buffers())) == {"code_counts"}
    averaged = Codebook(V, C, ema_decay=0.9)
    assert list(averaged.parameters()) == []
    assert set(averaged.state_dict()) == {"weight", "code_sums", "code_counts"}
    assert torch.equal(averaged.code_sums, averaged.weight)
    assert torch.equal(averaged.code_counts, torch.ones(V))


def slow_moving_average(weight, batches, decay, epsilon):
    """Appendix A.1 of VQ-VAE in Python floats, with Laplace smoothing of the counts."""
    num_codes, channels = weight.shape
    counts, sums = [1.0] * num_codes, weight.tolist()
    for features, idx in batches:
        for v in range(num_codes):
            taken = [row for row, i in zip(features.tolist(), idx.tolist(), strict=True) if i == v]
            counts[v] = decay * counts[v] + (1 - decay) * len(taken)
            for c in range(channels):
                sums[v][c] = decay * sums[v][c] + (1 - decay) * sum(row[c] for row in taken)
    total = sum(counts)
    smoothed = [(n + epsilon) / (total + num_codes * epsilon) * total for n in counts]
    codes = [[s / n for s in row] for row, n in zip(sums, smoothed, strict=True)]
    return torch.tensor(codes, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_moving_average_update_against_a_slow_loop(epsilon):
    codebook = Codebook(V, C, ema_decay=0.8, epsilon=epsilon, init_scale=1.0).double()
    start = codebook.weight.clone()
    batches = []
    for step in range(3):
        features = random_vectors(40, seed=step, dtype=torch.float64)
        idx = torch.randint(V - 2, (40,), generator=torch.Generator().manual_seed(step))  # two codes stay unused
        batches.append((features, idx))
        codebook.record(features.view(2, 20, C), idx.view(2, 20))
        codebook.update(0, step)
    weight, counts = slow_moving_average(start, batches, 0.8, epsilon)
    torch.testing.assert_close(codebook.weight, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(codebook.code_counts, counts, rtol=1e-12, atol=1e-12)
    assert (codebook.weight[: V - 2] - start[: V - 2]).abs().min() > 1e-3


def test_epsilon_keeps_a_code_finite_that_is_never_used():
    codebook = Codebook(V, C, ema_decay=0.01, epsilon=1e-5, init_scale=1.0)
    for step in range(60):
        codebook.record(random_vectors(20, seed=step)[None], torch.zeros(1, 20, dtype=torch.int64))
        codebook.update()
    assert codebook.code_counts[1:].max() == 0
    assert codebook.weight.isfinite().all()


def test_micro_batches_recorded_one_by_one_equal_the_whole_batch():
    whole, parts = (Codebook(V, C, ema_decay=0.9, revival_threshold=0.5) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    features, idx = random_vectors(60).view(6, 10, C), torch.randint(V - 3, (6, 10))
    whole.record(features, idx)
    for rows in (slice(0, 2), slice(2, 6)):
        parts.record(features[rows], idx[rows])
    whole.update(3, 1)
    parts.update(3, 1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


def test_update_without_a_record_changes_nothing_and_a_record_counts_once():
    codebook = Codebook(V, C, ema_decay=0.9)
    codebook.record(random_vectors(10)[None], torch.zeros(1, 10, dtype=torch.int64))
    codebook.update()
    after = {name: tensor.clone() for name, tensor in codebook.state_dict().items()}
    codebook.update()
    for name, tensor in codebook.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def used_and_dead(ema_decay, keys=(0, 0), threshold=0.3):
    """Codes 0 to 5 take ten features each, 6 to 8 none, for one update that starts from counts of 1."""
    torch.manual_seed(0)
    codebook = Codebook(V, C, ema_decay=ema_decay, revival_threshold=threshold, init_scale=1.0)
    features, idx = random_vectors(60), torch.arange(6).repeat(10)
    codebook.code_counts[6:] = 0.01
    before = codebook.weight.detach().clone()
    codebook.record(features.view(3, 20, C), idx.view(3, 20))
    codebook.update(*keys)
    return codebook, before, features


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_dead_codes_move_onto_features_and_alive_ones_stay(ema_decay):
    codebook, before, features = used_and_dead(ema_decay)
    unrevived, _, _ = used_and_dead(ema_decay, threshold=1e-9)
    alive = slice(0, 6)
    assert torch.equal(codebook.weight[alive], unrevived.weight[alive])
    assert torch.equal(codebook.code_counts[alive], unrevived.code_counts[alive])
    for code in codebook.weight[6:]:
        assert (features == code).all(1).any()
    assert not (codebook.weight[6:] == before[6:]).all(1).any()
    mean_count = unrevived.code_counts.mean()
    assert torch.equal(codebook.code_counts[6:], mean_count.expand(3))
    if ema_decay is None:
        assert torch.equal(codebook.weight[alive], before[alive])
    else:
        torch.testing.assert_close(codebook.code_sums[6:] / mean_count, codebook.weight[6:])


def test_nothing_is_revived_at_threshold_zero():
    codebook, _, features = used_and_dead(0.5, threshold=0.0)
    assert not (features[:, None] == codebook.weight[None, 6:]).all(2).any()


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_revival_depends_on_its_keys_alone(ema_decay):
    first, _, _ = used_and_dead(ema_decay, keys=(1, 2))
    torch.rand(17)
    second, _, _ = used_and_dead(ema_decay, keys=(1, 2))
    other, _, _ = used_and_dead(ema_decay, keys=(1, 3))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight[6:], other.weight[6:])


def test_revived_codes_spread_over_the_batch():
    codebook = Codebook(200, 1, revival_threshold=0.5)
    features = torch.arange(1000.0)[:, None]
    codebook.code_counts[1:] = 0
    codebook.record(features[None], torch.zeros(1, 1000, dtype=torch.int64))
    codebook.update(5)
    revived = codebook.weight.detach()[1:, 0]
    assert revived.unique().numel() > 150
    assert revived.min() < 50 and revived.max() > 950
    assert revived.mean() == pytest.approx(500, abs=75)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_initialisation_picks_distinct_features(ema_decay):
    codebook, features = Codebook(V, C, ema_decay=ema_decay, revival_threshold=0.1), random_vectors(30)
    codebook.initialize_from(features, seed=1)
    picked = (features[None] == codebook.weight[:, None]).all(2)
    assert picked.sum(1).tolist() == [1] * V
    assert picked.sum(0).max() == 1
    assert torch.equal(codebook.code_counts, torch.ones(V))
    if ema_decay is not None:
        assert torch.equal(codebook.code_sums, codebook.weight)
    first = codebook.weight.detach().clone()
    codebook.initialize_from(features, seed=1)
    assert torch.equal(codebook.weight, first)
    codebook.initialize_from(features, seed=2)
    assert not torch.equal(codebook.weight, first)


def test_initialisation_from_fewer_features_than_codes_uses_them_all():
    codebook, features = Codebook(V, C), random_vectors(4)
    codebook.initialize_from(features, seed=0)
    uses = (features[None] == codebook.weight[:, None]).all(2).sum(0)
    assert sorted(uses.tolist()) == [2, 2, 2, 3]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_half_types_leave_the_codebook_in_float32(ema_decay, cast):
    codebook = Codebook(V, C, ema_decay=ema_decay, revival_threshold=0.1)
    before = {name: tensor.clone() for name, tensor in codebook.state_dict().items()}
    getattr(codebook, cast)()
    codebook.to(getattr(torch, cast))
    for name, tensor in codebook.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, before[name]), name
    assert {tensor.dtype for tensor in codebook.double().state_dict().values()} == {torch.float64}


@pytest.mark.parametrize(
    ("dtype", "other", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_full_precision_raises_half_types_and_lowers_nothing(dtype, other, result):
    assert full_precision(torch.ones(2, dtype=dtype), torch.ones(1, dtype=other)).dtype == result
