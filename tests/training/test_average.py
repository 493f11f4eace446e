"""The weight average against a loop written out, buffers of a moving-average codebook included."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.training.average import WeightAverage

GOOD, BAD = torch.tensor(True), torch.tensor(False)


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
    average = WeightAverage(model, decay)
    expected = None
    for n in range(12):
        disturb(model, generator)
        average.update(model, GOOD)
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


def test_the_average_is_torchs_own_bit_for_bit():
    model, generator = make_model().float(), torch.Generator().manual_seed(5)
    # From the first update on, this decay is below the one that rises.
    average, expected = WeightAverage(model, 0.1), AveragedModel(model, None, None, get_ema_multi_avg_fn(0.1), True)
    for _ in range(5):
        disturb(model, generator)
        average.update(model, GOOD)
        expected.update_parameters(model)
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], tensor), name


def test_a_short_training_does_not_drag_its_first_weights_along():
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(model, 0.999)
    seen = []
    for value in (0.0, 1.0, 1.0, 1.0):
        nn.init.constant_(model.weight, value)
        average.update(model, GOOD)
        seen.append(average.module.weight.item())
    # What is left of the first weights shrinks by 2/11, 3/12, 4/13.
    assert seen == pytest.approx([0, 1 - 2 / 11, 1 - 2 / 11 * 3 / 12, 1 - 2 / 11 * 3 / 12 * 4 / 13])


def test_the_average_stands_apart_from_the_model():
    model = make_model()
    average = WeightAverage(model, 0.9)
    average.update(model, GOOD)
    before = {name: tensor.clone() for name, tensor in average.module.state_dict().items()}
    disturb(model, torch.Generator().manual_seed(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.module.state_dict().items())
    assert not average.module.training and model.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_reloaded_average_goes_on_alike():
    model, generator = make_model(), torch.Generator().manual_seed(3)
    average, other = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for _ in range(3):
        disturb(model, generator)
        average.update(model, GOOD)
    state = average.state_dict()
    assert state["num_updates"] == 3
    other.load_state_dict(state)
    disturb(model, generator)
    average.update(model, GOOD)
    other.update(model, GOOD)
    assert other.num_updates == 4
    for name, tensor in average.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], tensor), name


class Counted(nn.Module):
    """Buffers of every kind beside a weight, one of which no state dict keeps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("table", torch.zeros(2, dtype=torch.float64), persistent=False)


def test_buffers_that_have_no_average_are_copied():
    model = Counted()
    average = WeightAverage(model, 0.5)
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(step)
            model.count.fill_(step)
            model.mask.copy_(torch.tensor([step == 3, True]))
            model.table.fill_(step)
        average.update(model, GOOD)
    module = average.module
    assert module.count.item() == 3 and module.count.dtype == torch.int64
    assert module.mask.tolist() == [True, True]
    # 1, then 2 / 11 of it and 9 / 11 of 2, then 3 / 12 of that and 9 / 12 of 3.
    expected = (2 / 11 + 2 * 9 / 11) * 3 / 12 + 3 * 9 / 12
    assert module.table.tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert module.weight.tolist() == pytest.approx([expected] * 2)


def test_bad_steps_are_left_out():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    average.update(model, GOOD)
    before = [parameter.clone() for parameter in average.module.parameters()]
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(model, BAD)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), before, strict=True))
    assert average.num_updates == 1


class Elsewhere(torch.Tensor):
    """A flag that calls itself another device's and must not be looked at."""

    device = torch.device("meta")

    def __bool__(self) -> bool:
        raise AssertionError("the host waited for the device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_than_on_a_cpu_the_flag_decides_without_being_looked_at(dtype):
    model, generator = nn.Linear(3, 2, dtype=dtype), torch.Generator().manual_seed(4)
    average, expected = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for flag in (True, True, False, True):
        before = [parameter.clone() for parameter in average.module.parameters()]
        if flag:
            disturb(model, generator)
        average.update(model, torch.tensor(flag).as_subclass(Elsewhere))
        if not flag:
            assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), before, strict=True))
            expected.num_updates += 1  # A step that the host does not know to be bad counts.
            continue
        expected.update(model, GOOD)
    assert average.num_updates == expected.num_updates == 4
    for got, wanted in zip(average.module.parameters(), expected.module.parameters(), strict=True):
        # On the device the weight of the new is rounded to float32 first.
        torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted, rtol=1e-6, atol=1e-7)


def test_nothing_of_an_update_is_read_by_the_host():
    # A tensor without values can be computed with, and not be looked at.
    model, flag = Counted().to("meta"), torch.ones((), dtype=torch.bool, device="meta")
    average = WeightAverage(model, 0.9)
    for _ in range(3):
        average.update(model, flag)
    assert average.num_updates == 3
