"""A tokenizer with NaN or infinity somewhere says where, and makes neither indices nor pictures of it."""

import pytest
import torch

from nextblock.tokenizer import VQVAE, VectorQuantizer

BAD = pytest.mark.parametrize("bad", [torch.nan, torch.inf])


def poison(tensor: torch.Tensor, bad: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = bad


@BAD
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_features_are_refused_at_quantization(layout_options, metric, bad, make_vqvae, make_images):
    model = make_vqvae(**layout_options, codebook_metric=metric)
    images = make_images(model)
    poison([*model.encoder.parameters()][-1], bad)
    message = "quantization: the feature map has .* values NaN or infinite"
    for use in (model.img_to_idx, model.img_to_idxBl, model, lambda x: model.initialize_codebook(x, 0)):
        with pytest.raises(ValueError, match=message):
            use(images)
    # A training loop has its own guard.
    assert not model.train()(images).reconstruction.isfinite().all()


@BAD
@pytest.mark.parametrize("name", ["codebook.weight", "codec.phi.0.weight"])
def test_codes_are_refused_at_loading_and_at_quantization(name, bad, make_vqvae, make_images, tmp_path):
    model = make_vqvae(image_size=16, layout="scales", scales=[1, 2, 4], num_phi=1)
    poison(model.quantizer.get_parameter(name), bad)
    message = f"quantization: {name} has 1 of .* values NaN or infinite"
    with pytest.raises(ValueError, match=message):
        model.img_to_idx(make_images(model))
    model.save_pretrained(tmp_path)
    for options in ({}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match=message):
            VQVAE.from_pretrained(tmp_path, **options)


@BAD
def test_images_are_refused_at_decoding(layout_options, bad, make_vqvae, make_images):
    model = make_vqvae(**layout_options)
    idx_Bl = model.img_to_idxBl(make_images(model))
    poison([*model.decoder.parameters()][-1], bad)
    with pytest.raises(ValueError, match="decoding: the image has .* values NaN or infinite"):
        model.idxBl_to_img(idx_Bl)
    poison(model.quantizer.codebook.weight, bad)
    idx_Bl[-1][:] = model.config.vocab_size - 1
    with pytest.raises(ValueError, match="decoding: the quantized map has"):
        model.idxBl_to_img(idx_Bl)


def test_the_plain_quantizer_refuses_too():
    features = torch.zeros(1, 4, 2, 2)
    quantizer = VectorQuantizer(8, 4).eval()
    quantizer(features)
    poison(features, torch.nan)
    with pytest.raises(ValueError, match="quantization: the feature map has 1 of 16 values"):
        quantizer(features)
    assert quantizer.train()(features)[1].isnan()
