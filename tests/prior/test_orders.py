"""Orders: what is one, which a training draws, and that known tokens come first."""

from types import SimpleNamespace

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import SamplingOptions
from nextblock.prior.orders import (
    OrderConfig,
    check_orders,
    in_block_order,
    in_order,
    sampling_orders,
    training_orders,
)


def taking_orders(num_tokens: int, takes_orders: bool = True):
    """What `sampling_orders` asks of a prior."""
    layout = BlockLayout.tiles(1, (1, num_tokens))
    return SimpleNamespace(takes_orders=takes_orders, layout=layout, device=torch.device("cpu"))


def test_the_share_of_random_orders_is_one_then_falls_to_zero():
    config = OrderConfig(random_until_step=4, raster_from_step=8)
    assert [config.random_share(step) for step in range(10)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert OrderConfig().random_share(0) == 0
    at_once = OrderConfig(random_until_step=3, raster_from_step=3)
    assert [at_once.random_share(step) for step in range(5)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("steps", [(-1, 3), (4, 3)])
def test_steps_that_are_no_course_are_refused(steps):
    with pytest.raises(ValueError, match=f"random_until_step is {steps[0]} and raster_from_step {steps[1]}; expected"):
        OrderConfig(random_until_step=steps[0], raster_from_step=steps[1])


def test_training_orders_are_a_function_of_seed_step_and_sample():
    config, samples = OrderConfig(random_until_step=10, raster_from_step=20), torch.arange(600)
    orders = training_orders(config, 5, 0, 3, samples)
    check_orders(orders, 600, 5)
    assert orders.unique(dim=0).shape[0] == 120
    # Every token comes first as often as any other.
    assert (torch.bincount(orders[:, 0], minlength=5) - 120).abs().max() < 40
    picked = torch.tensor([577, 4, 4])
    assert torch.equal(training_orders(config, 5, 0, 3, picked), orders[picked])
    for other in (training_orders(config, 5, 0, 4, samples), training_orders(config, 5, 1, 3, samples)):
        assert (other != orders).any(1).float().mean() > 0.95


def test_the_share_of_a_steps_samples_is_random_and_the_others_are_raster():
    config = OrderConfig(random_until_step=0, raster_from_step=100)
    orders = training_orders(config, 30, 0, 75, torch.arange(2000))
    assert (orders != torch.arange(30)).any(1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert training_orders(config, 30, 0, 100, torch.arange(5)) is None


def test_known_tokens_come_first_in_the_order_asked_for():
    prior, given = taking_orders(5), torch.tensor([[-1, 7, -1, 3, -1], [2, -1, -1, -1, 0]])
    assert sampling_orders(prior, "raster", given, 2).tolist() == [[1, 3, 0, 2, 4], [0, 4, 1, 2, 3]]
    assert sampling_orders(prior, (4, 3, 2, 1, 0), given, 2).tolist() == [[3, 1, 4, 2, 0], [4, 0, 3, 2, 1]]
    assert sampling_orders(prior, (4, 3, 2, 1, 0), None, 2).tolist() == [[4, 3, 2, 1, 0]] * 2
    assert sampling_orders(prior, "raster", None, 2) is None
    assert sampling_orders(taking_orders(5, takes_orders=False), "raster", given, 2) is None


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3)])
def test_values_go_into_an_order_and_back(shape):
    values, orders = torch.rand(shape), torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]])
    ordered = in_order(values, orders)
    assert torch.equal(ordered[0, 0], values[0, 2]) and torch.equal(ordered[1, 0], values[1, 3])
    assert torch.equal(in_block_order(ordered, orders), values)
    assert in_order(values, None) is values and in_block_order(values, None) is values


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([[0, 1, 2]], "orders is a list"),
        (torch.tensor([[0, 1, 2]] * 3), r"orders is torch.int64 \(3, 3\); expected torch.int64 \(2, 3\)"),
        (torch.tensor([[0.0, 1.0, 2.0]] * 2), "orders is torch.float32"),
        (torch.tensor([[0, 1, 2], [0, 2, 2]]), r"orders\[1\] is \[0, 2, 2\]; expected .* permutation of 0 to 2"),
        (torch.tensor([[-1, 0, 1], [0, 1, 2]]), r"orders\[0\] is \[-1, 0, 1\]"),
    ],
)
def test_orders_that_are_no_permutations_are_refused(orders, message):
    with pytest.raises(ValueError, match=message):
        check_orders(orders, 2, 3)


@pytest.mark.parametrize("order", [[2, 0, 1], torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1]).numpy(), (2, 0, 1)])
def test_an_order_may_be_a_list_an_array_or_a_tensor(order):
    assert SamplingOptions(order=order).order == (2, 0, 1)
    assert SamplingOptions(order=order) == SamplingOptions().changed(order=order)
    assert SamplingOptions(order=range(2, -1, -1)).order == (2, 1, 0)


@pytest.mark.parametrize("order", ["spiral", [], [1, 2], [0, 0], [0.0, 1.0], [True, False], None, 3, [[0, 1]], "012"])
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ValueError, match="order is .*; expected 'raster', or a permutation of the tokens"):
        SamplingOptions(order=order)


def test_guidance_over_k_of_all_blocks_stays_below_its_scale_and_power_zero_is_constant():
    options = SamplingOptions(guidance_scale=5.0, guidance_schedule="power-cosine-open", guidance_power=1.0)
    assert options.scales(4) == pytest.approx([1, 1 + 4 * (1 - 0.5**0.5) / 2, 3, 1 + 4 * (1 + 0.5**0.5) / 2])
    assert options.scales(1) == [1]
    constant = options.changed(guidance_power=0)
    assert constant.scales(3) == [5, 5, 5] and constant.scales(1) == [5]
    steep = options.changed(guidance_power=1e3)
    assert steep.scales(4) == pytest.approx([1, 1, 1, 1])
    for schedule in ("constant", "linear", "power-cosine"):
        with pytest.raises(ValueError, match="guidance_power is 0; expected a number from 0.001 to 1000"):
            options.changed(guidance_power=0, guidance_schedule=schedule)


def test_families_of_blocks_refuse_orders_by_name(make_prior, make_quantizer):
    layout, labels = BlockLayout.tiles(1, 3), torch.tensor([0, 2])
    model, idx = make_prior(layout, input_embedding="tokens"), torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="orders is given; expected None for BlockPrior, which predicts"):
        model(idx[:, :-1], labels, idx, orders=torch.arange(9).expand(2, -1))
    with pytest.raises(ValueError, match=r"order is \(1, 0.*; expected 'raster' for BlockPrior"):
        model.generate(labels, make_quantizer(layout), order=[1, 0, *range(2, 9)])
