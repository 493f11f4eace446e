"""Packed weights: the same numbers as without, of the weights as they are at each call, and gone with the request."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F

from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior import linear as linear_module
from nextblock.prior.linear import MIN_PACKED_USES, Linear, PackedWeights, linear
from nextblock.tokenizer import VQVAE, VQVAEConfig

DTYPES = [torch.float32, torch.bfloat16] if linear_module._HAS_BF16 else [torch.float32]
pytestmark = pytest.mark.skipif(not linear_module._HAS_ONEDNN, reason="torch is built without oneDNN")


@pytest.fixture
def num_packed(monkeypatch) -> list[int]:
    """Rows for which weights were packed, in order."""
    rows, pack = [], PackedWeights.of

    def counted(self, weight, num_rows):
        known = len(self._copies)
        copy = pack(self, weight, num_rows)
        rows.extend([num_rows] * (len(self._copies) - known))
        return copy

    monkeypatch.setattr(PackedWeights, "of", counted)
    return rows


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(512, 640), (640, 512)])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 1), (3, 1), (4, 1), (1, 5), (2, 8), (3, 40), (0,), ()])
@torch.no_grad()
def test_every_number_of_rows_gives_what_a_plain_product_gives(shape, num_inputs, num_outputs, has_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, num_inputs), torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    packed_weights = PackedWeights(MIN_PACKED_USES)
    with packed_weights.used():
        got = [linear(x, weight, bias), linear(torch.randn(*shape, num_inputs, 2)[..., 0].copy_(x), weight, bias)]
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for y in got:
        assert y.shape == (*shape, num_outputs) and y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    num_rows = x.numel() // num_inputs
    assert len(packed_weights._copies) == (num_rows > 2 or num_rows == 2 and num_inputs > num_outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_nor_on_being_packed(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(512, 1024, dtype=dtype), torch.randn(64, 1024, dtype=dtype)
    whole, packed_weights = linear(x, weight), PackedWeights(MIN_PACKED_USES)
    with packed_weights.used():
        for num_rows in (2, 3, 4, 5, 16, 64):
            assert torch.equal(linear(x[:num_rows], weight), whole[:num_rows])
    assert len(packed_weights._copies) == 1


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="oneDNN has no bfloat16 on this processor")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(512, 640), (640, 512)])
@torch.no_grad()
def test_half_types_are_packed_for_any_number_of_rows(num_inputs, num_outputs, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(num_outputs, num_inputs).bfloat16(), torch.randn(num_outputs).bfloat16()
    packed_weights = PackedWeights(MIN_PACKED_USES)
    with packed_weights.used():
        for num_rows in (0, 1, 2, 3, 16):
            x, added = torch.randn(num_rows, 1, num_inputs).bfloat16(), bias if has_bias else None
            y = linear(x, weight, added)
            exact = F.linear(x.double(), weight.double(), None if added is None else bias.double())
            assert y.dtype == torch.bfloat16 and y.is_contiguous()
            torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-5)
            assert len(packed_weights._copies) == (num_rows > 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, weight: layer.weight.copy_(weight),
        lambda layer, weight: setattr(layer.weight, "data", weight),
        lambda layer, weight: setattr(layer, "weight", torch.nn.Parameter(weight)),
        lambda layer, weight: layer.load_state_dict({"weight": weight}),
        lambda layer, weight: layer.load_state_dict({"weight": weight}, assign=True),
    ],
    ids=["in place", "data", "replaced", "loaded", "assigned"],
)
@torch.no_grad()
def test_weights_that_change_between_two_calls_are_seen(change):
    torch.manual_seed(0)
    layer, x = Linear(640, 512, bias=False), torch.randn(4, 640)
    with PackedWeights(MIN_PACKED_USES).used():
        layer(x)
        weight = torch.randn(512, 640)
        change(layer, weight)
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
        layer.weight.zero_()
        assert not layer(x).any()


@torch.no_grad()
def test_what_is_not_plain_without_gradient_is_not_packed(num_packed):
    layer, x = Linear(640, 512), torch.randn(4, 640)
    with PackedWeights(MIN_PACKED_USES).used():
        with torch.enable_grad():
            layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        layer.double()(x.double())
        Linear(64, 64)(torch.randn(4, 64))
        linear(x, torch.randn(640, 512).t())
        with torch.inference_mode():
            linear(x, torch.randn(512, 640))
        torch.compile(layer.float(), backend="eager", fullgraph=True)(x)
        assert not num_packed
        layer(x)
        assert num_packed == [4]


@torch.no_grad()
def test_few_uses_pack_nothing_and_neither_does_more_than_a_limit(num_packed, monkeypatch):
    weight, x = torch.randn(512, 640), torch.randn(4, 640)
    with PackedWeights(MIN_PACKED_USES - 1).used():
        linear(x, weight)
    monkeypatch.setattr(linear_module, "MAX_PACKED_BYTES", weight.nbytes)
    packed_weights = PackedWeights(MIN_PACKED_USES)
    with packed_weights.used():
        for other in (weight, weight.clone(), weight):
            torch.testing.assert_close(linear(x, other), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert num_packed == [4] and packed_weights._num_bytes == weight.nbytes


@torch.no_grad()
def test_another_thread_and_what_comes_after_do_not_meet_the_copies(num_packed):
    weight, x = torch.randn(512, 640), torch.randn(4, 640)
    with PackedWeights(MIN_PACKED_USES).used():
        thread = threading.Thread(target=torch.no_grad()(linear), args=(x, weight))
        thread.start()
        thread.join()
    linear(x, weight)
    assert not num_packed


@pytest.fixture
def models() -> tuple[VQVAE, BlockPrior]:
    """A raster of 64 tokens and a prior whose matrices are large enough to be packed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "embedding_dim": 8}
    tokenizer = VQVAE(VQVAEConfig(image_size=32, layout="tiles", tile=1, hidden_dim=16, **sizes)).eval()
    shape = {"hidden_size": 512, "num_layers": 1, "num_heads": 8, "mlp_ratio": 2.0, "num_classes": 4}
    config = BlockPriorConfig(layout=tokenizer.layout.to_dict(), adaln_gamma_init=1.0, **shape, **sizes)
    return tokenizer, BlockPrior(config).eval()


