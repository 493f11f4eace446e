"""A RAR prior trained end to end: random orders that fall to raster, exact resumption, two processes, any order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import RARPrior
from nextblock.prior.orders import check_orders
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.sample import SampleConfig, sample
from nextblock.tokenize_images import TokenizeConfig, tokenize
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.train_prior import train

from ..conftest import NO_TRACKER, TINY_PRIOR

L = 16
ORDERS = ["--orders.random_until_step", "2", "--orders.raster_from_step", "5"]
DROPOUT = ["--model.dropout", "0.1", "--model.attention_dropout", "0.1", "--loop.gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def arguments(image_folder, run_here, tmp_path_factory) -> list[str]:
    """What trains a tiny RAR prior for six steps on tokens of 4×4 cells."""
    root = tmp_path_factory.mktemp("raster")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 24, "codebook_init_scale": 1.0}
    VQVAE(VQVAEConfig(layout="tiles", tile=1, **sizes)).save_pretrained(root / "tokenizer")
    images = ["--data.source", "folder", "--data.path", image_folder, "--cpu", "true", "--batch_size", 16]
    folders = ["--tokenizer", root / "tokenizer", "--output_dir", root / "tokens"]
    run_here(tokenize, TokenizeConfig, *images, *folders)
    given = ["--tokens", str(root / "tokens"), "--tokenizer", str(root / "tokenizer"), "--model.family", "rar"]
    return [*TINY_PRIOR, *NO_TRACKER, *given, *ORDERS]


@pytest.fixture(scope="module")
def train_here(run_here, arguments):
    def run(run_dir: Path, *options) -> None:
        run_here(train, PriorTrainConfig, *arguments, *folders(run_dir), *options)

    return run


def folders(run_dir: Path) -> list:
    return ["--output_dir", run_dir, "--pipeline_dir", run_dir / "pipeline"]


@pytest.fixture(scope="module")
def alone(train_here, tmp_path_factory) -> Path:
    """A run on one process, without dropout."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder)
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "pipeline" / "prior" / "model.safetensors")


@pytest.mark.slow
def test_orders_fall_to_raster_and_an_interrupted_training_equals_an_uninterrupted_one(
    train_here, tmp_path, monkeypatch, assert_same_state, read_metrics
):
    whole, broken, seen = tmp_path / "whole", tmp_path / "broken", []
    forward, train_step = RARPrior.forward, PriorTask.train_step

    def noting(self, *args, orders=None, **options):
        if self.training:
            seen.append(orders)
        return forward(self, *args, orders=orders, **options)

    def interrupted(self, micro_batches, step):
        if step == 5:
            raise KeyboardInterrupt
        return train_step(self, micro_batches, step)

    monkeypatch.setattr(RARPrior, "forward", noting)
    train_here(whole, *DROPOUT)
    shares = []
    for orders in seen:
        if orders is not None:
            check_orders(orders, 4, L)
        shares.append(0.0 if orders is None else (orders != torch.arange(L)).any(1).double().mean().item())
    assert len(shares) == 12 and shares[:6] == [1.0] * 6 and 0 < np.mean(shares[6:10]) < 1 and shares[10:] == [0, 0]
    assert len({tuple(row) for orders in seen[:6] for row in orders.tolist()}) == 24
    with monkeypatch.context() as patch:
        patch.setattr(PriorTask, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_here(broken, *DROPOUT)
    train_here(broken, *DROPOUT, "--loop.resume_from_checkpoint", "latest")
    assert_same_state(broken, whole, step=6)
    assert read_metrics(broken) == read_metrics(whole)


@pytest.mark.slow
def test_two_processes_equal_one(run_on_two, arguments, alone, tmp_path, assert_same_state, read_metrics):
    run_on_two(("train-prior", [*arguments, *folders(tmp_path / "run")]), cwd=tmp_path)
    assert_same_state(tmp_path / "run", alone, step=6, atol=1e-4)
    for line, other in zip(read_metrics(tmp_path / "run"), read_metrics(alone), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_loss_in_chunks_and_fine_tuning_lead_to_the_same_and_from_there(train_here, alone, tmp_path):
    train_here(tmp_path / "chunks", "--loss_chunk_size", "37")
    for name, tensor in weights(tmp_path / "chunks").items():
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=0, atol=1e-4, msg=name)
    start = ["--loop.init_from", alone / "pipeline", "--loop.num_steps", 1, "--optimizer.learning_rate", 1e-9]
    train_here(tmp_path / "tuned", *start, "--model.attention_dropout", "0.2")
    for name, tensor in weights(tmp_path / "tuned").items():
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=0, atol=1e-7, msg=name)


