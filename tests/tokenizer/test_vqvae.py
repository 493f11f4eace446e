"""The tokenizer's contract for every layout, the origin model, training, statistics, and refusal of bad input."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nextblock.evaluation.codebook import code_counts
from nextblock.tokenizer import VQVAE, ScaleCodec, TileCodec, VectorQuantizer, VQVAEConfig, VQVAEOutput

# The contract


def test_forward_and_indices_agree(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    pixel_values = make_images(model)
    output = model(pixel_values)
    assert isinstance(output, VQVAEOutput)
    assert output.reconstruction.shape == pixel_values.shape
    assert output.vq_loss.shape == () and output.vq_loss.dtype == torch.float32 and output.vq_loss > 0
    idx_Bl = model.img_to_idxBl(pixel_values)
    assert [tuple(idx.shape) for idx in idx_Bl] == [(2, length) for length in model.layout.block_lengths]
    assert all(idx.dtype == torch.int64 for idx in idx_Bl)
    assert all(torch.equal(a, b) for a, b in zip(output.idx_Bl, idx_Bl, strict=True))
    # Images that fell on one code would make every test of indices empty.
    assert torch.cat(idx_Bl, 1).unique().numel() > 3


def test_indices_decode_to_the_reconstruction(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    pixel_values = make_images(model)
    with torch.no_grad():
        output = model(pixel_values)
    images = model.idxBl_to_img(output.idx_Bl)
    torch.testing.assert_close(images, output.reconstruction.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert images.std() > 1e-3


def test_the_codec_follows_the_layout(layout_options, make_vqvae):
    model = make_vqvae(**layout_options)
    expected = ScaleCodec if layout_options.get("layout") == "scales" else TileCodec
    assert type(model.quantizer.codec) is expected
    assert model.quantizer.layout == model.layout == model.config.block_layout()


def test_teacher_forcing_inputs_are_the_ones_met_step_by_step(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    idx_Bl = model.img_to_idxBl(make_images(model))
    canvas, inputs = model.quantizer.start(2), []
    with torch.no_grad():
        for k, idx in enumerate(idx_Bl):
            canvas, next_input = model.quantizer.advance(canvas, idx, k)
            inputs.append(next_input)
    assert inputs.pop() is None
    var_input = model.idxBl_to_var_input(idx_Bl)
    assert var_input.shape == (2, model.layout.num_tokens - model.layout.block_lengths[0], 4)
    assert var_input.dtype == torch.float32
    assert torch.equal(var_input, torch.cat(inputs, 1))
    torch.testing.assert_close(canvas, model.quantizer.idx_to_features(torch.cat(idx_Bl, 1)), rtol=1e-6, atol=1e-6)


def test_teacher_forcing_as_indices_gives_the_tile_before(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    idx_Bl = model.img_to_idxBl(make_images(model))
    if model.layout.is_scales:
        with pytest.raises(ValueError, match="as_indices is True; expected False"):
            model.idxBl_to_var_input(idx_Bl, as_indices=True)
        return
    indices = model.idxBl_to_var_input(idx_Bl, as_indices=True)
    assert indices.dtype == torch.int64
    for k, (start, end) in enumerate(model.layout.bounds[1:], start=1):
        first = model.layout.block_lengths[0]
        assert torch.equal(indices[:, start - first : end - first], idx_Bl[k - 1])
    assert torch.equal(model.quantizer.get_codebook()[indices], model.idxBl_to_var_input(idx_Bl))


def test_one_block_leaves_nothing_to_put_in(make_vqvae, make_images):
    for options in ({"tile": 4}, {"layout": "scales", "scales": [4]}):
        model = make_vqvae(image_size=16, **options)
        idx_Bl = model.img_to_idxBl(make_images(model))
        assert len(idx_Bl) == 1
        assert model.idxBl_to_var_input(idx_Bl).shape == (2, 0, 4)
    model = make_vqvae(image_size=16, tile=4)
    assert model.idxBl_to_var_input(idx_Bl, as_indices=True).shape == (2, 0)
    assert model.idxBl_to_var_input(idx_Bl, as_indices=True).dtype == torch.int64


def test_decoded_images_stay_in_range_and_the_reconstruction_is_not_clamped(make_vqvae, make_images):
    model = make_vqvae(image_size=16, codebook_init_scale=100.0)
    pixel_values = make_images(model)
    images = model.idxBl_to_img(model.img_to_idxBl(pixel_values))
    assert images.min() == -1 and images.max() == 1
    assert model(pixel_values).reconstruction.abs().max() > 1


def test_the_decoders_gradient_reaches_the_encoders_output_unchanged(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options).double()
    features = model.encode(make_images(model, dtype=torch.float64))
    features.retain_grad()
    quantized, _, _ = model.quantizer(features)
    quantized.retain_grad()
    model.decode(quantized).square().sum().backward()
    assert torch.equal(features.grad, quantized.grad)
    assert features.grad.abs().min() > 0
    assert model.encoder[0].weight.grad.abs().max() > 0


def test_float64_works_from_end_to_end(layout_options, make_vqvae, make_images):
    model = make_vqvae(codebook_update="ema", **layout_options).double().train()
    output = model(make_images(model))
    model.update_codebook(0)
    assert output.reconstruction.dtype == output.vq_loss.dtype == torch.float64
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    assert model.idxBl_to_var_input(output.idx_Bl).dtype == torch.float64
    assert model.idxBl_to_img(output.idx_Bl).dtype == torch.float64


def test_indices_and_images_come_without_a_graph(make_vqvae, make_images):
    model = make_vqvae(image_size=16).train()
    idx_Bl = model.img_to_idxBl(make_images(model))
    assert not model.idxBl_to_img(idx_Bl).requires_grad
    assert not model.idxBl_to_var_input(idx_Bl).requires_grad


def test_every_entry_point_wakes_an_offloaded_model(make_vqvae, make_images):
    class CountingHook(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = make_vqvae(image_size=16), CountingHook()
    add_hook_to_module(model, hook)
    idx_Bl = model.img_to_idxBl(make_images(model))
    model.idxBl_to_var_input(idx_Bl)
    model.idxBl_to_img(idx_Bl)
    assert hook.calls == 3


# The origin model


def test_defaults_are_the_origin_model():
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig()).eval()
    config = model.config
    assert (config.vocab_size, config.embedding_dim, config.hidden_dim, config.num_channels) == (16, 64, 128, 3)
    assert model.quantizer.get_codebook().shape == (16, 64)
    assert model.quantizer.get_codebook().abs().max() <= 1 / 16
    assert (model.quantizer.codebook.beta, model.quantizer.codebook.epsilon) == (0.25, 1e-5)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 4} == {
        "encoder.0.weight": (128, 3, 4, 4),
        "encoder.2.weight": (64, 128, 4, 4),
        "decoder.0.weight": (64, 128, 4, 4),
        "decoder.2.weight": (128, 3, 4, 4),
    }
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    weights = model.state_dict()

    def layer(function, x, name):
        return function(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)

    features = layer(F.conv2d, layer(F.conv2d, pixel_values, "encoder.0").relu(), "encoder.2")
    # No ReLU at the end: codes of both signs are reachable.
    assert features.min() < 0 < features.max()
    original = VectorQuantizer(16, 64)
    original.quantizer.codebook.load_state_dict(model.quantizer.codebook.state_dict())
    quantized, loss, flat_idx = original(features)
    decoded = layer(F.conv_transpose2d, layer(F.conv_transpose2d, quantized, "decoder.0").relu(), "decoder.2")
    output = model(pixel_values, return_dict=False)
    assert type(output) is tuple and len(output) == 3
    torch.testing.assert_close(output[0], decoded)
    torch.testing.assert_close(output[1], loss)
    assert torch.equal(torch.cat(output[2], 1).flatten(), flat_idx)


def test_return_dict_false_in_the_configuration_or_the_call(make_vqvae, make_images):
    model = make_vqvae(image_size=16, return_dict=False)
    pixel_values = make_images(model)
    assert type(model(pixel_values)) is tuple
    assert isinstance(model(pixel_values, return_dict=True), VQVAEOutput)
    reconstruction, vq_loss, idx_Bl = make_vqvae(image_size=16)(pixel_values, return_dict=False)
    output = make_vqvae(image_size=16)(pixel_values)
    assert torch.equal(reconstruction, output.reconstruction) and torch.equal(vq_loss, output.vq_loss)
    assert all(torch.equal(a, b) for a, b in zip(idx_Bl, output.idx_Bl, strict=True))


# Training


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_a_few_steps_lower_the_reconstruction_error(layout_options, codebook_update, make_vqvae, make_images):
    model = make_vqvae(codebook_update=codebook_update, codebook_ema_decay=0.8, **layout_options).train()
    pixel_values = make_images(model, batch=4) / 4 + 0.5
    model.initialize_codebook(pixel_values, seed=0)
    optimizer, errors = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(30):
        reconstruction, vq_loss, _ = model(pixel_values, return_dict=False)
        error = F.mse_loss(reconstruction, pixel_values)
        optimizer.zero_grad()
        (error + vq_loss).backward()
        optimizer.step()
        model.update_codebook(0, step)
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


def test_initialisation_from_data_makes_each_code_a_feature(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    pixel_values = make_images(model, batch=8)
    model.initialize_codebook(pixel_values, seed=3)
    codes = model.quantizer.codebook.weight.detach()
    with torch.no_grad():
        features = model.quantizer.training_vectors(model.encode(pixel_values)).flatten(0, 1)
    assert (codes[:, None] == features[None]).all(2).sum(1).tolist() == [1] * 24
    assert codes.unique(dim=0).shape == codes.shape


def test_statistics_describe_each_block(layout_options, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    output = model(make_images(model))
    counts = output.statistics["code_counts"]
    assert counts.shape == (model.layout.num_blocks, 24)
    for k, idx in enumerate(output.idx_Bl):
        histogram = torch.bincount(idx.flatten(), minlength=24)
        assert torch.equal(counts[k], histogram)
        assert output.statistics["block_usage"][k].item() == pytest.approx((histogram > 0).sum().item() / 24)
        p = histogram[histogram > 0] / histogram.sum()
        assert output.statistics["block_perplexity"][k].item() == pytest.approx((-(p * p.log()).sum()).exp().item())


def test_many_blocks_are_pooled_into_one_row(make_vqvae, make_images):
    model = make_vqvae(image_size=[32, 36], tile=1)
    output = model(make_images(model))
    assert model.layout.num_blocks == 72
    histogram = torch.bincount(torch.cat(output.idx_Bl, 1).flatten(), minlength=24)
    assert torch.equal(output.statistics["code_counts"], histogram[None])


# The larger autoencoder


@pytest.mark.parametrize("quant_conv_kernel_size", [1, 3])
def test_vqgan_halves_once_between_levels(make_vqvae, make_images, quant_conv_kernel_size):
    model = make_vqvae(
        image_size=[16, 32],
        autoencoder="vqgan",
        width_multipliers=[1, 2, 2],
        num_res_blocks=1,
        z_channels=6,
        quant_conv_kernel_size=quant_conv_kernel_size,
        tile=[2, 4],
    )
    assert model.config.downsampling == 4
    pixel_values = make_images(model)
    assert model.encode(pixel_values).shape == (2, 4, 4, 8)
    assert model(pixel_values).reconstruction.shape == pixel_values.shape
    assert model.quant_conv.weight.shape == (4, 6, quant_conv_kernel_size, quant_conv_kernel_size)
    names = model.state_dict().keys()
    for side, levels, blocks in (("encoder.down", range(3), 1), ("decoder.up", range(3), 2)):
        for i in levels:
            assert f"{side}.{i}.block.{blocks - 1}.conv1.weight" in names
            assert f"{side}.{i}.block.{blocks}.conv1.weight" not in names
            assert (f"{side}.{i}.attn.0.qkv.weight" in names) == (i == 2)
    assert [f"encoder.down.{i}.downsample.conv.weight" in names for i in range(3)] == [True, True, False]
    assert [f"decoder.up.{i}.upsample.conv.weight" in names for i in range(3)] == [False, True, True]


def test_any_width_can_be_normalised(make_vqvae, make_images):
    model = make_vqvae(
        image_size=8, autoencoder="vqgan", hidden_dim=24, width_multipliers=[1, 2], num_res_blocks=1, tile=2
    )
    assert [level.block[0].norm2.num_groups for level in model.encoder.down] == [4, 8]
    assert model(make_images(model)).reconstruction.isfinite().all()
    published = make_vqvae(image_size=8, num_res_blocks=1, hidden_dim=128)
    assert published.encoder[1].norm1.num_groups == 32


def test_residual_blocks_in_the_simple_autoencoder(make_vqvae, make_images):
    model = make_vqvae(image_size=[16, 24], num_res_blocks=2, dropout=0.5)
    pixel_values = make_images(model)
    assert model.encode(pixel_values).shape == (2, 4, 4, 6)
    assert torch.equal(model(pixel_values).reconstruction, model(pixel_values).reconstruction)
    model.train()
    assert not torch.equal(model(pixel_values).reconstruction, model(pixel_values).reconstruction)


# Bad input


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(2, 3, 16, 20), r"pixel_values has shape \(2, 3, 16, 20\)"),
        (torch.zeros(2, 1, 16, 16), r"pixel_values has shape \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"pixel_values has shape \(3, 16, 16\)"),
        (torch.zeros(2, 16, 16, 3), r"pixel_values has shape \(2, 16, 16, 3\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "pixel_values has dtype torch.uint8; expected floating point"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "pixel_values has dtype torch.int64"),
        (torch.full((2, 3, 16, 16), float("nan")), "pixel_values reaches nan"),
        (torch.full((2, 3, 16, 16), float("-inf")), "pixel_values reaches inf"),
        (torch.full((2, 3, 16, 16), -1.1), r"pixel_values reaches 1.1.*\[-1, 1\]"),
        (torch.full((2, 3, 16, 16), 255.0), r"pixel_values reaches 255.*\[-1, 1\]"),
    ],
)
@pytest.mark.parametrize("entry", ["forward", "img_to_idxBl", "initialize_codebook"])
def test_bad_pixels_are_refused_by_every_entry_point(pixel_values, message, entry, make_vqvae):
    model = make_vqvae(image_size=16)
    call = getattr(model, entry)
    with pytest.raises(ValueError, match=message):
        call(pixel_values, seed=0) if entry == "initialize_codebook" else call(pixel_values)


def test_one_bad_pixel_is_enough_also_in_training(make_vqvae, make_images):
    model = make_vqvae(image_size=16).train()
    pixel_values = make_images(model)
    pixel_values[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="pixel_values reaches nan"):
        model(pixel_values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda idx_Bl: idx_Bl[:-1], "idx_Bl has 3 blocks; expected a list of 4"),
        (lambda idx_Bl: idx_Bl + idx_Bl[:1], "idx_Bl has 5 blocks"),
        (lambda idx_Bl: torch.cat(idx_Bl, 1), "idx_Bl has Tensor"),
        (lambda idx_Bl: [idx_Bl[0], idx_Bl[1][:, :3], *idx_Bl[2:]], r"idx_Bl\[1\] has shape \(2, 3\)"),
        (lambda idx_Bl: [idx.int() for idx in idx_Bl], r"idx_Bl\[0\] has dtype torch.int32"),
        (lambda idx_Bl: [*idx_Bl[:3], idx_Bl[3] * 0 + 24], r"idx_Bl\[3\] spans 24 to 24; expected 0 to 23"),
        (lambda idx_Bl: [idx_Bl[0] * 0 - 1, *idx_Bl[1:]], r"idx_Bl\[0\] spans -1 to -1; expected 0 to 23"),
    ],
)
@pytest.mark.parametrize("entry", ["idxBl_to_img", "idxBl_to_var_input"])
def test_bad_blocks_are_refused_by_every_entry_point(change, message, entry, make_vqvae, make_images):
    model = make_vqvae(image_size=16, tile=2)
    idx_Bl = model.img_to_idxBl(make_images(model))
    with pytest.raises(ValueError, match=message):
        getattr(model, entry)(change(idx_Bl))


# On a device


class HostCopies(TorchDispatchMode):
    """Note what takes a tensor of the host and gives one of the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            self.found += [func for arg in args if isinstance(arg, torch.Tensor) and not arg.is_meta]
        return result


