"""Sums and lists over all processes of a run, where there are several."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def num_connected_processes() -> int:
    """Return the number of processes."""
    return rank_and_world_size()[1]


def all_reduced(tensor: Tensor) -> Tensor:
    """Sum a tensor in place over all processes, where there are several, and return it."""
    if num_connected_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gathered(tensor: Tensor) -> Tensor:
    """Put the tensors of all processes, of one shape everywhere, one after the other along the first dimension."""
    if num_connected_processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(num_connected_processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
