"""The marks of tests that need a GPU: `make test-gpu` runs them, and skips them with a reason where there is none."""

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
CUDA = torch.device("cuda")
