"""Gradient checkpointing of both models: gradients equal bit for bit, dropout included, and layers computed again."""

import copy
import warnings

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior.layers import FeedForward
from nextblock.tokenizer import VQVAE, VQVAEConfig

OPTIONS = {"dropout": 0.2, "drop_path": 0.3, "label_smoothing": 0.1}
PRIORS = {
    "a call a block": (BlockLayout.scales([1, 2, 3]), OPTIONS),
    "one causal call": (BlockLayout.tiles(1, 3), OPTIONS | {"input_embedding": "codes", "use_shared_adaln": True}),
    "one masked call": (
        BlockLayout.tiles((1, 2), (6, 6)),
        OPTIONS | {"input_embedding": "codes", "use_normalized_attention": True},
    ),
}
both_priors = pytest.mark.parametrize(("layout", "options"), PRIORS.values(), ids=PRIORS.keys())


def enable(model) -> None:
    """Switch checkpointing on as users of transformers do, whichever name their version has for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def backward(model, *inputs, **options) -> dict[str, torch.Tensor]:
    """Take the loss's gradients with the same dropout every time."""
    model.zero_grad()
    torch.manual_seed(0)
    output = model(*inputs, **options)
    loss = output.vq_loss + output.reconstruction.square().mean() if "reconstruction" in output else output.loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected) -> None:
    assert got.keys() == expected.keys() and len(got) > 5
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def count_calls(monkeypatch):
    """Count the feed-forward layers that run."""
    calls, forward = [], FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: calls.append(self) or forward(self, x))
    return calls


def random_inputs(layout, batch: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    var_input = torch.randn(batch, layout.num_tokens - layout.block_lengths[0], 4, generator=generator)
    return var_input, torch.tensor([0, 2, 3]), torch.randint(11, (batch, layout.num_tokens), generator=generator)


@both_priors
@pytest.mark.parametrize("loss_chunk_size", [None, 10])
def test_a_checkpointed_prior_has_equal_gradients(make_prior, count_calls, layout, options, loss_chunk_size):
    model, inputs = make_prior(layout, **options).float().train(), random_inputs(layout)
    expected = backward(model, *inputs, loss_chunk_size=loss_chunk_size)
    assert len(count_calls) == 2
    enable(model)
    assert_equal(backward(model, *inputs, loss_chunk_size=loss_chunk_size), expected)
    assert len(count_calls) == 2 + 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    assert_equal(backward(model, *inputs, loss_chunk_size=loss_chunk_size), expected)
    assert len(count_calls) == 6 + 2


def test_autocast_holds_when_a_layer_is_computed_again(make_prior):
    layout, options = PRIORS["a call a block"]
    model, inputs = make_prior(layout, **options).float().train(), random_inputs(layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = backward(model, *inputs)
        enable(model)
        assert_equal(backward(model, *inputs), expected)


def test_evaluation_copies_and_sampling_are_untouched(make_prior, make_quantizer, count_calls):
    layout = BlockLayout.scales([1, 2, 3])
    model, quantizer = make_prior(layout), make_quantizer(layout)
    sample = [idx.clone() for idx in model.generate([0, 1], quantizer, generator=torch.Generator().manual_seed(0))]
    enable(model)
    for each in (model, copy.deepcopy(model), model.train()):
        again = each.generate([0, 1], quantizer, generator=torch.Generator().manual_seed(0))
        assert all(map(torch.equal, again, sample))
    model.eval()
    count_calls.clear()
    var_input, *rest = random_inputs(layout)
    backward(model, var_input.double(), *rest)
    assert len(count_calls) == 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"autoencoder": "simple", "hidden_dim": 8, "num_res_blocks": 1},
        {"autoencoder": "vqgan", "hidden_dim": 8, "num_res_blocks": 1, "width_multipliers": [1, 2]},
    ],
    ids=["simple", "vqgan"],
)
def test_a_checkpointed_tokenizer_has_equal_gradients(sizes):
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=16, embedding_dim=4, vocab_size=12, tile=2, dropout=0.2, **sizes)
    model, pixel_values = VQVAE(config).train(), torch.rand(2, 3, 16, 16) * 2 - 1
    convolutions = []
    for name, module in model.named_modules():
        if name.endswith("conv1"):
            module.register_forward_hook(lambda module, *_: convolutions.append(module))
    expected = backward(model, pixel_values)
    num_blocks = len(convolutions)
    enable(model)
    assert_equal(backward(model, pixel_values), expected)
    assert num_blocks >= 4 and len(convolutions) == 3 * num_blocks
