"""Hooks of offloaded models run for methods beside `forward`."""

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from nextblock.training.offload import run_offload_hook


class Arrival(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        module.to(torch.float64)
        return args, kwargs


def test_a_hook_runs_and_a_model_without_one_is_left_alone():
    module = nn.Linear(2, 2)
    run_offload_hook(module)
    assert module.weight.dtype == torch.float32
    run_offload_hook(add_hook_to_module(module, Arrival()))
    assert module.weight.dtype == torch.float64
