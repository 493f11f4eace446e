"""RAR's prior: any order, the cache beside whole passes, known tokens first, losses in block order."""

import pytest
import torch
from transformers import AutoModel

from nextblock.data.blocks import BlockLayout
from nextblock.prior import RARPrior, RARPriorConfig, generation
from nextblock.prior.sampling import SamplingOptions
from nextblock.prior.task import try_out
from nextblock.training.optim import OptimizerConfig, build_optimizer

from .conftest import EMBEDDING_DIM, VOCAB_SIZE

LAYOUT = BlockLayout.tiles(1, (3, 4))
L = LAYOUT.num_tokens
SIZES = {"vocab_size": VOCAB_SIZE, "num_classes": 3, "hidden_size": 16}
SIZES |= {"num_layers": 2, "num_heads": 2}
GUIDANCE = {
    "none": {},
    "constant": {"guidance_scale": 2.5},
    "open": {"guidance_scale": 3.0, "guidance_schedule": "power-cosine-open", "guidance_power": 2.0},
    "open, constant": {"guidance_scale": 3.0, "guidance_schedule": "power-cosine-open", "guidance_power": 0},
}


@pytest.fixture
def make_rar():
    """Build a tiny float64 prior in evaluation mode; fresh layers are the identity, so all weights are drawn anew."""

    def make(seed: int = 0, layout: BlockLayout = LAYOUT, is_fresh: bool = False, **options) -> RARPrior:
        torch.manual_seed(seed)
        model = RARPrior(RARPriorConfig(layout=layout.to_dict(), **SIZES | options)).double().eval()
        if not is_fresh:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5)
                model.lm_head.weight.mul_(2)
        return model

    return make


@pytest.fixture
def drawn_from(monkeypatch):
    """Record the logits that each token is drawn from."""
    logits, sample = [], generation.sample_tokens
    monkeypatch.setattr(
        generation, "sample_tokens", lambda scores, *args: logits.append(scores) or sample(scores, *args)
    )
    return logits


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def random_orders(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(L, generator=generator) for _ in range(count)])


def random_tokens(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (count, L), generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 2, 3])


