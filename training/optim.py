"""Optimizer settings, parameter groups, and learning rate and weight decay as functions of the step."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    learning_rate_batch_size: int | None = None
    """Batch size that `learning_rate` is meant for: another batch size scales it in proportion; null never."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    weight_decay: float = 0.05
    """Decay of matrices, tables and convolutions; biases, norms, positions and codes have none."""
    final_weight_decay: float | None = None
    """Weight decay at the last step, reached along a cosine; null keeps it constant."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null never."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    warmup_start_ratio: float = 0.0
    """Learning rate before the first step of the warmup over the peak."""
    hold_ratio: float = 0.0
    """Share of the steps after the warmup that stay at the peak before the decay."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape of the decay after the warmup."""
    final_lr_ratio: float = 0.0
    """Learning rate at the last step over the peak."""

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; expected two numbers in [0, 1)")
        for name in ("weight_decay", "final_weight_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number of at least 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; expected a number above 0, or null")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected at least 0")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule is {self.schedule!r}; expected 'constant', 'cosine' or 'linear'")
        for name in ("final_lr_ratio", "warmup_start_ratio", "hold_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in [0, 1]")
        if self.learning_rate_batch_size is not None and self.learning_rate_batch_size < 1:
            raise ValueError(
                f"learning_rate_batch_size is {self.learning_rate_batch_size}; expected at least 1, or null"
            )


def learning_rate_at(step: int, num_steps: int, batch_size: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step.

    Args:
        step: number of the step about to be taken, from 0.
        num_steps: length of the training.
        batch_size: samples a step over all processes.
        config: the schedule.
    """
    peak = config.learning_rate
    if config.learning_rate_batch_size is not None:
        peak *= batch_size / config.learning_rate_batch_size
    if step < config.warmup_steps:
        rise = (step + 1) / config.warmup_steps
        return peak * (config.warmup_start_ratio + (1 - config.warmup_start_ratio) * rise)
    if config.schedule == "constant":
        return peak
    rest = max(num_steps - 1 - config.warmup_steps, 1)
    held = config.hold_ratio * rest
    progress = max(step - config.warmup_steps - held, 0) / max(rest - held, 1)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * decay)


def weight_decay_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the weight decay of a step.

    Args:
        step: number of the step about to be taken, from 0.
        num_steps: length of the training.
        config: the schedule.
    """
    if config.final_weight_decay is None:
        return config.weight_decay
    progress = step / max(num_steps - 1, 1)
    change = config.final_weight_decay - config.weight_decay
    return config.weight_decay + change * 0.5 * (1 - math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: OptimizerConfig, no_decay: Collection[str] = ()) -> torch.optim.AdamW:
    """Make AdamW with weight decay on tensors of two dimensions and more.

    Args:
        model: whose trainable parameters are optimized.
        config: rates and decay.
        no_decay: names of further parameters, or of modules they lie in, that are not decayed: what the model's
            class states as its `no_decay`, nothing for a discriminator.

    Returns:
        The optimizer, with a decayed and an undecayed group.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not set(name.split(".")) & set(no_decay)
            groups[is_decayed].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=tuple(config.betas),
        fused=True,
    )


def set_schedules(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, batch_size: int, config: OptimizerConfig
) -> float:
    """Set every group's learning rate and weight decay for a step.

    Args:
        optimizer: from `build_optimizer`, or its prepared wrapper.
        step: number of the step about to be taken, from 0.
        num_steps: length of the training.
        batch_size: samples a step over all processes.
        config: the schedules.

    Returns:
        The learning rate.
    """
    learning_rate = learning_rate_at(step, num_steps, batch_size, config)
    decayed, undecayed = optimizer.param_groups
    decayed["weight_decay"] = weight_decay_at(step, num_steps, config)
    decayed["lr"] = undecayed["lr"] = learning_rate
    return learning_rate
