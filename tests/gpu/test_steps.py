"""On a GPU, steps of both trainings and blocks of sampling never wait for it, and weights stay finite."""

import pytest
import torch

from nextblock.prior.building import build_prior
from nextblock.prior.generation import generate_blocks
from nextblock.prior.sampling import SamplingOptions
from nextblock.prior.task import PriorTask
from nextblock.prior.training_data import PriorData
from nextblock.tokenizer.task import TokenizerTask, build_tokenizer
from nextblock.training.accelerator import build_accelerator
from nextblock.training.guards import StepGuard
from nextblock.training.loop import _build_average, _on_device, _Training
from nextblock.training.loop_config import LoopConfig
from nextblock.training.recorder import Recorder

from ..needs_gpu import CUDA, NEEDS_GPU
from ..training.test_host_waits import LAYOUTS, prior_run, tokenizer_run

pytestmark = NEEDS_GPU
PRECISIONS = ["no", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def _watched(fresh_accelerate):
    """Let the program wait again, whatever a test did."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def take_watched_steps(accelerator, task, loop: LoopConfig, batch: dict, folder) -> None:
    """Take steps as `fit` does; at all but the first two a wait is an error."""
    average = _build_average(accelerator, task.model, loop.ema_decay)
    recorder = Recorder(accelerator, folder, 0)
    guard = StepGuard(accelerator, task.modules, task.optimizers, max_steps=20, first_step=0, checkpoints=folder)
    training = _Training(accelerator, task, loop, "", average, recorder, guard, folder)
    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    with guard:
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
            training._step([_on_device(batch, accelerator.device) for _ in range(2)], step)
        torch.cuda.set_sync_debug_mode("default")
    for tensor in task.model.state_dict().values():
        assert tensor.device.type == "cuda" and tensor.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizers_steps(layout, precision, tmp_path):
    config = tokenizer_run(layout, "hinge", tmp_path, cpu=False, mixed_precision=precision)
    accelerator = build_accelerator(config.loop, tmp_path)
    task = TokenizerTask(accelerator, config, build_tokenizer(config), range(100), None)
    batch = {"pixel_values": torch.rand(4, 3, 16, 16) * 2 - 1}
    take_watched_steps(accelerator, task, config.loop, batch, tmp_path)
    assert task.model.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layout", "loss_chunk_size"), [("scales", None), ("raster", 8), ("quadrants", None)])
def test_a_priors_steps(layout, loss_chunk_size, precision, tmp_path):
    run = prior_run(layout, loss_chunk_size=loss_chunk_size, cpu=False, mixed_precision=precision)
    config, tokenizer = run
    accelerator = build_accelerator(config.loop, tmp_path)
    data = PriorData(train=range(8), heldout=None, collate=None, class_names=["a", "b"])
    task = PriorTask(accelerator, config, build_prior(config, tokenizer, data.class_names), tokenizer, data, None)
    batch = {"index": torch.arange(4), "class_labels": torch.tensor([0, 1, 0, 1])}
    batch["labels"] = torch.randint(24, (4, tokenizer.layout.num_tokens))
    take_watched_steps(accelerator, task, config.loop, batch, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_waits_at_its_end_alone(layout, monkeypatch):
    config, tokenizer = prior_run(layout)
    tokenizer, prior = tokenizer.to(CUDA), build_prior(config, tokenizer, ["a", "b"]).to(CUDA).eval()
    monkeypatch.setattr("nextblock.prior.generation.all_finite", lambda found: True)
    options = SamplingOptions(guidance_scale=2.0, guidance_schedule="linear", top_k=5, top_p=0.9)
    uniforms = torch.rand(2, prior.layout.num_tokens, dtype=torch.float64, device=CUDA)
    condition = prior.conditions.of(torch.zeros(2, dtype=torch.int64, device=CUDA))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        idx_Bl = generate_blocks(prior, condition, tokenizer.quantizer, options, uniforms)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(idx_Bl, dim=1).max() < 24
