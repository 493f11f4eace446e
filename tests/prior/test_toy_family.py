"""A family from outside the library is trained, exported, loaded and sampled by the library's own means."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from nextblock.data.tokens import TokenDataset, collate_tokens
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior.generation import generate
from nextblock.prior.sampling import SamplingOptions, draw_uniforms, sample_tokens
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.training_data import PriorData
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.loop import fit
from nextblock.training.loop_config import LoopConfig
from nextblock.training.optim import OptimizerConfig

CLASS_NAMES = ["blue tit", "great tit", "wren"]


@pytest.fixture
def toy_family(monkeypatch):
    """The module, importable by its name as an outsider's is."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("toy_family")


@pytest.fixture
def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init_scale": 1.0}
    return VQVAE(VQVAEConfig(layout="tiles", tile=[1, 4], **sizes)).eval().requires_grad_(False)


@pytest.fixture
def make_toy(toy_family, tokenizer):
    def make(num_classes: int = 3, **options):
        torch.manual_seed(1)
        names = CLASS_NAMES if num_classes else None
        config = toy_family.BagConfig(tokenizer.layout.to_dict(), 24, num_classes, names, **options)
        return toy_family.BagPrior(config)

    return make


@pytest.fixture
def config(tmp_path) -> PriorTrainConfig:
    return PriorTrainConfig(
        tokens=str(tmp_path / "tokens"),
        tokenizer=str(tmp_path / "tokenizer"),
        output_dir=str(tmp_path / "run"),
        pipeline_dir=str(tmp_path / "pipeline"),
        optimizer=OptimizerConfig(learning_rate=0.05),
        loop=LoopConfig(num_steps=8, batch_size=8, log_every=1, cpu=True, mixed_precision="no", tracker=None),
        num_pictures_per_class=2,
        sampling=SamplingOptions(guidance_scale=1.5, top_k=20),
    )


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_toy_is_trained_saved_loaded_and_sampled(
    make_toy, tokenizer, config, image_folder, run_here, read_metrics, fresh_accelerate
):
    tokenizer.save_pretrained(config.tokenizer)
    options = ["--tokenizer", config.tokenizer, "--data.source", "folder", "--data.path", image_folder]
    run_here(tokenize, TokenizeConfig, *options, "--output_dir", config.tokens, "--cpu", "true", "--batch_size", 8)
    rows, heldout = (TokenDataset(config.tokens, split) for split in ("train", "test"))
    data = PriorData(train=rows, heldout=heldout, collate=collate_tokens, class_names=CLASS_NAMES)
    model, exported = make_toy(), []

    def export(prior, tokenizer, sampling, recipe, metrics, images):
        assert recipe["steps"] == 8 and metrics["eval/loss"] > 0 and len(images) == 6
        pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=sampling)
        pipe.save_pretrained(config.pipeline_dir, recipe=recipe, metrics=metrics, sample_images=images)
        exported.append({name: tensor.clone() for name, tensor in prior.state_dict().items()})

    accelerator, folder = Accelerator(cpu=True), Path(config.output_dir)
    task = PriorTask(accelerator, config, model, tokenizer, data, export)
    assert fit(accelerator, task, data.train, data.collate, config, folder)
    losses = [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert (folder / "tokens_check.png").is_file() and (folder / "pictures" / "samples_00000008.png").is_file()

    pipe = ClassToImagePipeline.from_pretrained(config.pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.prior).__module__ == "toy_family" and pipe.sampling == config.sampling
    assert all(torch.equal(tensor, exported[0][name]) for name, tensor in pipe.prior.state_dict().items())
    options = {"guidance_scale": 1.5, "guidance_schedule": "linear", "top_k": 12}
    pictures = pipe(["wren", 0], 2, generator=generators(4), output_type="pt", **options).images
    assert pictures.shape == (4, 3, 16, 16)
    idx_Bl = pipe(["wren", 0], 2, generator=generators(4), output_type="latent", **options).images
    stages = pipe.progressive(["wren", 0], 2, generator=generators(4), output_type="pt", **options)
    assert torch.equal(stages[-1], pictures)
    assert all(torch.equal(*pair) for pair in zip(idx_Bl, sampled_slowly(pipe, [2, 2, 0, 0], **options), strict=True))


@torch.no_grad()
def sampled_slowly(pipe, labels: list[int], **options) -> list[torch.Tensor]:
    """Sample from whole forward passes: one for the class and one without, for each block."""
    prior, options = pipe.prior, SamplingOptions(**options)
    layout, B = prior.layout, len(labels)
    idx_BL = torch.zeros(B, layout.num_tokens, dtype=torch.int64)
    uniforms = draw_uniforms(generators(B), layout.num_tokens)
    for k, (start, end) in enumerate(layout.bounds):
        var_input = pipe.tokenizer.idx_to_var_input(idx_BL, as_indices=True)
        both = [prior(var_input, torch.tensor(rows)).logits[:, start:end] for rows in (labels, [3] * B)]
        logits = torch.lerp(both[1], both[0], options.scales(layout.num_blocks)[k])
        idx_BL[:, start:end] = sample_tokens(logits, uniforms[:, start:end], options)
    return layout.split(idx_BL)


def test_a_toy_without_classes_is_sampled_and_not_guided(make_toy, tokenizer):
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=make_toy(num_classes=0).eval())
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(3).images) == 3
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model without classes"):
        pipe(3, guidance_scale=2.0)


def test_a_toys_layers_are_compiled_in_place(make_toy, tokenizer):
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=make_toy().eval())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([0, 1], generator=generators(2), output_type="pt").images
    pipe.compile(backend="eager")
    assert pipe.prior.head._compiled_call_impl is not None
    torch.testing.assert_close(pipe([0, 1], generator=generators(2), output_type="pt").images, expected)


def test_what_a_family_cannot_do_is_refused_by_name(make_toy, tokenizer, config, fresh_accelerate):
    data = PriorData(train=None, heldout=None, collate=collate_tokens, class_names=CLASS_NAMES)
    for changes, message in (
        ({"loss_chunk_size": 5}, "loss_chunk_size is 5; expected null for BagPrior"),
        ({"sampling": SamplingOptions(top_k=25)}, "top_k is 25; expected an integer from 0 .* to 24"),
        ({"sampling": SamplingOptions(is_smooth=True)}, "is_smooth is True; expected False for a tile layout"),
    ):
        with pytest.raises(ValueError, match=message):
            PriorTask(Accelerator(cpu=True), replace(config, **changes), make_toy(), tokenizer, data, export=None)


def test_a_toy_is_generated_from_by_the_free_function(make_toy, tokenizer):
    prior = make_toy().eval()
    condition = prior.conditions.of(torch.tensor([0, 2]))
    idx_Bl = generate(prior, condition, tokenizer.quantizer, SamplingOptions(guidance_scale=2.0), generators(2))
    assert [tuple(idx.shape) for idx in idx_Bl] == [(2, 4)] * 4
