"""Tokenizers on disk and in other precisions: nothing is lost on the way, and the quantizer stays in float32."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from nextblock.tokenizer import VQVAE, VQVAEConfig

EMA = {"codebook_update": "ema", "revival_threshold": 0.2}
updates = pytest.mark.parametrize("options", [{}, EMA], ids=["gradient", "ema with revival"])


def train_a_little(model, pixel_values):
    """Move every parameter and buffer away from where it started."""
    model.train()
    for step in range(2):
        model(pixel_values).vq_loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.update_codebook(0, step)
    return model.eval()


def assert_same_tensors(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@updates
def test_a_saved_model_comes_back_equal_in_every_tensor(options, layout_options, make_vqvae, make_images, tmp_path):
    model = make_vqvae(**options, **layout_options)
    pixel_values = make_images(model)
    train_a_little(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert not loaded.training
    assert_same_tensors(model.state_dict(), loaded.state_dict())
    assert_same_tensors(dict(model.named_buffers()), dict(loaded.named_buffers()))
    assert loaded.layout == model.layout
    assert loaded.config.image_size == model.config.image_size
    with torch.no_grad():
        expected, output = model(pixel_values), loaded(pixel_values)
    assert torch.equal(output.reconstruction, expected.reconstruction)
    assert torch.equal(output.vq_loss, expected.vq_loss)
    # The next update starts from the same averages.
    for each in (model, loaded):
        each.train()(pixel_values)
        each.update_codebook(0, 2)
    assert_same_tensors(model.state_dict(), loaded.state_dict())


def test_the_moving_averages_are_in_the_file(make_vqvae, tmp_path):
    make_vqvae(image_size=16, **EMA).save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("quantizer.codebook")}
    assert names == {f"quantizer.codebook.{part}" for part in ("weight", "code_sums", "code_counts")}


def test_auto_classes_find_the_tokenizer(make_vqvae, make_images, tmp_path):
    model = make_vqvae(image_size=[16, 24], layout="scales", scales=[1, [2, 3], [4, 6]])
    model.save_pretrained(tmp_path)
    config, loaded = AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(config) is VQVAEConfig and type(loaded) is VQVAE
    assert config.block_layout() == model.layout
    assert_same_tensors(model.state_dict(), loaded.state_dict())


def test_building_a_model_draws_its_codes_as_configured(make_vqvae):
    model = make_vqvae(image_size=16, codebook_init_scale=0.3, hidden_dim=32)
    weight = model.quantizer.codebook.weight
    assert 0.28 < weight.abs().max() <= 0.3
    # torch's own bound for a convolution, 1/sqrt(fan in): neither zeros nor one normal distribution for all.
    for name in ("encoder.0", "encoder.2"):
        kernel = model.get_submodule(name).weight
        bound = kernel[0].numel() ** -0.5
        assert 0.95 * bound < kernel.abs().max() <= bound


def test_a_gradient_codebook_goes_on_as_moving_average(make_vqvae, make_images, tmp_path):
    model = make_vqvae(image_size=16)
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path, codebook_update="ema", revival_threshold=0.1)
    codebook = loaded.quantizer.codebook
    assert torch.equal(codebook.weight, model.quantizer.codebook.weight)
    assert torch.equal(codebook.code_sums, codebook.weight)
    assert torch.equal(codebook.code_counts, torch.ones(24))
    assert [name for name, _ in loaded.named_parameters() if name.startswith("quantizer")] == []


def islands(model) -> set[torch.dtype]:
    return {tensor.dtype for name, tensor in model.state_dict().items() if name.startswith("quantizer.")}


def others(model) -> set[torch.dtype]:
    return {tensor.dtype for name, tensor in model.state_dict().items() if not name.startswith("quantizer.")}


@updates
def test_half_precision_spares_the_quantizer(options, layout_options, make_vqvae, make_images, tmp_path):
    model = make_vqvae(**options, **layout_options)
    pixel_values = make_images(model)
    model.save_pretrained(tmp_path)
    for half in (
        VQVAE.from_pretrained(tmp_path, dtype=torch.bfloat16),
        VQVAE.from_pretrained(tmp_path).to(torch.bfloat16),
        VQVAE.from_pretrained(tmp_path).bfloat16(),
        AutoModel.from_pretrained(tmp_path, dtype="bfloat16"),
    ):
        assert islands(half) == {torch.float32} and others(half) == {torch.bfloat16}
        quantizer = half.quantizer.state_dict()
        assert_same_tensors(model.quantizer.state_dict(), quantizer)
        output = half(pixel_values)
        assert output.reconstruction.dtype == torch.bfloat16
        assert output.vq_loss.dtype == torch.float32
        # Indices are the float32 quantizer's of what the half-precision encoder gave.
        idx_Bl = model.layout.split(model.quantizer.indices(half.encode(pixel_values).float()))
        assert all(torch.equal(a, b) for a, b in zip(output.idx_Bl, idx_Bl, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(half.img_to_idxBl(pixel_values), idx_Bl, strict=True))
        assert half.idxBl_to_var_input(idx_Bl).dtype == torch.float32
        assert half.idxBl_to_img(idx_Bl).dtype == torch.bfloat16


def test_a_half_precision_model_survives_saving(make_vqvae, tmp_path):
    model = make_vqvae(image_size=16, **EMA).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert islands(loaded) == {torch.float32} and others(loaded) == {torch.bfloat16}
    assert_same_tensors(model.state_dict(), loaded.state_dict())


@updates
def test_autocast_runs_the_quantizer_in_float32(options, layout_options, make_vqvae, make_images):
    model = make_vqvae(**options, **layout_options).train()
    pixel_values = make_images(model, batch=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encode(pixel_values)
        assert features.dtype == torch.bfloat16
        output = model(pixel_values)
        idx_Bl = model.img_to_idxBl(pixel_values)
        var_input = model.idxBl_to_var_input(idx_Bl)
    assert islands(model) == {torch.float32}
    assert output.vq_loss.dtype == var_input.dtype == torch.float32
    quantized, vq_loss, idx_BL = model.quantizer(features.float())
    expected = model.layout.split(idx_BL)
    assert all(torch.equal(a, b) for a, b in zip(output.idx_Bl, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(idx_Bl, expected, strict=True))
    assert torch.equal(output.vq_loss, vq_loss)
    assert torch.equal(var_input, model.idxBl_to_var_input(idx_Bl))
    (output.reconstruction.float().square().mean() + output.vq_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