@pytest.fixture
def pipe(alone) -> ClassToImagePipeline:
    """The trained pipeline, its logits made far from uniform."""
    pipe = ClassToImagePipeline.from_pretrained(alone / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.prior.lm_head.weight.mul_(30)
        for layer in pipe.prior.blocks:
            layer.adaLN_modulation[1].bias.normal_(generator=torch.Generator().manual_seed(0))
    return pipe


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_painting_sees_all_known_tokens_wherever_they_lie(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), np.zeros((16, 16), dtype=bool)
    mask[:8, 4:] = True
    is_inside = torch.tensor(mask[2::4, 2::4]).flatten()
    known = torch.cat(pipe.reconstruct(image, output_type="latent").images, dim=1)[0]
    options = {"generator": seeds(4), "guidance_scale": 2.0, "num_images_per_label": 2}
    idx = torch.cat(pipe.inpaint(image, mask, ["wren", 0], output_type="latent", **options).images, dim=1)
    assert (idx[:, ~is_inside] == known[~is_inside]).all() and (idx[:, is_inside] != idx[0, is_inside]).any()
    # The last known token, after all that is painted in raster order, has a say in each of them.
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["logits"])
        return tensors

    for change in (0, 1):
        given = torch.where(is_inside, -1, known).repeat(2, 1)
        given[:, -1] = (given[:, -1] + change) % 24
        watched = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["logits"]}
        pipe([1, 1], idx_Bl=pipe.tokenizer.layout.split(given), generator=seeds(2), output_type="latent", **watched)
    num_known = int((~is_inside).sum())
    for step, (before, after) in enumerate(zip(seen[:L], seen[L:], strict=True)):
        assert torch.equal(before, after) == (step < num_known), step


def test_an_order_is_a_calls_or_the_pipelines_own(pipe, tmp_path):
    order = [5, *range(5), *range(6, L)]
    call = {"guidance_scale": 2.0, "output_type": "latent"}
    ordered = torch.cat(pipe([0, 1], order=order, generator=seeds(2), **call).images, 1)
    assert not torch.equal(ordered, torch.cat(pipe([0, 1], generator=seeds(2), **call).images, 1))
    call = {"guidance_scale": 2.0, "output_type": "np"}
    stages = pipe.progressive([0, 1], order=torch.tensor(order), generator=seeds(2), **call)
    whole = pipe([0, 1], order=order, generator=seeds(2), **call).images
    assert len(stages) == L and np.array_equal(stages[-1], whole)
    call["output_type"] = "latent"
    own = ClassToImagePipeline(pipe.tokenizer, pipe.prior, sampling=pipe.sampling.changed(order=order))
    own.save_pretrained(tmp_path / "pipeline")
    loaded = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.sampling.order == tuple(order)
    assert torch.equal(torch.cat(loaded([0, 1], generator=seeds(2), **call).images, 1), ordered)
    in_batches = loaded([0, 1], generator=seeds(2), batch_size=3, **call).images
    assert torch.equal(torch.cat(in_batches, 1), ordered)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return tensors

    stopped = torch.cat(loaded(0, generator=seeds(1), callback_on_step_end=stop, **call).images, 1)[0]
    assert (stopped >= 0).nonzero().flatten().tolist() == [0, 1, 5]


def test_the_command_samples_in_an_order(pipe, run_here, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    given = ["--pipeline", tmp_path / "pipeline", "--num_images_per_label", 1, "--batch_size", 3, "--cpu", "true"]
    order = str(list(reversed(range(L))))
    for name in ("raster", "order", "again"):
        options = [] if name == "raster" else ["--sampling.order", order]
        run_here(sample, SampleConfig, *given, "--output_dir", tmp_path / name, *options)
    images = {name: np.load(tmp_path / name / "images.npz")["arr_0"] for name in ("raster", "order", "again")}
    assert np.array_equal(images["order"], images["again"]) and not np.array_equal(images["order"], images["raster"])
    with pytest.raises(ValueError, match="holds another job, whose order is None; this one has"):
        run_here(sample, SampleConfig, *given, "--output_dir", tmp_path / "raster", "--sampling.order", order)


def test_families_without_orders_refuse_random_ones(prior_arguments, run_here, tmp_path, fresh_accelerate):
    with pytest.raises(ValueError, match="orders is OrderConfig.*; expected the defaults for BlockPrior"):
        run_here(train, PriorTrainConfig, *prior_arguments, *ORDERS, *folders(tmp_path / "run"))


def test_tokens_of_several_cells_are_refused(prior_arguments, run_here, tmp_path, fresh_accelerate):
    with pytest.raises(ValueError, match="layout is .*; expected tiles of one cell"):
        run_here(train, PriorTrainConfig, *prior_arguments, "--model.family", "rar", *folders(tmp_path / "run"))
