"""The quantizer around codec and codebook: the origin's class, precision, skipped steps."""

import pytest
import torch
from torch.nn import functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.tokenizer import LearnedCodebook, Quantizer, ScaleCodec, TileCodec, VectorQuantizer

V, C = 12, 3
LAYOUTS = {"tiles": BlockLayout.tiles(2, 4), "scales": BlockLayout.scales([1, 2, 4])}
both_codecs = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def build(layout, **options) -> Quantizer:
    torch.manual_seed(0)
    codebook = LearnedCodebook(V, C, **{"init_scale": 1.0} | options)
    return Quantizer(ScaleCodec(layout, C, num_phi=2) if layout.is_scales else TileCodec(layout), codebook)


def random_map(grid=(4, 4), batch=2, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, C, *grid, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rows(feature_map):
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


# The origin class


def test_positional_arguments_and_defaults_of_the_origin():
    codebook = VectorQuantizer(7, 5).quantizer.codebook
    assert (codebook.beta, codebook.epsilon) == (0.25, 1e-5)
    other = VectorQuantizer(7, 5, 0.5, 1e-3)
    assert (other.quantizer.codebook.beta, other.quantizer.codebook.epsilon) == (0.5, 1e-3)
    assert other.get_codebook().shape == (7, 5)
    assert other.get_codebook().abs().max() <= 1 / 7


@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (1, 1)])
def test_the_origin_gives_a_plain_tuple_of_map_loss_and_raster_indices(grid):
    torch.manual_seed(0)
    quantizer, features = VectorQuantizer(V, C), random_map(grid) / V
    output = quantizer(features)
    assert type(output) is tuple and len(output) == 3
    quantized, loss, idx = output
    rows = as_rows(features).double()
    expected = torch.stack([(rows - code).square().sum(1) for code in quantizer.get_codebook().double()], 1).argmin(1)
    assert torch.equal(idx, expected)
    torch.testing.assert_close(as_rows(quantized), quantizer.get_codebook()[expected])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1.25 * F.mse_loss(quantized, features).item(), rel=1e-6)


def test_beta_weighs_the_commitment_alone():
    losses = []
    for beta in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        losses.append(VectorQuantizer(V, C, beta)(random_map())[1].item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(3 * losses[0], rel=1e-6)


# What it says of itself


@both_codecs
def test_sizes_and_codes(layout):
    quantizer = build(layout, has_unit_codes=True)
    assert (quantizer.layout, quantizer.num_codes, quantizer.dim) == (layout, V, C)
    idx = torch.tensor([[3, 1], [0, 3]])
    torch.testing.assert_close(quantizer.lookup(idx), F.normalize(quantizer.codebook.weight, dim=1)[idx])
    assert torch.equal(quantizer.lookup(idx), quantizer.get_codebook()[idx])


@both_codecs
def test_unit_codes_go_with_every_codec(layout):
    quantizer, features = build(layout, has_unit_codes=True), random_map()
    quantized, _, idx_BL = quantizer(features)
    # The straight-through path runs through the normalisation, so length carries nothing.
    assert torch.equal(quantizer.indices(4 * features), idx_BL)
    torch.testing.assert_close(quantizer.idx_to_features(idx_BL), quantized, rtol=1e-5, atol=1e-5)


@both_codecs
def test_codes_start_from_the_vectors_of_a_map(layout):
    quantizer, features = build(layout), random_map(batch=8)
    quantizer.start_from(features, seed=3)
    vectors = quantizer.training_vectors(features).flatten(0, 1)
    assert (quantizer.get_codebook()[:, None] == vectors[None]).all(2).any(1).all()


def test_a_codebook_without_any_tensor_is_refused():
    codebook = LearnedCodebook(V, C)
    del codebook.weight
    with pytest.raises(ValueError, match="codebook is a LearnedCodebook without a floating-point tensor"):
        Quantizer(TileCodec(LAYOUTS["tiles"]), codebook)


# Precision


@both_codecs
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_half_types_leave_all_of_it_in_float32(layout, ema_decay, cast):
    quantizer = build(layout, ema_decay=ema_decay, revival_threshold=0.1)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    getattr(quantizer, cast)()
    torch.nn.Sequential(quantizer).to(getattr(torch, cast))
    for name, tensor in quantizer.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, before[name]), name
    assert {tensor.dtype for tensor in quantizer.double().state_dict().values()} == {torch.float64}


# Skipped steps


@pytest.mark.parametrize("was_skipped", [False, True])
def test_a_skipped_step_leaves_no_trace_and_forgets_what_was_recorded(was_skipped):
    options = {"ema_decay": 0.5, "revival_threshold": 0.5}
    quantizer, taken = build(LAYOUTS["scales"], **options), build(LAYOUTS["scales"], **options)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for each in (quantizer, taken):
        each(random_map())
    quantizer.after_step(0, 1, was_skipped=torch.tensor(was_skipped))
    taken.after_step(0, 1)
    assert not torch.equal(taken.codebook.weight, before["codebook.weight"])
    expected = before if was_skipped else taken.state_dict()
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    quantizer.after_step(0, 2)
    assert torch.equal(quantizer.codebook.weight, expected["codebook.weight"])
