"""How a job uses its CPU: so many threads, and memory that the C library keeps for the next tensor."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# More threads than any machine has cores make the libraries below run out of memory, which ends the process.
MAX_THREADS = 1024
# Names and values of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors, from now on and at the price of never giving it back.

    By default glibc returns large blocks to the system at once, and the next tensor of that size pays for each of its
    pages again: two fifths of the time of a convolutional encoder on the CPU.

    Returns:
        Whether it took effect, which needs glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # No threshold is large enough for the feature maps of a batch, so no block may be mapped by itself.
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


@contextmanager
def fixed_threads(num_threads: int) -> Iterator[None]:
    """Compute with so many CPU threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
