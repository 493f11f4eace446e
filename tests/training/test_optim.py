"""Schedules against closed forms, and which parameters are decayed."""

import math

import pytest
import torch
from torch import nn

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.optim import OptimizerConfig, build_optimizer, learning_rate_at, set_schedules, weight_decay_at

NUM_STEPS = 21


def rates(num_steps: int = NUM_STEPS, batch_size: int = 8, **options) -> list[float]:
    config = OptimizerConfig(learning_rate=2.0, **options)
    return [learning_rate_at(step, num_steps, batch_size, config) for step in range(num_steps)]


def test_the_cosine_goes_from_the_peak_to_zero():
    expected = [1 + math.cos(math.pi * step / 20) for step in range(NUM_STEPS)]
    assert rates() == pytest.approx(expected)
    assert rates()[0] == 2.0 and rates()[-1] == 0.0


def test_the_linear_decay_stops_at_its_final_ratio():
    expected = [2 * (0.25 + 0.75 * (1 - step / 20)) for step in range(NUM_STEPS)]
    assert rates(schedule="linear", final_lr_ratio=0.25) == pytest.approx(expected)


def test_the_cosine_stops_at_its_final_ratio():
    expected = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 20))) for step in range(NUM_STEPS)]
    assert rates(final_lr_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_warmup_rises_linearly_and_the_decay_starts_at_its_end(schedule):
    warm = rates(schedule=schedule, warmup_steps=5)
    assert warm[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert warm[5] == 2.0
    decay = {
        "constant": lambda progress: 1.0,
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda progress: 1 - progress,
    }[schedule]
    assert warm[5:] == pytest.approx([2 * decay(i / 15) for i in range(16)])


def test_the_warmup_may_start_above_zero():
    warm = rates(schedule="constant", warmup_steps=4, warmup_start_ratio=0.2)
    assert warm[:5] == pytest.approx([0.8, 1.2, 1.6, 2.0, 2.0])


def test_the_peak_is_held_for_a_share_of_the_steps():
    held = rates(schedule="linear", hold_ratio=0.5)
    assert held[:11] == [2.0] * 11
    assert held[11:] == pytest.approx([2 * (1 - i / 10) for i in range(1, 11)])
    assert rates(schedule="linear", hold_ratio=1.0) == [2.0] * NUM_STEPS


def test_the_rate_is_scaled_to_the_batch():
    assert rates(schedule="constant", batch_size=64, learning_rate_batch_size=256) == [0.5] * NUM_STEPS
    warm = rates(schedule="constant", batch_size=512, learning_rate_batch_size=256, warmup_steps=2)
    assert warm[:3] == [2.0, 4.0, 4.0]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 3}, {"warmup_steps": 9, "schedule": "linear"}])
def test_short_trainings_stay_within_the_peak(options):
    for num_steps in (1, 2, 3, 4):
        assert all(0 <= rate <= 2 for rate in rates(num_steps, **options))


def test_weight_decay_follows_a_cosine_or_stays():
    config = OptimizerConfig(weight_decay=0.05, final_weight_decay=0.25)
    decays = [weight_decay_at(step, NUM_STEPS, config) for step in range(NUM_STEPS)]
    assert decays == pytest.approx([0.15 - 0.1 * math.cos(math.pi * step / 20) for step in range(NUM_STEPS)])
    assert weight_decay_at(0, 1, config) == 0.05
    constant = OptimizerConfig(weight_decay=0.05)
    assert {weight_decay_at(step, NUM_STEPS, constant) for step in range(NUM_STEPS)} == {0.05}


def groups_by_name(model: nn.Module, no_decay=()) -> tuple[set[str], set[str]]:
    """Names of the decayed and of the undecayed parameters."""
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), no_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(decayed + undecayed) == len(set(decayed + undecayed))
    return set(decayed), set(undecayed)


def test_the_prior_decays_matrices_and_tables_but_no_positions():
    layout = BlockLayout.scales([1, 2]).to_dict()
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "embedding_dim": 4, "num_classes": 2}
    options = {"use_shared_adaln": True, "use_normalized_attention": True}
    model = BlockPrior(BlockPriorConfig(layout=layout, **sizes, **options))
    decayed, undecayed = groups_by_name(model, model.no_decay)
    assert decayed | undecayed == {name for name, _ in model.named_parameters()}
    positions = {name for name in undecayed if not name.endswith("bias")}
    layer = "blocks.0"
    assert positions == {
        "pos_start",
        "pos_1LC",
        "lvl_embed.weight",
        f"{layer}.ada_gss",
        f"{layer}.attn.scale_mul_1H11",
    }
    assert {"class_emb.weight", "word_embed.weight", "head.weight"} <= decayed
    assert all(dict(model.named_parameters())[name].ndim > 1 for name in decayed)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_the_tokenizer_decays_convolutions_and_no_codes(update):
    scales = {"layout": "scales", "scales": [1, 2], "num_phi": 1}
    model = VQVAE(VQVAEConfig(image_size=8, hidden_dim=4, embedding_dim=4, codebook_update=update, **scales))
    decayed, undecayed = groups_by_name(model, VQVAE.no_decay)
    others = {name for name in undecayed if not name.endswith("bias")}
    assert others == ({"quantizer.codebook.weight"} if update == "gradient" else set())
    assert {"encoder.0.weight", "decoder.2.weight", "quantizer.codec.phi.0.weight"} <= decayed
    assert not any("codebook" in name or name.endswith("bias") for name in decayed)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert groups_by_name(model) == ({"1.weight"}, {"1.bias"})


def test_a_step_without_gradient_shrinks_the_decayed_group_alone():
    model = nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, final_weight_decay=0.3, schedule="constant")
    optimizer = build_optimizer(model, config)
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert set_schedules(optimizer, step, 2, 8, config) == 0.5
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.05) * (1 - 0.15))
    assert torch.equal(model.bias, before["bias"])


def test_defaults_and_errors_name_the_field():
    assert OptimizerConfig().betas == [0.9, 0.95] and OptimizerConfig().betas is not OptimizerConfig().betas
    for field, value, expected in (
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", math.nan, "above 0"),
        ("betas", [0.9], "two numbers"),
        ("betas", [0.9, 1.0], "two numbers"),
        ("weight_decay", -0.1, "at least 0"),
        ("final_weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", 0.0, "above 0"),
        ("warmup_steps", -1, "at least 0"),
        ("schedule", "step", "'constant', 'cosine' or 'linear'"),
        ("final_lr_ratio", 1.5, r"\[0, 1\]"),
        ("warmup_start_ratio", -0.5, r"\[0, 1\]"),
        ("hold_ratio", 2.0, r"\[0, 1\]"),
        ("learning_rate_batch_size", 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=f"{field} is .*{expected}"):
            OptimizerConfig(**{field: value})
