"""Conditions and contexts: what is read and refused, nulls, dropping by keys, rows; and tokens that are known."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior.conditioning import ClassCondition, ClassConditions, Context
from nextblock.prior.family import check_given

LAYOUT = BlockLayout.scales([1, 2])


def labels_of(condition) -> list[int]:
    return condition.class_labels.tolist()


# Conditions


def test_labels_and_conditions_are_read_alike():
    conditions, labels = ClassConditions(3, ["a", "b", "c"]), torch.tensor([0, 3, 2])
    for given in (labels, ClassCondition(labels, null_class=3)):
        condition = conditions.of(given)
        assert torch.equal(condition.class_labels, labels) and condition.null_class == 3
        assert condition.has_null and len(condition) == 3
    batch = {"class_labels": labels, "index": torch.arange(3)}
    assert torch.equal(conditions.from_batch(batch).class_labels, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), r"class_labels is \[0, 4\]; expected 0 to 3 \(3: no class\)"),
        (torch.tensor([-1, 0]), r"class_labels is \[-1, 0\]"),
        (torch.tensor([0.0]), r"class_labels is torch.float32 \(1,\); expected torch.int64 \(batch,\)"),
        (torch.tensor([[0]]), r"class_labels is torch.int64 \(1, 1\)"),
    ],
)
def test_labels_that_are_none_are_refused_also_in_a_condition(labels, message):
    for given in (labels, ClassCondition(labels, null_class=3)):
        with pytest.raises(ValueError, match=message):
            ClassConditions(3).of(given)


def test_the_range_is_left_unread_where_that_is_asked():
    assert labels_of(ClassConditions(3).of(torch.tensor([7]), reads_range=False)) == [7]
    with pytest.raises(ValueError, match="class_labels is torch.float32"):
        ClassConditions(3).of(torch.tensor([7.0]), reads_range=False)


def test_rows_nulls_and_padding():
    condition = ClassCondition(torch.tensor([2, 0, 1]), null_class=3)
    assert labels_of(condition.null()) == [3, 3, 3]
    assert labels_of(condition.joined(condition.null())) == [2, 0, 1, 3, 3, 3]
    assert labels_of(condition[1:]) == [0, 1]
    assert labels_of(condition[:2].padded(4)) == [2, 0, 2, 2]
    assert labels_of(condition.padded(3)) == [2, 0, 1]
    moved = condition.to("meta")
    assert moved.class_labels.device.type == "meta" and moved.null_class == 3


def test_without_classes_there_is_no_null_and_nothing_to_drop():
    conditions = ClassConditions(0)
    condition = conditions.of(torch.zeros(4, dtype=torch.int64))
    assert not conditions.has_null and not condition.has_null
    assert condition.dropped(1.0, 0, samples=torch.arange(4)) is condition
    with pytest.raises(AssertionError):
        condition.null()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropped_share_is_the_rate(rate):
    samples = torch.arange(20_000)
    labels = samples % 10
    dropped = ClassCondition(labels, 10).dropped(rate, 0, 1, samples=samples).class_labels
    is_dropped = dropped == 10
    assert dropped.dtype == torch.int64
    assert torch.equal(dropped[~is_dropped], labels[~is_dropped])
    assert abs(is_dropped.double().mean() - rate) < 4 * (rate * (1 - rate) / len(samples)) ** 0.5
    # Every class loses its share, not one class all of it.
    for label in range(10):
        assert abs(is_dropped[labels == label].double().mean() - rate) < 0.05


def test_rates_zero_and_one_are_exact():
    samples = torch.arange(500)
    condition = ClassCondition(samples, 1000)
    assert torch.equal(condition.dropped(0.0, 3, samples=samples).class_labels, samples)
    assert labels_of(condition.dropped(1.0, 3, samples=samples)) == [1000] * 500


def test_drops_depend_on_seed_step_and_sample_only():
    samples = torch.arange(200)
    labels = torch.randint(5, (200,))

    def dropped(seed, step, rows):
        return ClassCondition(labels[rows], 5).dropped(0.3, seed, step, samples=samples[rows]).class_labels == 5

    everything = dropped(0, 0, samples)
    shuffled = torch.randperm(200)
    assert torch.equal(dropped(0, 0, shuffled), everything[shuffled])
    assert torch.equal(torch.cat([dropped(0, 0, rows) for rows in samples.split(33)]), everything)
    torch.manual_seed(123)
    assert torch.equal(dropped(0, 0, samples), everything)
    assert not torch.equal(dropped(1, 0, samples), everything)
    assert not torch.equal(dropped(0, 1, samples), everything)


# Contexts


def test_the_first_rows_of_a_context_are_those_of_all_its_tensors():
    vector, prefix, mask = torch.randn(4, 3), torch.randn(4, 2, 3), torch.rand(4, 2) > 0.5
    modulations = ((torch.randn(4, 1, 3), torch.randn(4, 1, 3)), (torch.randn(4, 1, 3),))
    context = Context(vector=vector, prefix=prefix, prefix_mask=mask, modulations=modulations)
    assert len(context) == 4 and context.first(4) is context
    first = context.first(2)
    assert len(first) == 2
    for name, tensor in {"vector": vector, "prefix": prefix, "prefix_mask": mask}.items():
        assert torch.equal(getattr(first, name), tensor[:2])
    for got, expected in zip(first.modulations, modulations, strict=True):
        assert all(torch.equal(a, b[:2]) for a, b in zip(got, expected, strict=True))
    alone = Context(prefix=prefix)
    assert len(alone) == 4 and alone.first(1).vector is None and len(alone.first(1)) == 1


# A family's partners; quantizers that do not fit are refused in test_generation.py.


def test_known_tokens_that_do_not_fit_are_refused_by_block(make_prior):
    model, given = make_prior(LAYOUT), [torch.full((2, length), -1) for length in LAYOUT.block_lengths]
    check_given(model, given, 2)
    for wrong, message in (
        ([given[0], given[1].clone().fill_(11)], r"given_idx_Bl\[1\] has 2 rows from 11 to 11; expected 2 rows"),
        ([given[0] - 1, given[1]], r"given_idx_Bl\[0\] has 2 rows from -2 to -2; .* from -1 \(to sample\) to 10"),
        (given[:1], "idx_Bl has 1 blocks; expected a list of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_given(model, wrong, 2)
    with pytest.raises(ValueError, match=r"given_idx_Bl\[0\] has 2 rows .*; expected 3 rows"):
        check_given(model, given, 3)
