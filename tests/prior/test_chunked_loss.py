"""The loss in chunks of tokens: equal to the loss of whole logits in value and gradient, and smaller in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nextblock.data.blocks import BlockLayout
from nextblock.prior.chunked_loss import chunked_cross_entropy, chunked_head_loss

SCALES = BlockLayout.scales([1, 2, 3])
# 28 tokens: one at a time, with a remainder, without one, all at once, and more than there are.
CHUNK_SIZES = [1, 5, 14, 28, 1000]


@pytest.fixture
def batch(make_indices, make_quantizer):
    """Input, classes and labels of two images."""
    idx_Bl = make_indices(SCALES)
    return make_quantizer(SCALES).var_input(SCALES.join(idx_Bl)).detach(), torch.tensor([0, 3]), SCALES.join(idx_Bl)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def train_both(make_prior, batch, chunk_size: int, dtype: torch.dtype, **options):
    """Return outputs and gradients of whole logits, and of chunks."""
    results = []
    for chunked in ({}, {"loss_chunk_size": chunk_size}):
        model = make_prior(SCALES, **options).to(dtype).train()
        var_input, *rest = batch
        output = model(var_input.to(dtype), *rest, **chunked)
        (3 * output.loss).backward()
        results.append((output, gradients(model)))
    return results


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    make_prior, batch, chunk_size, label_smoothing, dtype, tolerance
):
    (whole, whole_grad), (chunked, chunked_grad) = train_both(
        make_prior, batch, chunk_size, dtype, label_smoothing=label_smoothing
    )
    assert chunked.logits is None and chunked.loss.dtype == chunked.token_loss.dtype == dtype
    assert torch.equal(chunked.token_correct, whole.token_correct) and chunked.token_correct.dtype == torch.bool
    for got, expected in ((chunked.loss, whole.loss), (chunked.token_loss, whole.token_loss)):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for name, expected in whole_grad.items():
        # Gradients of float32 carry the rounding of the largest entry.
        scale = max(expected.abs().max().item(), 1.0)
        difference = (chunked_grad[name] - expected).abs().max().item()
        assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"
        assert expected.any() or "word_embed" in name, name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_ignored_labels_count_for_nothing_in_chunks(make_prior, batch, chunk_size, label_smoothing):
    labels = batch[2].clone()
    labels[0, :6] = labels[1, -1] = -100
    (whole, whole_grad), (chunked, chunked_grad) = train_both(
        make_prior, (*batch[:2], labels), chunk_size, torch.float64, label_smoothing=label_smoothing
    )
    expected = F.cross_entropy(whole.logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)
    for output in (whole, chunked):
        torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
        assert not output.token_loss[labels == -100].any() and not output.token_correct[labels == -100].any()
    assert torch.equal(whole.token_correct, chunked.token_correct) and whole.token_correct.any()
    torch.testing.assert_close(chunked.token_loss, whole.token_loss, rtol=1e-12, atol=1e-12)
    for name, gradient in whole_grad.items():
        torch.testing.assert_close(chunked_grad[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_head_that_is_called_ignores_the_same_labels(label_smoothing):
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 7).double()
    hidden_states, labels = torch.randn(2, 5, 4, dtype=torch.float64), torch.randint(7, (2, 5))
    labels[0, :3] = labels[1, -1] = -100
    results = []
    # The second is no bare linear map, as one with an adapter is none.
    for head in (linear, torch.nn.Sequential(linear)):
        linear.zero_grad()
        x = hidden_states.clone().requires_grad_()
        got = chunked_head_loss(head, x, labels, label_smoothing=label_smoothing, chunk_size=3)
        got[0].backward()
        results.append((*got, x.grad, linear.weight.grad.clone()))
    for bare, called in zip(*results, strict=True):
        torch.testing.assert_close(called, bare, rtol=1e-12, atol=1e-12)


def test_gradients_pass_a_numerical_check():
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 4), (5, 4), 5))
    labels = torch.randint(5, (2, 3), generator=generator)
    labels[1, 0] = -100

    def loss(*tensors):
        return chunked_cross_entropy(*tensors, labels, label_smoothing=0.2, chunk_size=4)[0]

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in (h, weight, bias)])


def test_frozen_parts_get_no_gradient(make_prior, batch):
    whole, chunked = make_prior(SCALES).train(), make_prior(SCALES).train()
    for model, options in ((whole, {}), (chunked, {"loss_chunk_size": 4})):
        model.head.weight.requires_grad_(False)
        model(*batch, **options).loss.backward()
        assert model.head.weight.grad is None
        torch.testing.assert_close(model.head.bias.grad, whole.head.bias.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.pos_1LC.grad, whole.pos_1LC.grad, rtol=1e-12, atol=1e-12)


def test_only_the_loss_has_a_gradient(make_prior, batch):
    model = make_prior(SCALES).train()
    output = model(*batch, loss_chunk_size=4)
    assert output.loss.requires_grad and not output.token_loss.requires_grad
    with torch.no_grad():
        assert not model(*batch, loss_chunk_size=4).loss.requires_grad


@pytest.mark.parametrize("is_training", [False, True], ids=["validation", "training"])
def test_no_tensor_is_as_large_as_the_logits(is_training):
    num_tokens, V, D, chunk_size = 64, 500, 3, 4

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            return result

    h = torch.randn(1, num_tokens, D, requires_grad=is_training)
    weight = torch.randn(V, D, requires_grad=is_training)
    labels = torch.randint(V, (1, num_tokens))
    with Sizes() as sizes:
        loss = chunked_cross_entropy(h, weight, torch.zeros(V), labels, label_smoothing=0.0, chunk_size=chunk_size)[0]
        if is_training:
            loss.backward()
    assert sizes.largest == V * chunk_size < num_tokens * V


def test_autocast_and_half_precision_compute_the_loss_in_float32(make_prior, batch):
    model = make_prior(SCALES).float().train()
    inputs = batch[0].float(), *batch[1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, chunked = model(*inputs), model(*inputs, loss_chunk_size=5)
        whole_loss = model(*inputs).loss
    assert chunked.loss.dtype == torch.float32 and whole.logits.dtype == torch.float32
    torch.testing.assert_close(chunked.loss, whole_loss, rtol=1e-6, atol=1e-6)
    assert model(*inputs).loss.item() != whole_loss.item()
    half = model.to(torch.bfloat16)
    results = [half(*inputs, **options) for options in ({}, {"loss_chunk_size": 5})]
    for output in results:
        half.zero_grad()
        output.loss.backward()
        assert output.loss.dtype == torch.float32 and half.head.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=1e-3, atol=1e-3)


def test_tuples_leave_the_logits_out(make_prior, batch):
    model = make_prior(SCALES)
    output = model(*batch, loss_chunk_size=4)
    loss, token_loss, token_correct = model(*batch, loss_chunk_size=4, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(token_loss, output.token_loss)
    assert torch.equal(token_correct, output.token_correct)


def test_chunks_without_labels_and_of_nothing_are_refused(make_prior, batch):
    model = make_prior(SCALES)
    with pytest.raises(ValueError, match="loss_chunk_size is 4 but labels is None"):
        model(*batch[:2], loss_chunk_size=4)
    with pytest.raises(ValueError, match="loss_chunk_size is 0; expected an integer of at least 1"):
        model(*batch, loss_chunk_size=0)
