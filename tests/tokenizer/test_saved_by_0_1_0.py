"""Tokenizers that version 0.1.0 saved: loaded, they give the same indices and have the same fingerprints.

Both were trained for a few steps with `normalize_codes=True`: "scales" with two φ convolutions, "tiles" with codes that
are moving averages. `expected.json` is what that version found for the image below.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.initial_weights import load_initial_weights

FOLDER = Path(__file__).parents[1] / "saved_by_0_1_0"
both = pytest.mark.parametrize("name", ["scales", "tiles"])


def image() -> torch.Tensor:
    return torch.sin(torch.arange(3 * 16 * 16) * 0.37).view(1, 3, 16, 16)


def expected_of(name: str) -> dict:
    return json.loads((FOLDER / "expected.json").read_text())[name]


@both
@pytest.mark.parametrize("loader", [VQVAE, AutoModel])
def test_indices_and_fingerprints_are_what_they_were(name, loader):
    model, report = loader.from_pretrained(FOLDER / name, output_loading_info=True)
    assert not any(report.values())
    assert model.img_to_idx(image())[0].tolist() == expected_of(name)["idx"]
    assert model_fingerprint(model) == expected_of(name)["fingerprint"]


def test_one_option_of_then_is_two_now():
    configs = [VQVAEConfig.from_pretrained(FOLDER / name) for name in ("scales", "tiles")]
    assert [config.codebook_metric for config in configs] == ["cosine", "cosine"]
    assert [config.has_unit_codes for config in configs] == [False, True]
    assert not any(hasattr(config, "normalize_codes") for config in configs)
    assert [config.var_phi_names for config in configs] == ["separate", "by_number"]


@both
def test_saved_again_it_has_the_names_of_today(name, tmp_path):
    VQVAE.from_pretrained(FOLDER / name).save_pretrained(tmp_path)
    model = VQVAE.from_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert any(key.startswith("quantizer.codec.phi.") for key in model.state_dict()) == (name == "scales")
    assert "normalize_codes" not in json.loads((tmp_path / "config.json").read_text())
    assert model.img_to_idx(image())[0].tolist() == expected_of(name)["idx"]
    assert model_fingerprint(model) == expected_of(name)["fingerprint"]


@both
def test_a_training_may_start_from_it(name):
    given = VQVAE.from_pretrained(FOLDER / name)
    model = VQVAE(given.config)
    load_initial_weights(model, FOLDER / name)
    for key, tensor in given.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