@pytest.mark.parametrize(
    ("num_images", "dtype", "rows"),
    [
        (1, torch.float32, [2]),
        (2, torch.float32, [4, 4, 4, 4]),
        pytest.param(
            1,
            torch.bfloat16,
            [2, 2, 2, 2],
            marks=pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="oneDNN has no bfloat16 on this processor"),
        ),
    ],
)
@torch.no_grad()
def test_sampling_packs_once_gives_the_same_tokens_and_keeps_nothing(
    num_images, dtype, rows, models, num_packed, monkeypatch
):
    tokenizer, prior = models
    prior.to(dtype)
    labels, names = torch.arange(num_images), set(prior.state_dict())
    made, init = [], PackedWeights.__init__

    def noted(self, num_uses):
        init(self, num_uses)
        made.append(weakref.ref(self))

    monkeypatch.setattr(PackedWeights, "__init__", noted)

    def sample():
        generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
        idx_Bl = prior.generate(labels, tokenizer.quantizer, generator=generators, guidance_scale=2.0, top_k=8)
        return tokenizer.layout.join(idx_Bl)

    packed = sample()
    # Two rows are packed for the one matrix that has more inputs than outputs.
    assert num_packed == rows
    gc.collect()
    assert made[0]() is None and set(prior.state_dict()) == names
    monkeypatch.setattr(linear_module, "MIN_PACKED_USES", 1000)
    assert torch.equal(sample(), packed)
    assert num_packed == rows
