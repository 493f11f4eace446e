"""PEFT adapters on every layer of a prior: all are trained, merge, and sample."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nextblock.data.blocks import BlockLayout
from nextblock.prior.sampling import SamplingOptions

SCALES = BlockLayout.scales([1, 2, 3])
LAYOUTS = {"scales": (SCALES, {}), "tokens": (BlockLayout.tiles(1, 3), {"input_embedding": "tokens"})}
OPTIONS = {
    "plain": {},
    "shared AdaLN": {"use_shared_adaln": True},
    "normalised attention": {"use_normalized_attention": True},
}


@pytest.fixture(params=LAYOUTS)
def layout_and_options(request):
    """A layout, with the options that it needs."""
    return LAYOUTS[request.param]


def adapted(model, **options):
    """Put LoRA on every layer of a copy, its second matrix drawn too: at zero the first would have no gradient."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | options)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return peft_model.double()


def batch_of(model, quantizer, make_indices, teacher_input):
    idx_Bl = make_indices(model.layout)
    return teacher_input(model, quantizer, idx_Bl), torch.tensor([0, 3]), torch.cat(idx_Bl, 1)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_adapter_is_trained_and_merges(
    options, chunk_size, layout_and_options, make_prior, make_quantizer, make_indices, teacher_input
):
    layout, needed = layout_and_options
    model, quantizer = make_prior(layout, **options, **needed), make_quantizer(layout)
    batch = batch_of(model, quantizer, make_indices, teacher_input)
    peft_model = adapted(model).train()
    output = peft_model(*batch, loss_chunk_size=chunk_size)
    output.loss.backward()
    gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(gradients) == 2 * len(linear) and any("mat_qkv" in name for name in linear)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    peft_model.eval()
    with torch.no_grad():
        logits = peft_model(*batch).logits
        assert not torch.allclose(logits, model(*batch).logits, atol=1e-2)
        with peft_model.disable_adapter():
            torch.testing.assert_close(peft_model(*batch).logits, model(*batch).logits, rtol=1e-12, atol=1e-12)
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged(*batch).logits, logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(merged(*batch, loss_chunk_size=chunk_size).loss, output.loss, rtol=1e-10, atol=1e-10)
    assert merged.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_block_by_block_sampling_sees_the_adapters(options, layout_and_options, make_prior, make_quantizer):
    layout, needed = layout_and_options
    model, quantizer = make_prior(layout, **options, **needed), make_quantizer(layout)
    peft_model = adapted(model).eval()

    def sample(prior):
        asked = {"generator": torch.Generator().manual_seed(0), "guidance_scale": 2.0}
        return torch.cat(prior.generate(torch.tensor([0, 1, 2]), quantizer, **asked), 1)

    tokens = sample(peft_model)
    assert not torch.equal(tokens, sample(model))
    assert torch.equal(sample(peft_model.merge_and_unload()), tokens)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_an_adapted_heads_loss_in_chunks_is_that_of_whole_logits(
    label_smoothing, chunk_size, make_prior, make_quantizer, make_indices, teacher_input
):
    model = make_prior(SCALES, label_smoothing=label_smoothing)
    batch = batch_of(model, make_quantizer(SCALES), make_indices, teacher_input)
    batch[2][0, 3], batch[2][1, :5] = -100, -100
    results = []
    for options in ({}, {"loss_chunk_size": chunk_size}):
        peft_model = adapted(model, target_modules=["head", "proj"]).train()
        output = peft_model(*batch, **options)
        (3 * output.loss).backward()
        gradients = [p.grad for p in peft_model.parameters() if p.requires_grad]
        assert not output.token_loss.requires_grad or "loss_chunk_size" not in options
        results.append([output.loss.detach(), output.token_loss.detach(), output.token_correct, *gradients])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_a_head_with_a_hook_is_called(make_prior, make_quantizer, make_indices, teacher_input):
    model = make_prior(SCALES)
    batch = batch_of(model, make_quantizer(SCALES), make_indices, teacher_input)
    model.head.register_forward_hook(lambda module, inputs, logits: logits * 2)
    whole, chunked = (model(*batch, **options).loss for options in ({}, {"loss_chunk_size": 5}))
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["lvl_embed", "class_emb", "mat_qkv"]}])
def test_other_adapters_and_tables_are_called_too(options, make_prior, make_quantizer, make_indices, teacher_input):
    model, quantizer = make_prior(SCALES), make_quantizer(SCALES)
    batch = batch_of(model, quantizer, make_indices, teacher_input)
    peft_model = adapted(model, **options).train()
    peft_model(*batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in peft_model.parameters() if p.requires_grad)
    peft_model.eval()
    with torch.no_grad():
        logits = peft_model(*batch).logits
        torch.testing.assert_close(peft_model.merge_and_unload()(*batch).logits, logits, rtol=1e-10, atol=1e-10)


def test_an_adapter_of_transformers_own_is_in_place(make_prior, make_quantizer, make_indices, teacher_input):
    model, quantizer = make_prior(SCALES), make_quantizer(SCALES)
    batch = batch_of(model, quantizer, make_indices, teacher_input)
    model.add_adapter(LoraConfig(target_modules=["mat_qkv"], init_lora_weights=False))
    model.double().train()(*batch, loss_chunk_size=5).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 4 and all(gradient is not None and gradient.any() for gradient in gradients)
    SamplingOptions().check_for(model)
