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


def test_a_block_that_uses_one_code_rings_where_another_uses_many():
    names = ["train/codebook/block_0/usage", "train/codebook/block_1/usage"]
    one, two = 0.001, 0.002

    def ring(first: float, second: float, step: int = 20, usage: CodeUsage = USAGE) -> list[str]:
        alarm = UsageAlarm(usage, threshold=0.2, cooldown=100)
        return alarm.messages(step, dict(zip(names, (first, second), strict=True)))

    (message,) = ring(one, 0.3)
    assert message.startswith("step 20: block 0 of the codebook uses one code for every image of a batch, while block")
    (message,) = ring(0.008, one)
    assert message.startswith("step 20: block 1 of the codebook uses one code")
    # Nearly one code is little, but something; at the start all may be alike; and a codebook may be small.
    assert ring(0.0011, 0.3) == ring(two, 0.3) == ring(one, 0.3, step=19) == ring(one, 0.007) == []
    small = CodeUsage(num_codes=4, num_tokens=[10, 640])
    assert "one code" in ring(0.25, 0.5, usage=small)[0] and ring(0.25, 0.25, usage=small) == []
    # Two tokens may well be alike.
    assert ring(one, 0.3, usage=CodeUsage(num_codes=1000, num_tokens=[2, 640])) == []
    # Its past is no excuse, but a warning holds for a while.
    alarm = UsageAlarm(USAGE, threshold=0.2, cooldown=100)
    found = [len(alarm.messages(step, {names[0]: one, names[1]: 0.3})) for step in (10, 60, 110, 159, 160)]
    assert found == [0, 1, 0, 0, 1]
