"""The policy of precision: what is raised, what TF32 is allowed to, and what a sharded run computes in which type."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nextblock.training.accelerator import build_accelerator
from nextblock.training.loop_config import LoopConfig
from nextblock.training.precision import full_precision, in_run_precision, set_tf32, without_tf32


@pytest.mark.parametrize(
    ("dtype", "other", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_full_precision_raises_half_types_and_lowers_nothing(dtype, other, result):
    assert full_precision(torch.ones(2, dtype=dtype), torch.ones(1, dtype=other)).dtype == result


@pytest.fixture
def tf32_as_before():
    """Leave the program's switches as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tf32_switches() -> tuple[bool, ...]:
    """Read what is allowed under both of torch's names, which must agree."""
    backends = torch.backends
    read = backends.cudnn.conv.fp32_precision == "tf32", backends.cuda.matmul.fp32_precision == "tf32"
    assert read == (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)
    return read


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_is_left_on_cuda_alone_and_comes_back(is_allowed, tf32_as_before):
    set_tf32(is_allowed)
    assert tf32_switches() == (is_allowed, is_allowed)
    with without_tf32(torch.device("cpu")):
        assert tf32_switches() == (is_allowed, is_allowed)
    with pytest.raises(KeyError), without_tf32(torch.device("cuda")), without_tf32(torch.device("cuda")):
        assert tf32_switches() == (False, False)
        raise KeyError
    assert tf32_switches() == (is_allowed, is_allowed)
    # torch's own default, and one switch alone.
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    with without_tf32(torch.device("cuda")):
        assert tf32_switches() == (False, False)
    assert tf32_switches() == (True, False)


def test_switches_set_by_torchs_newer_names_come_back(tf32_as_before):
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with without_tf32(torch.device("cuda")):
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_autocasts_type_is_taken_where_autocast_is_on():
    tensors = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert all(in_run_precision(tensor) is tensor for tensor in tensors)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [in_run_precision(tensor).dtype for tensor in tensors]
    assert dtypes == [torch.bfloat16, torch.float64, torch.bfloat16]


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_a_sharded_run_gives_and_sums_in_float32(precision, dtype, monkeypatch, fresh_accelerate, tmp_path):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    build_accelerator(LoopConfig(cpu=True, mixed_precision=precision, tracker=None), tmp_path)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == dtype
    if dtype is not None:
        assert policy.reduce_dtype == policy.output_dtype == torch.float32 and not policy.cast_forward_inputs


def test_tf32_needs_a_gpu(fresh_accelerate, tmp_path):
    with pytest.raises(ValueError, match="allows_tf32 is True; expected false on a CPU, which has no TF32"):
        build_accelerator(LoopConfig(cpu=True, allows_tf32=True, tracker=None), tmp_path)
