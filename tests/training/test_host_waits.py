"""Steps of both trainings and blocks of sampling never wait for a GPU: nothing is asked of it, nothing copied to it."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from nextblock.evaluation.codebook import code_counts, codebook_curves
from nextblock.prior.building import build_prior
from nextblock.prior.families import OPTIONS
from nextblock.prior.generation import generate_blocks
from nextblock.prior.head_plan import HEAD_KINDS
from nextblock.prior.orders import OrderConfig
from nextblock.prior.sampling import SamplingOptions, draw_uniforms
from nextblock.prior.task import BlockPriorOptions, PriorTask, PriorTrainConfig
from nextblock.prior.training_data import PriorData
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.adversarial import DiscriminatorConfig
from nextblock.tokenizer.codec_scales import drawn_num_scales
from nextblock.tokenizer.losses import TokenizerLossConfig, assignment_entropy
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, VQVAEOptions, build_tokenizer
from nextblock.training.accelerator import build_accelerator
from nextblock.training.guards import StepGuard
from nextblock.training.loop import _build_average, _on_device, _Training
from nextblock.training.loop_config import LoopConfig
from nextblock.training.recorder import Recorder

from ..host_waits import META, HostWaits

LAYOUTS = {
    "scales": {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2},
    "raster": {"layout": "tiles", "tile": 1},
    "quadrants": {"layout": "tiles", "tile": 2},
}
LOOP = {"num_steps": 10, "gradient_accumulation_steps": 2, "cpu": True, "mixed_precision": "no", "tracker": None}


@pytest.fixture(autouse=True)
def fingerprint_of_no_values(monkeypatch):
    """Let a prior be built for a tokenizer whose weights have no values."""
    monkeypatch.setattr("nextblock.prior.building.model_fingerprint", lambda tokenizer: "0" * 64)


@pytest.fixture
def on_meta(monkeypatch, fresh_accelerate, tmp_path):
    """Build an accelerator whose device has no values."""
    # Fused optimizers have kernels for this device, which their constructor does not know.
    module = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])

    def build(loop: LoopConfig):
        accelerator = build_accelerator(loop, tmp_path)
        for state in (PartialState, AcceleratorState):
            monkeypatch.setitem(state._shared_state, "device", META)
        assert accelerator.device == META
        return accelerator

    return build


def take_steps(accelerator, task, loop: LoopConfig, batch: dict, folder) -> list[str]:
    """Take steps as `fit` does, and return what was waited for after the first, which makes what is kept."""
    average = _build_average(accelerator, task.model, decay=0.9)
    recorder = Recorder(accelerator, folder, 0)
    guard = StepGuard(accelerator, task.modules, task.optimizers, max_steps=3, first_step=0, checkpoints=folder)
    training = _Training(accelerator, task, loop, "", average, {}, recorder, guard, folder)
    with guard:
        for step in range(2):
            micro_batches = range(loop.gradient_accumulation_steps)
            with HostWaits() as waits:
                training._step([_on_device(batch, accelerator.device) for _ in micro_batches], step)
                if step == 0:
                    waits.found.clear()
    assert recorder._sums and average.num_updates == 2
    return waits.found


def tokenizer_run(layout: str, loss: str, folder, **loop) -> TokenizerTrainConfig:
    """Return the run of a tokenizer with a discriminator."""
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24}
    update = {"codebook_update": "ema", "revival_threshold": 0.3} if loss == "hinge" else {"has_unit_codes": True}
    adversary = {"weight": 0.5, "loss": loss, "num_layers": 1, "base_width": 4, "norm": "group"}
    return TokenizerTrainConfig(
        output_dir=str(folder),
        model=VQVAEOptions(**sizes, **LAYOUTS[layout], **update),
        loss=TokenizerLossConfig(entropy_weight=0.1),
        discriminator=DiscriminatorConfig(**adversary, lecam_weight=0.1, r1_weight=0.1, r1_every=1),
        loop=LoopConfig(**LOOP | loop),
    )


def prior_run(layout: str, loss_chunk_size: int | None = None, **loop) -> tuple[PriorTrainConfig, VQVAE]:
    """Return a prior's run and its tokenizer."""
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24}
    tokenizer = VQVAE(VQVAEConfig(**sizes, **LAYOUTS[layout])).eval().requires_grad_(False)
    config = PriorTrainConfig(
        tokens="",
        tokenizer="",
        output_dir="",
        pipeline_dir="",
        model=BlockPriorOptions(hidden_size=16, num_layers=1, num_heads=2, drop_path=0.1, dropout=0.1),
        loss_chunk_size=loss_chunk_size,
        loop=LoopConfig(**LOOP | loop),
    )
    return config, tokenizer


