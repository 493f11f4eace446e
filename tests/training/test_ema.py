"""The weight average against a loop written out, buffers of a moving-average codebook included."""

import pytest
import torch
from torch import nn

from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.ema import build_weight_average


def disturb(model: nn.Module, generator: torch.Generator) -> None:
    """Change every weight and buffer, as a training step does."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def make_model() -> VQVAE:
    torch.manual_seed(0)
    options = {"codebook_update": "ema", "layout": "scales", "scales": [1, 2], "num_phi": 1}
    model = VQVAE(VQVAEConfig(image_size=8, hidden_dim=4, embedding_dim=4, vocab_size=6, **options))
    return model.double().train()


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_equals_a_slow_loop(decay):
    model, generator = make_model(), torch.Generator().manual_seed(1)
    average = build_weight_average(model, decay)
    expected = None
    for n in range(12):
        disturb(model, generator)
        average.update_parameters(model)
        current = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if n == 0:
            expected = current
            continue
        kept = min(decay, (1 + n) / (10 + n))
        expected = {name: kept * tensor + (1 - kept) * current[name] for name, tensor in expected.items()}
    got = average.module.state_dict()
    assert got.keys() == expected.keys()
    assert {"weight", "code_sums", "code_counts"} <= {name.split(".")[-1] for name in got if "codebook" in name}
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_a_short_training_does_not_drag_its_first_weights_along():
    model = nn.Linear(1, 1, bias=False).double()
    average = build_weight_average(model, 0.999)
    seen = []
    for value in (0.0, 1.0, 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        seen.append(average.module.weight.item())
    # What is left of the first weights shrinks by 2/11, 3/12, 4/13.
    assert seen == pytest.approx([0, 1 - 2 / 11, 1 - 2 / 11 * 3 / 12, 1 - 2 / 11 * 3 / 12 * 4 / 13])


def test_the_average_stands_apart_from_the_model():
    model = make_model()
    average = build_weight_average(model, 0.9)
    average.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    disturb(model, torch.Generator().manual_seed(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.module.state_dict().items())
    assert not average.module.training and model.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_reloaded_average_goes_on_alike():
    model, generator = make_model(), torch.Generator().manual_seed(3)
    average, other = build_weight_average(model, 0.9), build_weight_average(model, 0.9)
    for _ in range(3):
        disturb(model, generator)
        average.update_parameters(model)
    other.load_state_dict(average.state_dict())
    disturb(model, generator)
    average.update_parameters(model)
    other.update_parameters(model)
    for name, tensor in average.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_integer_buffers_are_refused():
    with pytest.raises(ValueError, match="buffer 1.num_batches_tracked is torch.int64; expected floating point"):
        build_weight_average(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.9)
