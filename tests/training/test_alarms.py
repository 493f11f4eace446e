"""Alarms about code use: against evenly used codes, and for a block against its own past."""

import pytest

from nextblock.training.alarms import CodeUsage, UsageAlarm, expected_usage

# Ten images a step of 1×1 and 8×8 tokens, 1000 codes.
USAGE = CodeUsage(num_codes=1000, num_tokens=[10, 640])


@pytest.mark.parametrize(("num_tokens", "num_codes"), [(1, 1), (1, 10), (5, 10), (1000, 50), (64, 4096)])
def test_expected_usage_is_that_of_even_draws(num_tokens, num_codes):
    assert expected_usage(num_tokens, num_codes) == pytest.approx(1 - (1 - 1 / num_codes) ** num_tokens)


def test_the_alarm_rings_under_the_threshold_and_then_keeps_silent():
    alarm = UsageAlarm(USAGE, threshold=0.5, cooldown=100)
    pooled, first, second = 1 - 0.999**650, 1 - 0.999**10, 1 - 0.999**640
    names = ["train/codebook/usage", "train/codebook/block_0/usage", "train/codebook/block_1/usage"]
    healthy = dict(zip(names, (0.51 * pooled, 0.51 * first, 0.51 * second), strict=True))
    assert alarm.messages(10, healthy | {"train/loss": 0.0, "eval/codebook/usage": 0.0}) == []
    low = healthy | {names[0]: 0.49 * pooled}
    (message,) = alarm.messages(20, low)
    assert message.startswith("step 20: the codebook uses 23.4% of the codes a batch, where evenly used codes would")
    assert "would reach 47.8%" in message and "model.revival_threshold" in message
    assert alarm.messages(119, low) == []
    (message,) = alarm.messages(119, low | {names[2]: 0.0})
    assert message.startswith("step 119: block 1 of the codebook uses 0.0%")
    assert len(alarm.messages(120, low)) == 1
    assert UsageAlarm(USAGE, None, 100).messages(1, {names[0]: 0.0}) == []
    assert UsageAlarm(None, 0.5, 100).messages(1, {names[0]: 0.0}) == []


def test_a_block_is_measured_by_its_own_past():
    alarm = UsageAlarm(USAGE, threshold=0.5, cooldown=100)
    name = "train/codebook/block_1/usage"
    # Of a possible 47.3 %: a block that never used many codes is no alarm, one that comes to use fewer is.
    assert [alarm.messages(step, {name: value}) for step, value in enumerate((0.02, 0.01, 0.04, 0.02))] == [[]] * 4
    (message,) = alarm.messages(4, {name: 0.019})
    assert "block 1 of the codebook uses 1.9% of the codes a batch, where it has used 4.0% and evenly used" in message
    alarm = UsageAlarm(USAGE, threshold=0.5, cooldown=100)
    attainable = 1 - 0.999**640
    # More than evenly used codes would reach is luck.
    assert alarm.messages(0, {name: 1.0}) == alarm.messages(1, {name: 0.51 * attainable}) == []
    (message,) = alarm.messages(2, {name: 0.49 * attainable})
    assert "where evenly used codes would reach 47.3%" in message
