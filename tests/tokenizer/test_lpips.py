"""LPIPS as the perceptual term: torchmetrics' own network on an AlexNet of random weights in torchvision's place."""

import urllib.error

import pytest
import torch
import torchmetrics.functional.image.lpips as lpips_network
import torchmetrics.image.lpip as lpips_metric
from torch import nn
from torch.nn import functional as F

from nextblock.tokenizer.perceptual import PerceptualConfig, load_perceptual_loss
from nextblock.tokenizer.task import TokenizerTrainConfig
from nextblock.train_tokenizer import train

ALEX = PerceptualConfig(weight=1.0, lpips_network="alex")


def random_alexnet(name: str, pretrained: bool) -> nn.Sequential:
    """Stand in for torchvision's AlexNet, the same each time."""
    assert name == "alexnet" and pretrained
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )


@pytest.fixture(autouse=True)
def alexnet(monkeypatch):
    """Let torchmetrics believe that torchvision is there."""
    monkeypatch.setattr(lpips_network, "_get_tv_model_features", random_alexnet)
    monkeypatch.setattr(lpips_metric, "_TORCHVISION_AVAILABLE", True)


def images(seed: int, size: int = 40) -> torch.Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def test_the_distance_is_the_published_one():
    loss, first, second = load_perceptual_loss(ALEX), images(0), images(1)
    layers = random_alexnet("alexnet", pretrained=True)
    # LPIPS brings [-1, 1] to ImageNet's statistics by itself.
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    a, b, expected = (first - shift) / scale, (second - shift) / scale, 0.0
    channel_weights = [lin.model[-1].weight for lin in loss.network.lins]
    assert min(weights.min() for weights in channel_weights) >= 0 < max(w.max() for w in channel_weights)
    for start, end, weights in zip((0, 2, 5, 8, 10), (2, 5, 8, 10, 12), channel_weights, strict=True):
        a, b = layers[start:end](a), layers[start:end](b)
        difference = a / (1e-8 + a.square().sum(1, keepdim=True)).sqrt()
        difference = difference - b / (1e-8 + b.square().sum(1, keepdim=True)).sqrt()
        expected = expected + (weights * difference.square()).sum(1).mean()
    assert loss(first, second).item() == pytest.approx(expected.item(), rel=1e-5) and expected > 1e-4
    function = lpips_network.learned_perceptual_image_patch_similarity
    assert loss(first, second).item() == pytest.approx(function(first, second, net_type="alex").item(), rel=1e-6)
    assert loss(first, first) == 0


def test_only_the_reconstruction_gets_a_gradient_also_beyond_the_range():
    loss = load_perceptual_loss(ALEX)
    reconstruction, target = (1.5 * images(0)).requires_grad_(), images(1).requires_grad_()
    loss(reconstruction, target).backward()
    assert reconstruction.grad.isfinite().all() and reconstruction.grad.abs().max() > 0
    assert target.grad is None and not any(parameter.requires_grad for parameter in loss.parameters())
    loss.train()
    assert not any(module.training for module in loss.modules())


def test_it_computes_in_float32_whatever_autocast_is_in_force():
    loss, first, second = load_perceptual_loss(ALEX), images(0), images(1)
    expected = loss(first, second)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(first, second), expected) and expected.dtype == torch.float32
    half = loss(first.bfloat16(), second.bfloat16())
    assert torch.equal(half, loss(first.bfloat16().float(), second.bfloat16().float()))


def test_small_images_are_resized():
    first, second = images(0, 16), images(1, 16)
    loss = load_perceptual_loss(PerceptualConfig(weight=1.0, lpips_network="alex", image_size=32))
    large = [F.interpolate(batch, (32, 32), mode="bilinear", antialias=True) for batch in (first, second)]
    assert torch.equal(loss(first, second), load_perceptual_loss(ALEX)(*large))


def test_a_training_takes_it_as_its_perceptual_term(run_here, tokenizer_arguments, tmp_path, read_metrics):
    options = ["--perceptual.weight", 0.5, "--perceptual.lpips_network", "alex", "--perceptual.image_size", 32]
    options += ["--loop.num_steps", 1, "--loop.tracker", "null", "--output_dir", tmp_path / "run"]
    run_here(train, TokenizerTrainConfig, *tokenizer_arguments, *options)
    line = {name.removeprefix("train/"): value for name, value in read_metrics(tmp_path / "run")[0].items()}
    assert line["perceptual"] > 0
    assert line["loss"] == pytest.approx(line["l1"] + line["l2"] + line["vq"] + 0.5 * line["perceptual"], rel=1e-5)


def test_what_is_missing_is_refused_before_any_work(run_here, tokenizer_arguments, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    arguments = [*tokenizer_arguments, "--output_dir", output_dir, "--loop.tracker", "null"]
    arguments += ["--perceptual.weight", 1, "--perceptual.lpips_network", "vgg"]

    def offline(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(lpips_network, "_get_tv_model_features", offline)
    with pytest.raises(ValueError, match=r"'vgg', whose weights.*no network.*download.pytorch.org.*models.vgg16\("):
        run_here(train, TokenizerTrainConfig, *arguments)
    monkeypatch.setattr(lpips_metric, "_TORCHVISION_AVAILABLE", False)
    with pytest.raises(ValueError, match="lpips_network is 'vgg', which needs torchvision.*pip install torchvision"):
        run_here(train, TokenizerTrainConfig, *arguments)
    assert not output_dir.exists()


def test_options_that_do_not_go_together_are_refused():
    for options, message in (
        ({"lpips_network": "resnet"}, r"lpips_network is 'resnet'; expected one of \['vgg', 'alex', 'squeeze'\]"),
        ({"lpips_network": "vgg", "backbone": "mine"}, "backbone is 'mine'; expected the default .* with lpips_net"),
        ({"lpips_network": "vgg", "mean": [0.5] * 3}, "mean is .*; expected the default None with lpips_network 'vgg'"),
        ({"lpips_network": "vgg", "std": [0.5] * 3}, "std is .*; expected the default None with lpips_network 'vgg'"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptualConfig(**options)
