"""Settling DDP's gradient buckets before the first step. What it is for, on three processes: test_kill.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nextblock.training.buckets import settle_gradient_buckets


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_buckets_are_final_before_the_first_backward_pass_and_nothing_else_changes(process_group):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    before, wrapped = copy.deepcopy(model.state_dict()), DistributedDataParallel(model)
    random_state = torch.get_rng_state()
    assert not wrapped.reducer._rebuild_buckets()  # Nothing to go by yet.
    settle_gradient_buckets([wrapped])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.module.state_dict().items())
    assert wrapped.module is model and all(parameter.grad is None for parameter in model.parameters())
    assert wrapped.reducer._rebuild_buckets() and not wrapped.reducer._rebuild_buckets()
    # As under gradient accumulation: the first pass of a step sums nothing.
    with wrapped.no_sync():
        wrapped(torch.ones(5, 3)).sum().backward()
    wrapped(torch.ones(5, 3)).sum().backward()
    assert model[3].weight.grad.abs().sum() > 0


def test_models_without_buckets_are_left_alone():
    settle_gradient_buckets([nn.Linear(2, 2)])
