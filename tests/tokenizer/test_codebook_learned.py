"""The learned codebook: metrics, unit codes, moving averages against a slow loop, revival, initialisation."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.tokenizer import VQVAE, LearnedCodebook, VQVAEConfig

V, C = 9, 4


def random_vectors(count: int, channels: int = C, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_codes_start_uniform_in_one_over_v():
    torch.manual_seed(0)
    weight = LearnedCodebook(50, 40).weight.detach()
    assert weight.abs().max() <= 1 / 50
    assert weight.abs().max() > 0.99 / 50
    assert weight.std() == pytest.approx(1 / 50 / 3**0.5, rel=0.05)
    assert LearnedCodebook(50, 40, init_scale=0.7).weight.detach().abs().max() == pytest.approx(0.7, rel=0.01)


def test_gradient_codes_are_a_parameter_and_moving_average_codes_a_buffer():
    assert [name for name, _ in LearnedCodebook(V, C).named_parameters()] == ["weight"]
    assert dict(LearnedCodebook(V, C).named_buffers()) == {}
    assert set(dict(LearnedCodebook(V, C, revival_threshold=0.1).named_buffers())) == {"code_counts"}
    averaged = LearnedCodebook(V, C, ema_decay=0.9)
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
    codebook = LearnedCodebook(V, C, ema_decay=0.8, epsilon=epsilon, init_scale=1.0).double()
    start = codebook.weight.clone()
    batches = []
    for step in range(3):
        features = random_vectors(40, seed=step, dtype=torch.float64)
        idx = torch.randint(V - 2, (40,), generator=torch.Generator().manual_seed(step))  # two codes stay unused
        batches.append((features, idx))
        codebook.record(features.view(2, 20, C), idx.view(2, 20))
        codebook.after_step(0, step)
    weight, counts = slow_moving_average(start, batches, 0.8, epsilon)
    torch.testing.assert_close(codebook.weight, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(codebook.code_counts, counts, rtol=1e-12, atol=1e-12)
    assert (codebook.weight[: V - 2] - start[: V - 2]).abs().min() > 1e-3


def test_epsilon_keeps_a_code_finite_that_is_never_used():
    codebook = LearnedCodebook(V, C, ema_decay=0.01, epsilon=1e-5, init_scale=1.0)
    for step in range(60):
        codebook.record(random_vectors(20, seed=step)[None], torch.zeros(1, 20, dtype=torch.int64))
        codebook.after_step()
    assert codebook.code_counts[1:].max() == 0
    assert codebook.weight.isfinite().all()


def test_micro_batches_recorded_one_by_one_equal_the_whole_batch():
    whole, parts = (LearnedCodebook(V, C, ema_decay=0.9, revival_threshold=0.5) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    features, idx = random_vectors(60).view(6, 10, C), torch.randint(V - 3, (6, 10))
    whole.record(features, idx)
    for rows in (slice(0, 2), slice(2, 6)):
        parts.record(features[rows], idx[rows])
    whole.after_step(3, 1)
    parts.after_step(3, 1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


def test_update_without_a_record_changes_nothing_and_a_record_counts_once():
    codebook = LearnedCodebook(V, C, ema_decay=0.9)
    codebook.record(random_vectors(10)[None], torch.zeros(1, 10, dtype=torch.int64))
    codebook.after_step()
    after = {name: tensor.clone() for name, tensor in codebook.state_dict().items()}
    codebook.after_step()
    for name, tensor in codebook.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def used_and_dead(ema_decay, keys=(0, 0), threshold=0.3):
    """Codes 0 to 5 take ten features each, 6 to 8 none, for one update that starts from counts of 1."""
    torch.manual_seed(0)
    codebook = LearnedCodebook(V, C, ema_decay=ema_decay, revival_threshold=threshold, init_scale=1.0)
    features, idx = random_vectors(60), torch.arange(6).repeat(10)
    codebook.code_counts[6:] = 0.01
    before = codebook.weight.detach().clone()
    codebook.record(features.view(3, 20, C), idx.view(3, 20))
    codebook.after_step(*keys)
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


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_codes_by_gradient_count_with_their_own_decay(decay):
    sizes = {"image_size": 8, "hidden_dim": 8, "vocab_size": V, "embedding_dim": C}
    model = VQVAE(VQVAEConfig(**sizes, codebook_ema_decay=decay, revival_threshold=1e-9))
    codebook = model.quantizer.codebook
    codebook.record(random_vectors(4), torch.tensor([0, 0, 0, 1]))
    model.update_codebook(0, 0)
    torch.testing.assert_close(codebook.code_counts[:3], decay + (1 - decay) * torch.tensor([3.0, 1.0, 0.0]))


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
    codebook = LearnedCodebook(200, 1, revival_threshold=0.5)
    features = torch.arange(1000.0)[:, None]
    codebook.code_counts[1:] = 0
    codebook.record(features[None], torch.zeros(1, 1000, dtype=torch.int64))
    codebook.after_step(5)
    revived = codebook.weight.detach()[1:, 0]
    assert revived.unique().numel() > 150
    assert revived.min() < 50 and revived.max() > 950
    assert revived.mean() == pytest.approx(500, abs=75)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_initialisation_picks_distinct_features(ema_decay):
    codebook, features = LearnedCodebook(V, C, ema_decay=ema_decay, revival_threshold=0.1), random_vectors(30)
    codebook.start_from(features, seed=1)
    picked = (features[None] == codebook.weight[:, None]).all(2)
    assert picked.sum(1).tolist() == [1] * V
    assert picked.sum(0).max() == 1
    assert torch.equal(codebook.code_counts, torch.ones(V))
    if ema_decay is not None:
        assert torch.equal(codebook.code_sums, codebook.weight)
    first = codebook.weight.detach().clone()
    codebook.start_from(features, seed=1)
    assert torch.equal(codebook.weight, first)
    codebook.start_from(features, seed=2)
    assert not torch.equal(codebook.weight, first)


def test_initialisation_from_fewer_features_than_codes_uses_them_all():
    codebook, features = LearnedCodebook(V, C), random_vectors(4)
    codebook.start_from(features, seed=0)
    uses = (features[None] == codebook.weight[:, None]).all(2).sum(0)
    assert sorted(uses.tolist()) == [2, 2, 2, 3]


# Metrics and unit codes


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("has_unit_codes", [False, True])
def test_assignment_lookup_and_table_agree(metric, has_unit_codes):
    torch.manual_seed(0)
    codebook = LearnedCodebook(50, C, metric=metric, has_unit_codes=has_unit_codes, init_scale=1.0)
    vectors = random_vectors(60).view(3, 20, C)
    idx = codebook.assign(vectors)
    assert idx.shape == (3, 20) and idx.unique().numel() > 15
    table = F.normalize(codebook.weight, dim=1) if has_unit_codes else codebook.weight
    assert torch.equal(codebook.get_codebook(), table)
    assert torch.equal(codebook.lookup(idx), table[idx])
    compared, codes = codebook.compared(vectors.flatten(0, 1))
    if metric == "cosine":
        torch.testing.assert_close(compared, F.normalize(vectors.flatten(0, 1), dim=1))
        torch.testing.assert_close(codes, F.normalize(codebook.weight, dim=1))
    assert torch.equal(torch.cdist(compared, codes).argmin(1), idx.flatten())
    prepared = codebook.prepare(vectors.mT)
    assert torch.equal(prepared, F.normalize(vectors.mT, dim=1) if has_unit_codes else vectors.mT)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_codes_learn_by_gradient_or_average_and_what_composes_them_always_by_gradient(ema_decay):
    codebook = LearnedCodebook(V, C, ema_decay=ema_decay, beta=0.4)
    features, quantized = random_vectors(6).view(1, C, 2, 3), random_vectors(6, seed=1).view(1, C, 2, 3)
    error = (features - quantized).square().mean().item()
    alone, composed = (codebook.loss_terms(features, quantized, is_composed=c) for c in (False, True))
    assert [term.item() for term in alone] == pytest.approx([0.4 * error, error][: 2 if ema_decay is None else 1])
    assert [term.item() for term in composed] == pytest.approx([0.4 * error, error])
