"""Groups of GroupNorm: several channels each, so that flat pictures keep their tone; what was saved before stays."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from nextblock.files.fingerprints import model_fingerprint
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.autoencoder import num_norm_groups
from nextblock.tokenizer.discriminator import PatchDiscriminator

TONES = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [-1, -1, -1]])
FLAT = {"image_size": 16, "hidden_dim": 32, "num_res_blocks": 1, "vocab_size": 32, "embedding_dim": 8}


def groups_of(model: nn.Module) -> set[tuple[int, int]]:
    """Channels and groups of every GroupNorm."""
    return {(m.num_channels, m.num_groups) for m in model.modules() if isinstance(m, nn.GroupNorm)}


def flat(tones: torch.Tensor) -> torch.Tensor:
    return tones[:, :, None, None].expand(-1, -1, 16, 16).contiguous()


def tones_after_training(**options) -> torch.Tensor:
    """Train a tokenizer on flat pictures for a moment; return the mean colours that it decodes `TONES` to."""
    torch.manual_seed(0)
    layout = {"layout": "scales", "scales": [1, 2, 4], "num_phi": 1}
    model = VQVAE(VQVAEConfig(**FLAT, **layout, codebook_init="data", codebook_update="ema", **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.initialize_codebook(flat(2 * torch.rand(64, 3) - 1), seed=0)
    for step in range(50):
        images = flat(torch.cat([2 * torch.rand(4, 3) - 1, TONES]))
        output = model(images)
        (F.mse_loss(output.reconstruction, images) + output.vq_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_codebook(0, step)
    model.eval()
    return model.idx_to_img(model.img_to_idx(flat(TONES))).mean((2, 3))


def test_flat_pictures_keep_their_tones_at_width_32():
    assert (tones_after_training() - TONES).abs().max() < 0.7
    # With a channel a group, four tones come out nearly alike.
    assert (tones_after_training(min_group_channels=1) - TONES).abs().max() > 1


@pytest.mark.parametrize(
    ("num_channels", "num_groups"),
    [(2, 1), (4, 1), (8, 2), (32, 8), (36, 4), (37, 1), (40, 8), (48, 8), (64, 16), (96, 16), (128, 32), (160, 32)],
)
def test_a_group_has_several_channels(num_channels, num_groups):
    assert num_norm_groups(num_channels) == num_groups
    discriminator = PatchDiscriminator(base_width=num_channels, num_layers=1)
    assert groups_of(discriminator) == {(2 * num_channels, num_norm_groups(2 * num_channels))}


def test_every_width_is_cut_evenly_and_published_ones_into_32():
    for width in range(1, 1025):
        groups = num_norm_groups(width)
        assert width % groups == 0 and width // groups >= min(4, width) and groups <= 32
        assert num_norm_groups(width, 1) == math.gcd(32, width)
        if width % 32 == 0 and width >= 128:
            assert groups == 32


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (FLAT, {(32, 8)}),
        (FLAT | {"autoencoder": "vqgan", "width_multipliers": [1, 2, 4]}, {(32, 8), (64, 16), (128, 32)}),
        (FLAT | {"min_group_channels": 16}, {(32, 2)}),
    ],
)
def test_a_tokenizer_normalises_by_its_configuration(options, groups, tmp_path):
    model = VQVAE(VQVAEConfig(**options))
    assert groups_of(model) == groups
    model.save_pretrained(tmp_path)
    assert groups_of(VQVAE.from_pretrained(tmp_path)) == groups
    with pytest.raises(ValueError, match="min_group_channels is 0; expected an integer from 1 to 65536"):
        VQVAEConfig(min_group_channels=0)


@pytest.mark.parametrize("loader", [VQVAE, AutoModel])
def test_a_folder_saved_before_computes_what_it_computed(loader, tmp_path, make_images):
    torch.manual_seed(0)
    before = VQVAE(VQVAEConfig(**FLAT | {"hidden_dim": 48}, min_group_channels=1)).eval()
    before.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["min_group_channels"]
    path.write_text(json.dumps(fields))
    model = loader.from_pretrained(tmp_path)
    images = make_images(model)
    assert groups_of(model) == {(48, 16)}
    assert torch.equal(model(images).reconstruction, before(images).reconstruction)
    assert model_fingerprint(model) == model_fingerprint(before)
    model.save_pretrained(tmp_path / "again")
    assert groups_of(loader.from_pretrained(tmp_path / "again")) == {(48, 16)}


@pytest.mark.parametrize(
    ("options", "is_equal"),
    [
        ({"hidden_dim": 32}, False),
        ({"hidden_dim": 4, "num_res_blocks": 0}, True),
        ({"hidden_dim": 128}, True),
        ({"hidden_dim": 8, "autoencoder": "vqgan", "width_multipliers": [2, 4]}, False),
        ({"hidden_dim": 36, "autoencoder": "vqgan", "width_multipliers": [1, 1]}, True),
    ],
)
def test_a_fingerprint_tells_groups_apart_where_they_differ(options, is_equal):
    fingerprints = set()
    for least in (1, 4):
        torch.manual_seed(0)
        config = VQVAEConfig(**FLAT | options | {"min_group_channels": least})
        fingerprints.add(model_fingerprint(VQVAE(config)))
    assert (len(fingerprints) == 1) == is_equal
