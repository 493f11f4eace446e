"""Text features as a condition: what is read and refused, what is null, how they are dropped, joined and padded."""

import pytest
import torch

from nextblock.prior.text_condition import TextCondition, TextConditions

E = 3
TEXTS = TextConditions(text_dim=E, max_positions=6)


def features(*lengths: int, num_positions: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded features and mask; values at padding are not zero."""
    embeds = torch.randn(len(lengths), num_positions, E, generator=torch.Generator().manual_seed(seed))
    return {"text_embeds": embeds, "text_mask": torch.arange(num_positions) < torch.tensor(lengths)[:, None]}


def valid(condition: TextCondition, row: int) -> torch.Tensor:
    """The features of a sample that are seen, in their order."""
    return condition.text_embeds[row][condition.text_mask[row]]


def test_valid_positions_go_to_the_right_wherever_they_lie():
    given = features(2, 4)
    given["text_mask"][1] = torch.tensor([True, False, True, False, True])
    condition = TEXTS.of(given)
    assert condition.text_mask.tolist() == [[False, True, True], [True, True, True]]
    assert torch.equal(valid(condition, 0), given["text_embeds"][0, :2])
    assert torch.equal(valid(condition, 1), given["text_embeds"][1, [0, 2, 4]])
    assert not condition.text_embeds[0, 0].any() and not condition.is_whole
    again = TEXTS.of({"text_embeds": condition.text_embeds, "text_mask": condition.text_mask.long()})
    assert torch.equal(again.text_embeds, condition.text_embeds) and torch.equal(again.text_mask, condition.text_mask)
    assert TEXTS.of(condition) is condition


def test_what_is_not_valid_is_never_kept():
    given = features(2, 4)
    given["text_embeds"][~given["text_mask"]] = torch.nan
    assert TEXTS.of(given).text_embeds.isfinite().all()


def test_without_a_mask_all_is_valid_and_masks_of_numbers_are_read():
    given = features(5, 5)
    for mask in (None, torch.ones(2, 5, dtype=torch.int64)):
        condition = TEXTS.of((given["text_embeds"], mask))
        assert condition.is_whole and torch.equal(condition.text_embeds, given["text_embeds"])
    unread = TEXTS.of(given, reads_range=False)
    assert unread.text_mask.shape == (2, 5) and not unread.is_whole


def test_null_keeps_the_mask_where_the_model_has_the_features():
    condition = TEXTS.of(features(2, 4))
    null = condition.null()
    assert null.is_null.tolist() == [True, True] and not condition.is_null.any()
    assert torch.equal(null.text_mask, condition.text_mask)


def test_null_is_the_features_given_for_no_text():
    empty = torch.full((1, E), 7.0)
    texts = TextConditions(text_dim=E, max_positions=6, null_embeds=empty)
    null = texts.of(features(2, 4)).null()
    assert [valid(null, row).tolist() for row in (0, 1)] == [empty.tolist()] * 2
    longer = TextConditions(text_dim=E, max_positions=6, null_embeds=empty.expand(6, E))
    condition = longer.of(features(2, 4))
    half = condition.dropped(0.5, 1, 2, samples=torch.tensor([3, 5]))
    assert half.is_null.sum() == 1, "another key, where both or none are dropped"
    for row in (0, 1):
        expected = empty.expand(6, E) if half.is_null[row] else valid(condition, row)
        assert torch.equal(valid(half, row), expected)


def test_dropping_depends_on_keys_and_samples_alone():
    samples = torch.arange(200)
    condition = TEXTS.of(features(*[2] * 200))
    dropped = condition.dropped(0.3, 4, 7, samples=samples).is_null
    assert 30 < dropped.sum() < 90
    part = condition[50:].dropped(0.3, 4, 7, samples=samples[50:]).is_null
    assert torch.equal(part, dropped[50:])
    assert not torch.equal(condition.dropped(0.3, 4, 8, samples=samples).is_null, dropped)
    assert not condition.dropped(0.0, 4, 7, samples=samples).is_null.any()
    assert condition.dropped(1.0, 4, 7, samples=samples).is_null.all()
    without = TextConditions(text_dim=E, max_positions=6, has_null=False).of(features(2))
    assert without.dropped(1.0, 4, samples=samples[:1]) is without


def test_conditions_are_joined_sliced_padded_and_moved():
    short, long = TEXTS.of(features(2)), TEXTS.of(features(5, 3, seed=1))
    for joined, order in ((short.joined(long), [0, 1, 2]), (long.joined(short), [2, 0, 1])):
        assert len(joined) == 3 and joined.text_mask.shape == (3, 5) and not joined.is_whole
        rows = [(short, 0), (long, 0), (long, 1)]
        for place, (condition, row) in zip(order, rows, strict=True):
            assert torch.equal(valid(joined, place), valid(condition, row))
    assert short.joined(short).is_whole and short.joined(short.null()).is_null.tolist() == [False, True]
    part = long[1:]
    assert len(part) == 1 and torch.equal(valid(part, 0), valid(long, 1))
    padded = long.padded(4)
    assert len(padded) == 4 and all(torch.equal(valid(padded, row), valid(long, 0)) for row in (2, 3))
    moved = long.to("meta")
    assert {moved.text_embeds.device.type, moved.text_mask.device.type, moved.is_null.device.type} == {"meta"}


def test_a_batch_s_features_are_read():
    batch = features(2, 4) | {"index": torch.arange(2), "labels": torch.zeros(2, 4)}
    condition = TEXTS.from_batch(batch | {"text_embeds": batch["text_embeds"].half()})
    assert condition.text_embeds.dtype == torch.float32  # which no autocast refuses
    assert len(TEXTS.example()) == 1


GOOD = features(2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the condition is NoneType; expected text_embeds and text_mask"),
        (torch.tensor([1]), "the condition is Tensor; expected text_embeds"),
        ({"text_embeds": None}, r"text_embeds is None; expected a floating-point tensor \(batch, positions, 3\)"),
        ({"text_embeds": GOOD["text_embeds"][..., :2]}, r"text_embeds is torch.float32 \(2, 5, 2\); expected"),
        ({"text_embeds": GOOD["text_embeds"].long()}, r"text_embeds is torch.int64 \(2, 5, 3\); expected"),
        ({"text_embeds": GOOD["text_embeds"][0]}, r"text_embeds is torch.float32 \(5, 3\); expected"),
        ({"text_embeds": GOOD["text_embeds"][:, :0]}, r"text_embeds is torch.float32 \(2, 0, 3\); expected"),
        (GOOD | {"text_mask": GOOD["text_mask"][:1]}, r"text_mask is torch.bool \(1, 5\); expected booleans"),
        (GOOD | {"text_mask": GOOD["text_mask"].float()}, r"text_mask is torch.float32 \(2, 5\); expected booleans"),
        (GOOD | {"text_mask": GOOD["text_mask"].tolist()}, "text_mask is a list; expected booleans"),
        (GOOD | {"text_mask": 2 * GOOD["text_mask"].long()}, "text_mask holds 0 to 2; expected 0 and 1"),
        (GOOD | {"text_mask": GOOD["text_mask"] & False}, r"has \[0, 0\] valid positions; expected 1 to 6"),
        (features(7, num_positions=7), r"has \[7\] valid positions; expected 1 to 6"),
        (GOOD | {"text_embeds": GOOD["text_embeds"] / 0}, "text_embeds holds NaN or infinite values at valid"),
        (TextConditions(text_dim=4, max_positions=2).example(), "text_embeds has width 4; expected 3"),
    ],
)
def test_wrong_texts_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        TEXTS.of(given)