@pytest.mark.parametrize("is_training", [False, True])
def test_nothing_waits_for_a_device_at_every_step(is_training, make_vqvae):
    # A meta tensor stands in for one on a GPU: reading it raises.
    model = make_vqvae(image_size=16, tile=2).to("meta").train(is_training)
    pixel_values, features = torch.empty(2, 3, 16, 16, device="meta"), torch.empty(2, 4, 4, 4, device="meta")
    with HostCopies() as copies:
        for step in range(2):
            model._check_pixels(pixel_values)
            idx_BL = model.quantizer.indices(features, is_checked=False)
            assert model.decode(model.quantizer.idx_to_features(idx_BL)).shape == (2, 3, 16, 16)
            assert model.idx_to_var_input(idx_BL).shape == (2, 12, 4)
            assert code_counts(idx_BL, model.layout.block_lengths, 24).shape == (4, 24)
            if step == 0:
                # Tables of indices come to the device once.
                assert set(copies.found) <= {torch.ops.aten._to_copy.default}
                copies.found.clear()
    assert copies.found == []
    with pytest.raises(ValueError, match="pixel_values has shape"):
        model(pixel_values[:, :2])


def test_decoding_without_gradients_computes_what_training_does():
    """Without gradients, maps lie channels last and activations overwrite their input."""
    torch.manual_seed(0)
    config = VQVAEConfig(
        image_size=32, autoencoder="vqgan", hidden_dim=32, num_res_blocks=1, embedding_dim=8, layout="tiles", tile=1
    )
    tokenizer = VQVAE(config).eval().double()
    quantized = torch.randn(2, 8, *tokenizer.layout.grid, dtype=torch.float64)
    expected = tokenizer.decode(quantized)
    assert expected.requires_grad
    with torch.no_grad():
        images = tokenizer.decode(quantized)
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert torch.allclose(images, expected, rtol=0, atol=1e-12)