def of_rar(config: PriorTrainConfig) -> PriorTrainConfig:
    """Make a run one of RAR, all in random orders."""
    options = OPTIONS["rar"](hidden_size=16, num_layers=1, num_heads=2, dropout=0.1, attention_dropout=0.1)
    return replace(config, model=options, orders=OrderConfig(random_until_step=5, raster_from_step=5))


BITS = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 16, "codebook": "lfq"}


def of_digits(config: PriorTrainConfig, head: str) -> PriorTrainConfig:
    """Make a run one of a prior of digits."""
    return replace(config, model=BlockPriorOptions(hidden_size=16, num_layers=1, num_heads=2, head=head))


@pytest.mark.parametrize(("layout", "loss"), [("scales", "hinge"), ("quadrants", "non_saturating")])
def test_a_tokenizers_step_waits_for_nothing(layout, loss, on_meta, tmp_path):
    config = tokenizer_run(layout, loss, tmp_path)
    accelerator = on_meta(config.loop)
    with META:
        task = TokenizerTask(accelerator, config, build_tokenizer(config), range(100), None)
    assert take_steps(accelerator, task, config.loop, {"pixel_values": torch.zeros(4, 3, 16, 16)}, tmp_path) == []


CODEBOOKS = {
    "fsq": {"codebook": "fsq", "fsq_levels": [3, 2, 2, 2]},
    "bsq": {"codebook": "bsq", "vocab_size": 1 << 20, "embedding_dim": 20, "codebook_digits": [1024, 1024]},
    "simvq": {"codebook": "simvq", "codebook_gradient": "rotation"},
    "gumbel": {"codebook": "gumbel"},
    "inner product": {"codebook_metric": "inner_product", "codebook_gradient": "index"},
    "product by index": {"codebook_digits": [4, 6], "codebook_gradient": "index", "revival_threshold": 0.3},
}


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_no_codebook_waits(kind):
    sizes = {"image_size": 8, "hidden_dim": 1, "embedding_dim": 4, "vocab_size": 24}
    layout = {"layout": "scales", "scales": [1, 2], "num_phi": 1}
    with META:
        quantizer = VQVAE(VQVAEConfig(**sizes | layout | CODEBOOKS[kind])).train().quantizer
        features, index = torch.zeros(4, quantizer.dim, 2, 2, requires_grad=True), torch.arange(4)
    for step in range(2):
        # Only the second time: what is kept is made the first.
        with HostWaits() if step else nullcontext() as waits:
            result, loss, idx_BL = quantizer(features, drawn_num_scales(0.5, 2, 0, step, samples=index))
            (result.sum() + loss + assignment_entropy(quantizer, features, 0.1)).backward()
            quantizer.after_step(0, step)
            counts = code_counts(idx_BL, quantizer.layout.block_lengths, quantizer.num_codes)
            codebook_curves(counts + counts, quantizer.digits)
    assert waits.found == []