@torch.no_grad()
def test_an_order_is_raster_of_a_model_whose_positions_are_permuted(make_rar):
    model, idx, order = make_rar(), random_tokens(), random_orders(1)[0]
    expected = model(idx, LABELS, orders=order.expand(3, -1)).logits
    for table in (model.pos_embed, model.target_aware_pos_embed):
        table[0, 2 : L + 2] = table[0, order + 2]
    raster = model(idx[:, order[:-1]], LABELS).logits
    torch.testing.assert_close(expected[:, order], raster, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_token_is_predicted_from_those_before_it_in_the_order_alone(make_rar):
    model, idx, orders = make_rar(), random_tokens(), random_orders(3)
    before = model(idx, LABELS, orders=orders).logits.gather(1, orders[..., None].expand(-1, -1, VOCAB_SIZE))
    for j in range(L):
        changed = idx.scatter(1, orders[:, j : j + 1], (idx.gather(1, orders[:, j : j + 1]) + 1) % VOCAB_SIZE)
        after = model(changed, LABELS, orders=orders).logits.gather(1, orders[..., None].expand(-1, -1, VOCAB_SIZE))
        assert torch.equal(after[:, : j + 1], before[:, : j + 1])
        assert (after[:, j + 1 :] != before[:, j + 1 :]).any(-1).all()


@torch.no_grad()
def test_raster_given_as_orders_is_raster_and_the_last_token_comes_from_the_labels(make_rar):
    model, idx, orders = make_rar(), random_tokens(), random_orders(3)
    raster = torch.arange(L).expand(3, -1)
    whole, given = model(idx[:, :-1], LABELS, idx), model(idx[:, :-1], LABELS, idx, orders=raster)
    torch.testing.assert_close(given.logits, whole.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given.loss, whole.loss, rtol=1e-12, atol=1e-12)
    short, long = model(idx[:, :-1], LABELS, idx, orders=orders), model(idx, LABELS, idx, orders=orders)
    assert all(torch.equal(short[name], long[name]) for name in ("loss", "logits", "token_loss", "token_correct"))


def test_losses_stay_in_block_order_whole_or_in_chunks(make_rar):
    model, idx, orders = make_rar(label_smoothing=0.1), random_tokens(), random_orders(3)
    labels = idx.clone()
    labels[0, 3], labels[2, 5:7] = -100, -100
    output = model(idx, LABELS, labels, orders=orders)
    expected = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(output.token_loss, expected)
    assert (output.token_loss[0, 3] == 0) and not output.token_correct[2, 5:7].any()
    in_chunks = model(idx, LABELS, labels, orders=orders, loss_chunk_size=5)
    assert in_chunks.logits is None
    gradients = []
    for each in (output, in_chunks):
        torch.testing.assert_close(each.loss, output.loss)
        torch.testing.assert_close(each.token_loss, output.token_loss)
        assert torch.equal(each.token_correct, output.token_correct)
        gradients.append(torch.autograd.grad(each.loss, list(model.parameters())))
    for name, whole, chunked in zip(dict(model.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(whole, chunked, msg=name)


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE.keys())
@pytest.mark.parametrize("order", ["raster", tuple(random_orders(1, seed=4)[0].tolist())], ids=["raster", "order"])
@pytest.mark.parametrize("share_known", [0, 0.5, 1], ids=["all sampled", "half known", "all known"])
def test_cached_logits_equal_uncached_ones(guidance, order, share_known, make_rar, make_quantizer, drawn_from):
    model, quantizer, known = make_rar(), make_quantizer(LAYOUT), random_tokens()
    is_known = torch.rand(3, L, generator=torch.Generator().manual_seed(2)) < share_known
    given = None if not share_known else LAYOUT.split(torch.where(is_known, known, -1))
    options = {"order": order, **guidance}
    idx_Bl = model.generate(LABELS, quantizer, generator=generators(3), given_idx_Bl=given, **options)
    idx = torch.cat(idx_Bl, dim=1)
    assert [tuple(block.shape) for block in idx_Bl] == [(3, 1)] * L and torch.equal(idx[is_known], known[is_known])
    base = list(range(L)) if order == "raster" else list(order)
    orders = torch.tensor([sorted(base, key=lambda i, row=row: not row[i]) for row in is_known.tolist()])
    scales = torch.tensor(SamplingOptions(**options).scales(L), dtype=torch.float64)[:, None]
    with torch.no_grad():
        cond, uncond = (model(idx, labels, orders=orders).logits for labels in (LABELS, torch.full_like(LABELS, 3)))
    expected = [each.gather(1, orders[..., None].expand(-1, -1, VOCAB_SIZE)) for each in (cond, uncond)]
    expected = expected[1] + scales * (expected[0] - expected[1])
    torch.testing.assert_close(torch.cat(drawn_from, dim=1), expected, rtol=1e-10, atol=1e-10)


def test_modulations_computed_ahead_serve_any_number_of_rows(make_rar, make_quantizer, monkeypatch):
    model, quantizer = make_rar(), make_quantizer(LAYOUT)

    def sampled():
        # Unconditional rows are dropped on the way.
        def receive(step):
            if step.block == 5:
                step.scales[6:] = [1.0] * (L - 6)

        options = {"guidance_scale": 2.0, "on_block_end": receive}
        return torch.cat(model.generate(LABELS, quantizer, generator=generators(3), **options), dim=1)

    expected = sampled()
    for rows in (1, 12, 36, 1000):
        monkeypatch.setattr("nextblock.prior.modeling_rar_prior.MODULATED_ROWS", rows)
        assert torch.equal(sampled(), expected)


def test_what_stops_early_leaves_the_tokens_after_it_unknown(make_rar, make_quantizer):
    model, quantizer, order, maps = make_rar(), make_quantizer(LAYOUT), random_orders(1)[0], []

    def receive(step):
        step.advance()
        maps.append(step.canvas.clone())
        assert step.places.tolist() == [[order[step.block]]] * 2
        step.is_last = step.block == 4

    whole = model.generate(torch.tensor([0, 1]), quantizer, generator=generators(2), order=order)
    options = {"generator": generators(2), "order": order, "on_block_end": receive}
    idx = torch.cat(model.generate(torch.tensor([0, 1]), quantizer, **options), dim=1)
    assert (idx[:, order[5:]] == -1).all() and torch.equal(idx[:, order[:5]], torch.cat(whole, 1)[:, order[:5]])
    codes = quantizer.lookup(idx.clamp_min(0)).masked_fill(idx[..., None] < 0, 0)
    assert torch.equal(maps[-1].flatten(2).mT, codes)


def test_a_tokens_random_number_is_its_own_in_every_order(make_rar, make_quantizer):
    """With logits that see nothing, only the numbers tell tokens apart."""
    model, quantizer = make_rar(), make_quantizer(LAYOUT)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    drawn = [
        torch.cat(model.generate(LABELS, quantizer, generator=generators(3), order=order), 1)
        for order in ("raster", random_orders(1)[0], random_orders(1, seed=3)[0])
    ]
    assert drawn[0].unique().numel() > 3
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_saved_is_loaded_and_moved_to_half(make_rar, tmp_path):
    model, idx, orders = make_rar().float(), random_tokens(), random_orders(3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is RARPrior and loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        expected = model(idx, LABELS, orders=orders).logits
        assert torch.equal(loaded(idx, LABELS, orders=orders).logits, expected)
        half = loaded.bfloat16()(idx, LABELS, orders=orders).logits
    assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.1 * expected.std()


def test_a_fresh_model_is_the_identity_and_as_a_family_must_be(make_rar):
    model = make_rar(is_fresh=True)
    try_out(model)
    assert not any(layer.adaLN_modulation[1].weight.any() for layer in model.blocks)
    assert 0.015 < model.embeddings.weight.std() < 0.025 and model.embeddings.weight.abs().max() > 0
    assert (model.blocks[0].attn.q_norm.weight == 1).all() and 0.01 < model.pos_embed.std() < 0.03
    unconditional = make_rar(is_fresh=True, num_classes=0)
    try_out(unconditional)
    assert not unconditional.conditions.has_null


def test_weights_are_decayed_as_published(make_rar):
    model = make_rar()
    undecayed = {"embeddings.weight", "class_emb.weight", "pos_embed", "target_aware_pos_embed"}
    undecayed |= {"timesteps_embeddings", "adaln_before_head.adaLN_modulation.1.weight"}
    optimizer = build_optimizer(model, OptimizerConfig(), model.no_decay)
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name not in undecayed), name
    assert id(model.cls_token) in decayed


def test_checkpointing_and_dropout(make_rar):
    model, idx, orders = make_rar(dropout=0.3, attention_dropout=0.3), random_tokens(), random_orders(3)
    model.train()

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return torch.autograd.grad(model(idx, LABELS, idx, orders=orders).loss, list(model.parameters()))

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for got, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, expected)
    losses = set()
    for rates in ((0.3, 0), (0, 0.3), (0, 0)):
        model.config.attention_dropout = rates[1]
        for layer in model.blocks:
            layer.attn.dropout.p = layer.mlp.dropout.p = rates[0]
        torch.manual_seed(0)
        losses.add(model(idx, LABELS, idx, orders=orders).loss.item())
    assert len(losses) == 3


def test_a_step_is_one_graph_for_all_tokens(make_rar, make_quantizer, monkeypatch):
    monkeypatch.setattr("nextblock.prior.modeling_rar_prior.MODULATED_ROWS", 24)
    layout = BlockLayout.tiles(1, (1, 5))
    model, quantizer, graphs = make_rar(layout=layout, num_layers=1), make_quantizer(layout), []
    options = {"guidance_scale": 2.0, "order": [3, 1, 0, 4, 2]}
    expected = torch.cat(model.generate(LABELS, quantizer, generator=generators(3), **options), 1)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.blocks.compile(backend=backend, fullgraph=True)
    assert torch.equal(torch.cat(model.generate(LABELS, quantizer, generator=generators(3), **options), 1), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": torch.arange(L)}, r"orders is torch.int64 \(12,\); expected torch.int64 \(3, 12\)"),
        ({"orders": torch.zeros(3, L, dtype=torch.int64)}, r"orders\[0\] is .* expected .* permutation of 0 to 11"),
        ({"orders": random_orders(2)}, r"orders is torch.int64 \(2, 12\)"),
        ({"orders": "raster"}, "orders is a str"),
        ({"var_input": random_tokens()[:, :-1], "orders": random_orders(3)}, r"expected \(3, 12\), or labels"),
        ({"var_input": random_tokens()[:, :-2], "orders": random_orders(3)}, r"var_input has shape \(3, 10\)"),
        ({"var_input": random_tokens()}, r"var_input has shape \(3, 12\); expected \(3, 11\)"),
        ({"var_input": random_tokens() + 11, "orders": random_orders(3)}, "var_input holds .*; expected 0 to 10"),
        ({"var_input": random_tokens().float(), "orders": random_orders(3)}, "var_input has dtype torch.float32"),
        ({"var_input": torch.zeros(3, L - 1, EMBEDDING_DIM)}, "var_input has shape"),
        ({"class_labels": torch.tensor([0, 1, 4])}, "expected 0 to 3"),
        ({"loss_chunk_size": 4}, "loss_chunk_size is 4 but labels is None"),
    ],
)
def test_wrong_calls_are_refused_by_name(change, message, make_rar):
    call = {"var_input": random_tokens()[:, :-1], "class_labels": LABELS} | change
    if "orders" in change and "var_input" not in change:
        call["var_input"] = random_tokens()
    with pytest.raises(ValueError, match=message):
        make_rar()(**call)


