"""A pipeline whose prior carries an adapter samples with it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nextblock.pipelines import ClassToImagePipeline


@pytest.mark.parametrize("is_wrapped", [True, False], ids=["PeftModel", "in place"])
def test_an_adapted_prior_samples_and_is_saved_merged(is_wrapped, any_pipe, seeds, tmp_path):
    options = {"guidance_scale": 2.0, "output_type": "latent"}
    plain = torch.cat(any_pipe([0, 1], generator=seeds(2), **options).images, 1)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(any_pipe.prior, config).eval()
    pipe = ClassToImagePipeline(any_pipe.tokenizer, peft_model) if is_wrapped else any_pipe
    pipe.set_progress_bar_config(disable=True)
    adapted = torch.cat(pipe([0, 1], generator=seeds(2), **options).images, 1)
    assert not torch.equal(adapted, plain)
    with pytest.raises(ValueError, match="prior is a .* with an adapter; expected the model alone: merge"):
        pipe.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()
    merged = ClassToImagePipeline(any_pipe.tokenizer, peft_model.merge_and_unload())
    merged.save_pretrained(tmp_path)
    loaded = ClassToImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(torch.cat(loaded([0, 1], generator=seeds(2), **options).images, 1), adapted)
