"""Perceptual loss on tiny randomly initialised backbones: known values, what gets gradients, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTModel

from nextblock.tokenizer.perceptual import PerceptualConfig, feature_distance, load_perceptual_loss

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    """A classifier's folder, as on the hub."""
    folder = tmp_path_factory.mktemp("convnext")
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.5, image_size=32)
    config.layer_scale_init_value = 1.0
    ConvNextForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def images(seed: int, size: int = 32) -> torch.Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def test_distance_of_unit_vectors():
    right, up = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    right[:, 0], up[:, 1, :, 0], up[:, 0, :, 1] = 3.0, 0.5, -2.0
    # Orthogonal at one position, |a − b|² = 2; opposite at the other, 4.
    assert feature_distance(right, up).item() == pytest.approx(3)
    tokens = (right.flatten(2).transpose(1, 2), up.flatten(2).transpose(1, 2))
    assert feature_distance(*tokens).item() == pytest.approx(3)
    assert feature_distance(right, 7 * right).item() == 0
    assert feature_distance(right.bfloat16(), up.bfloat16()).dtype == torch.float32


def test_features_without_length_have_a_finite_gradient():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    feature_distance(features, torch.ones(1, 4, 2, 2)).backward()
    assert features.grad.isfinite().all()


def test_distance_of_images_is_the_mean_over_stages(convnext):
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(convnext)))
    first, second = images(0), images(1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    stages = [loss.backbone(((x + 1) / 2 - mean) / std).feature_maps for x in (first, second)]
    assert [stage.shape[1:] for stage in stages[0]] == [(8, 8, 8), (8, 4, 4), (16, 2, 2), (16, 1, 1)]
    distances = [feature_distance(a, b) for a, b in zip(*stages, strict=True)]
    assert loss(first, second).item() == pytest.approx(sum(distances).item() / 4, rel=1e-5)
    assert loss(first, second) > 1e-3 and loss(first, first) == 0


def test_the_backbone_is_the_saved_one(convnext):
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(convnext)))
    saved = ConvNextForImageClassification.from_pretrained(convnext).convnext.state_dict()
    assert torch.equal(
        loss.backbone.state_dict()["embeddings.patch_embeddings.weight"], saved["embeddings.patch_embeddings.weight"]
    )


def test_only_the_reconstruction_gets_a_gradient(convnext, finite_differences):
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(convnext))).double()
    reconstruction, pixel_values = images(0).double(), images(1).double()
    leaf, target = reconstruction.clone().requires_grad_(), pixel_values.clone().requires_grad_()
    loss(leaf, target).backward()
    assert target.grad is None and all(parameter.grad is None for parameter in loss.parameters())
    corner = (slice(0, 1), slice(0, 1), slice(0, 2), slice(0, 2))

    def at_corner(value):
        changed = reconstruction.clone()
        changed[corner] = value
        return loss(changed, pixel_values).detach()

    expected = finite_differences(at_corner, reconstruction[corner].clone())
    torch.testing.assert_close(leaf.grad[corner], expected, rtol=1e-5, atol=1e-10)
    assert expected.abs().max() > 0


def test_a_backbone_with_weights_drawn_at_random_is_refused(convnext, tmp_path):
    path = shutil.copytree(convnext, tmp_path / "wrapped") / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="perceptual.backbone is .* lacks .*'embeddings.patch_embeddings.weight'"):
        load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(path.parent)))


def test_the_backbone_stays_frozen_in_evaluation_mode(convnext):
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(convnext)))
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    loss.train()
    assert not any(module.training for module in loss.modules())


def test_a_model_without_backbone_class_gives_its_hidden_states(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    options = {"weight": 1.0, "backbone": str(tmp_path), "mean": MEAN, "std": STD}
    loss = load_perceptual_loss(PerceptualConfig(image_size=16, **options))
    # Images of another size come to the backbone's.
    assert len(loss._features(images(0))) == 2
    assert loss(images(0), images(1)) > 0 and loss(images(0), images(0)) == 0


def test_missing_weights_are_refused_with_the_way_to_get_them(tmp_path, monkeypatch):
    from transformers import AutoConfig

    where = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="nowhere' *, which cannot be loaded.*hf download"):
        load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(where)))
    ConvNextConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(tmp_path)))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match="hf download facebook/convnext-small-224"):
        load_perceptual_loss(PerceptualConfig(weight=1.0))


def test_input_statistics_must_come_from_somewhere(tmp_path):
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="perceptual.mean is None .* expected both.*preprocessor_config.json"):
        load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(tmp_path)))
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, backbone=str(tmp_path), mean=MEAN, std=STD))
    assert loss.mean.flatten().tolist() == pytest.approx(MEAN) and loss.std.flatten().tolist() == pytest.approx(STD)


def test_options_outside_their_range_are_refused():
    for options, message in (
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"image_size": 0}, "image_size is 0"),
        ({"mean": [0.5]}, "mean is"),
        ({"std": [0.5, 0.0, 1.0]}, "std is .* above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptualConfig(**options)