def test_an_ignored_last_label_is_no_input(make_rar):
    model, idx, labels = make_rar(), random_tokens(), random_tokens()
    labels[1, -1] = -100
    with pytest.raises(ValueError, match=r"labels\[:, -1\] holds -100; expected codes, or var_input of shape"):
        model(idx[:, :-1], LABELS, labels, orders=random_orders(3))
    raster = torch.arange(L).expand(3, -1)
    assert model(idx[:, :-1], LABELS, labels, orders=raster).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": list(range(L - 1))}, "order has 11 entries; expected 12, one a token"),
        ({"order": [0] * L}, "expected 'raster', or a permutation"),
        ({"is_smooth": True}, "is_smooth is True"),
        ({"given_idx_Bl": [torch.full((2, 1), -1)] * L}, r"given_idx_Bl\[0\] has 2 rows .*; expected 3 rows"),
    ],
)
def test_wrong_sampling_is_refused_by_name(options, message, make_rar, make_quantizer):
    with pytest.raises(ValueError, match=message):
        make_rar().generate(LABELS, make_quantizer(LAYOUT), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": BlockLayout.tiles((1, 2), 4).to_dict()}, "layout is .*; expected tiles of one cell"),
        ({"layout": BlockLayout.scales([1, 2]).to_dict()}, "expected tiles of one cell"),
        ({"num_position_rows": 65}, "num_position_rows is 65; expected an integer from 66"),
        ({"num_step_rows": 64}, "num_step_rows is 64; expected an integer from 65"),
        ({"num_heads": 3}, "num_heads is 3; expected a divisor of hidden_size 128"),
        ({"inner_size": 0}, "inner_size is 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0; expected a number in \[0, 1\)"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"mlp_ratio": 4.0}, "RARPriorConfig has no field mlp_ratio"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names has 1 names; expected 2"),
        ({"num_layers": 1024, "hidden_size": 1 << 17, "inner_size": 8}, "make a model of about"),
    ],
)
def test_configurations_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        RARPriorConfig(**options)
