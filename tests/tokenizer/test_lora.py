"""PEFT adapters on a tokenizer's convolutions: all are trained, and merging changes nothing."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

AUTOENCODERS = {
    "simple": {"autoencoder": "simple", "hidden_dim": 32, "num_res_blocks": 1},
    "vqgan": {
        "autoencoder": "vqgan",
        "hidden_dim": 32,
        "width_multipliers": [1, 1],
        "num_res_blocks": 1,
        "z_channels": 4,
        "quant_conv_kernel_size": 3,
    },
}
SCALES = {"image_size": 16, "layout": "scales", "scales": [1, 2, 4], "num_phi": 3}


@pytest.mark.parametrize("options", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_every_convolution_can_have_an_adapter(options, make_vqvae, make_images):
    options = SCALES | options
    if options["autoencoder"] == "vqgan":
        options["scales"] = [1, 2, 8]
    model = make_vqvae(**options)
    pixel_values = make_images(model)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert {name.split(".")[0] for name in targets} >= {"encoder", "decoder", "quantizer"}
    torch.manual_seed(1)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets)).train()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    output = peft_model(pixel_values)
    (output.reconstruction.square().mean() + output.vq_loss).backward()
    gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(targets)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    peft_model.eval()
    with torch.no_grad():
        features = peft_model.encode(pixel_values)
        assert not torch.allclose(features, model.encode(pixel_values), atol=1e-3)
        idx_Bl = peft_model.img_to_idxBl(pixel_values)
        images = peft_model.idxBl_to_img(idx_Bl)
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged.encode(pixel_values), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.idxBl_to_img(idx_Bl), images, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == model.state_dict().keys()