@pytest.mark.parametrize(
    ("layout", "kind", "loss_chunk_size"),
    [
        *(("scales", "labels", None), ("raster", "labels", 8), ("quadrants", "pixel_values", None)),
        *(("raster", "rar", None), ("raster", "digits_in_turn", None), ("scales", "masked_digits", 8)),
    ],
)
def test_a_priors_step_waits_for_nothing(layout, kind, loss_chunk_size, on_meta, tmp_path):
    with META:
        config, tokenizer = prior_run(layout, loss_chunk_size)
        config = of_rar(config) if kind == "rar" else config
        if kind in HEAD_KINDS:
            config, tokenizer = of_digits(config, kind), VQVAE(VQVAEConfig(**BITS, **LAYOUTS[layout])).eval()
    accelerator = on_meta(config.loop)
    data = PriorData(train=range(8), heldout=None, collate=None, class_names=["a", "b"])
    with META:
        task = PriorTask(accelerator, config, build_prior(config, tokenizer, data.class_names), tokenizer, data, None)
    batch = {"index": torch.arange(4), "class_labels": torch.tensor([0, 1, 0, 1])}
    batch["labels"] = torch.zeros(4, tokenizer.layout.num_tokens, dtype=torch.int64)
    if kind == "pixel_values":
        batch[kind] = torch.zeros(4, 3, 16, 16)
        del batch["labels"]
    assert take_steps(accelerator, task, config.loop, batch, tmp_path) == []


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("scales", {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 0.9}),
        *(("quadrants", {}), ("raster", {}), ("masked digits", {"top_k": 1})),
    ],
)
def test_sampling_waits_at_its_end_alone(layout, options, monkeypatch):
    with META:
        config, tokenizer = prior_run("quadrants" if layout == "masked digits" else layout)
        if layout == "masked digits":
            config = of_digits(config, "masked_digits")
            tokenizer = VQVAE(VQVAEConfig(**BITS, **LAYOUTS["quadrants"])).eval()
        config = of_rar(config) if layout == "raster" else config
        prior = build_prior(config, tokenizer, ["a", "b"]).eval()
    looked: list = []
    monkeypatch.setattr("nextblock.prior.generation.all_finite", lambda found: looked.append(list(found)) or True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = SamplingOptions(guidance_scale=2.0, guidance_schedule="linear", **options)
    labels = torch.zeros(2, dtype=torch.int64, device=META)
    orders = torch.arange(prior.layout.num_tokens, device=META).expand(2, -1) if layout == "raster" else None
    for _ in range(2):
        looked.clear()
        with HostWaits() as waits:
            L, num_digits = prior.layout.num_tokens, prior.head_plan.num_digits
            uniforms = draw_uniforms(generators, L * num_digits).to(META, non_blocking=True)
            uniforms = uniforms if num_digits == 1 else uniforms.view(-1, L, num_digits)
            condition = prior.conditions.of(labels, reads_range=False)
            with torch.no_grad():
                idx_Bl = generate_blocks(prior, condition, tokenizer.quantizer, options, uniforms, orders=orders)
    assert [idx.shape for idx in idx_Bl] == [(2, length) for length in prior.layout.block_lengths]
    # Only the second time: what is kept of a layout is made the first.
    assert waits.found == [] and len(looked) == 1 and len(looked[0]) == prior.layout.num_blocks


def test_what_a_device_is_waited_for_is_found():
    values, mask = torch.zeros(3, device=META), torch.zeros(3, dtype=torch.bool, device=META)
    for ask in (lambda: values.sum().item(), lambda: bool(mask.any()), lambda: values[mask], mask.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
    with HostWaits() as waits:
        torch.zeros(3).to(META)
        values.copy_(torch.zeros(3))
        values + values.new_tensor(1.0)
        torch.as_tensor([1, 2], device=META)
        values[torch.tensor([0, 1])]
    assert len(waits.found) == 5 and all("test_host_waits.py" in line for line in waits.found), waits.found
    with HostWaits() as waits:
        torch.zeros(3).to(META, non_blocking=True)
        values.copy_(torch.zeros(3), non_blocking=True)
        torch.full((), 2.0, device=META) * values + 1 + torch.tensor(2.0)
        torch.as_tensor(values)
    assert waits.found == []


