"""The prior's forward pass: no leakage, losses in closed form, initialisation, saving, refusal of bad input."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from nextblock.data.blocks import BlockLayout
from nextblock.prior import BlockPrior, BlockPriorConfig, PriorOutput
from nextblock.prior.attention import block_causal_attention

SCALES = BlockLayout.scales([1, 2, 3])
RASTER = BlockLayout.tiles(1, 3)


def assert_same_tensors(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# The contract


def test_outputs_without_and_with_labels(layout_and_input, make_prior, make_quantizer, make_indices, teacher_input):
    layout, input_embedding = layout_and_input
    model, idx_Bl = make_prior(layout, input_embedding=input_embedding), make_indices(layout)
    var_input = teacher_input(model, make_quantizer(layout), idx_Bl)
    class_labels, labels = torch.tensor([0, 3]), layout.join(idx_Bl)
    output = model(var_input, class_labels)
    assert isinstance(output, PriorOutput)
    assert output.logits.shape == (2, layout.num_tokens, 11)
    assert output.loss is None and output.token_loss is None and output.token_correct is None
    output = model(var_input, class_labels, labels)
    expected = -output.logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(output.token_loss, expected)
    torch.testing.assert_close(output.loss, expected.mean())
    assert torch.equal(output.token_correct, output.logits.argmax(-1) == labels)
    assert output.token_correct.dtype == torch.bool
    as_tuple = model(var_input, class_labels, labels, return_dict=False)
    assert type(as_tuple) is tuple
    for value, field in zip(as_tuple, ("loss", "logits", "token_loss", "token_correct"), strict=True):
        assert torch.equal(value, output[field])
    (logits,) = model(var_input, class_labels, return_dict=False)
    assert torch.equal(logits, output.logits)


def test_input_embedding_follows_the_layout_unless_named():
    assert BlockPriorConfig(layout=RASTER.to_dict()).input_embedding == "tokens"
    assert BlockPriorConfig(layout=SCALES.to_dict()).input_embedding == "codes"
    assert BlockPriorConfig(layout=RASTER.to_dict(), input_embedding="codes").input_embedding == "codes"


@pytest.mark.parametrize("label_smoothing", [0.1, 0.5])
def test_label_smoothing_in_closed_form(label_smoothing, make_prior):
    plain, smooth = make_prior(RASTER), make_prior(RASTER, label_smoothing=label_smoothing)
    inputs = torch.randint(11, (2, 8)), torch.tensor([0, 1]), torch.randint(11, (2, 9))
    without, output = plain(*inputs), smooth(*inputs)
    log_p = output.logits.log_softmax(-1)
    spread = -log_p.mean(-1)
    expected = (1 - label_smoothing) * without.token_loss + label_smoothing * spread
    torch.testing.assert_close(output.loss, expected.mean())
    torch.testing.assert_close(output.token_loss, without.token_loss)


def test_tokens_and_codes_agree_when_the_table_is_the_projected_codebook(make_prior, make_quantizer, make_indices):
    quantizer, idx_Bl = make_quantizer(RASTER), make_indices(RASTER)
    codes, tokens = (make_prior(RASTER, input_embedding=kind) for kind in ("codes", "tokens"))
    with torch.no_grad():
        state = codes.state_dict()
        weight, bias = state.pop("word_embed.weight"), state.pop("word_embed.bias")
        tokens.load_state_dict(state | {"word_embed.weight": quantizer.get_codebook() @ weight.T + bias})
        by_codes = codes(quantizer.var_input(RASTER.join(idx_Bl)), torch.tensor([0, 1])).logits
        by_tokens = tokens(torch.cat(idx_Bl[:-1], 1), torch.tensor([0, 1])).logits
    torch.testing.assert_close(by_tokens, by_codes)


def test_forward_is_the_sum_of_its_parts(layout, make_prior):
    """Embeddings, layers and head put together by hand."""
    model = make_prior(layout, input_embedding="codes")
    first_length = layout.block_lengths[0]
    var_input = torch.randn(2, layout.num_tokens - first_length, 4, dtype=torch.float64)
    class_labels = torch.tensor([1, 3])
    condition = model.class_emb.weight[class_labels]
    start = condition[:, None] + model.pos_start
    x = torch.cat([start, var_input @ model.word_embed.weight.T + model.word_embed.bias], 1)
    x = x + model.pos_1LC + model.lvl_embed.weight[layout.block_ids()]
    for block in model.blocks:
        x = block(x, block.modulation(condition), lambda *qkv: block_causal_attention(*qkv, layout, 1 / math.sqrt(8)))
    x = model.head_nm(x, model.head_nm.modulation(condition))
    torch.testing.assert_close(model(var_input, class_labels).logits, model.head(x))


# Leakage


def test_no_gradient_flows_back_from_later_blocks(layout, make_prior):
    model = make_prior(layout, input_embedding="codes")
    first = layout.block_lengths[0]
    var_input = torch.randn(2, layout.num_tokens - first, 4, dtype=torch.float64, requires_grad=True)
    logits = model(var_input, torch.tensor([0, 1])).logits
    for start, end in layout.bounds:
        (gradient,) = torch.autograd.grad(logits[:, start:end].square().sum(), var_input, retain_graph=True)
        # The input at token t stands at row t − L_1.
        assert not gradient[:, end - first :].any()
        if end > first:
            assert gradient[:, : end - first].abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize(
    "layout", [RASTER, BlockLayout.tiles((1, 4), (3, 4)), BlockLayout.tiles((1, 2), (6, 6))], ids=str
)
def test_no_index_is_seen_by_its_own_block_or_an_earlier_one(layout, make_prior, make_indices, teacher_input):
    model, idx_Bl, labels = make_prior(layout), make_indices(layout), torch.tensor([0, 1])
    assert model.config.input_embedding == "tokens"
    with torch.no_grad():
        logits = model(teacher_input(model, None, idx_Bl), labels).logits
        for k in range(layout.num_blocks - 1):
            changed = [*idx_Bl[:k], (idx_Bl[k] + 1) % 11, *idx_Bl[k + 1 :]]
            is_equal = (model(teacher_input(model, None, changed), labels).logits == logits).all(-1)
            _, end = layout.bounds[k]
            assert is_equal[:, :end].all()
            assert not is_equal[:, end:].any()


def test_a_sample_does_not_see_its_neighbours(layout, make_prior):
    model = make_prior(layout, input_embedding="codes")
    var_input = torch.randn(3, layout.num_tokens - layout.block_lengths[0], 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3])
    logits = model(var_input, labels).logits
    for b in range(3):
        alone = model(var_input[b : b + 1], labels[b : b + 1]).logits
        torch.testing.assert_close(alone[0], logits[b], rtol=1e-12, atol=1e-12)


# Initialisation


@pytest.mark.parametrize("use_shared_adaln", [False, True], ids=["separate", "shared"])
def test_a_fresh_model_is_as_good_as_guessing(layout_and_input, use_shared_adaln, make_prior, make_indices):
    layout, input_embedding = layout_and_input
    model = make_prior(layout, is_fresh=True, input_embedding=input_embedding, use_shared_adaln=use_shared_adaln)
    rest, labels = layout.num_tokens - layout.block_lengths[0], layout.join(make_indices(layout))
    var_input = torch.randint(11, (2, rest)) if input_embedding == "tokens" else torch.randn(2, rest, 4).double()
    assert model(var_input, torch.tensor([0, 1]), labels).loss.item() == pytest.approx(math.log(11), abs=0.02)


@pytest.mark.parametrize("use_shared_adaln", [False, True], ids=["separate", "shared"])
def test_weights_start_as_in_var(use_shared_adaln):
    torch.manual_seed(0)
    D, num_layers, gamma_init = 96, 3, 1e-2
    config = BlockPriorConfig(
        layout=BlockLayout.scales([8, 12]).to_dict(),
        vocab_size=200,
        num_classes=50,
        hidden_size=D,
        num_layers=num_layers,
        use_shared_adaln=use_shared_adaln,
        use_normalized_attention=True,
        adaln_gamma_init=gamma_init,
    )
    model, std = BlockPrior(config), (3 * D) ** -0.5
    expected = dict.fromkeys(["class_emb.weight", "word_embed.weight", "pos_start", "pos_1LC"], std)
    expected |= {"head.weight": 0.02 * std, "head_nm.ada_lin.1.weight": 0.5 * std}
    if use_shared_adaln:
        expected["shared_ada_lin.1.weight"] = std
    for i in range(num_layers):
        expected |= {f"blocks.{i}.{name}.weight": std for name in ("attn.mat_qkv", "ffn.fc1")}
        expected |= {f"blocks.{i}.{name}.weight": std / 6**0.5 for name in ("attn.proj", "ffn.fc2")}
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        assert parameters[name].std().item() == pytest.approx(value, rel=0.05), name
        assert abs(parameters[name].mean().item()) < 0.05 * value, name
    for name, parameter in parameters.items():
        assert "bias" not in name or not parameter.any(), name
    for block in model.blocks:
        torch.testing.assert_close(block.attn.scale_mul_1H11.detach(), torch.full((1, 4, 1, 1), math.log(4)))
        gates_and_rest, base = (
            (block.ada_gss[0, 0].flatten(), D**-0.5) if use_shared_adaln else (block.ada_lin[1].weight, std)
        )
        gates, rest = gates_and_rest[: 2 * D], gates_and_rest[2 * D :]
        tolerance = 0.2 if use_shared_adaln else 0.05
        assert gates.std().item() == pytest.approx(gamma_init * base, rel=tolerance)
        assert rest.std().item() == pytest.approx(0.5 * base, rel=tolerance)


def test_drop_path_rises_linearly_from_zero():
    config = BlockPriorConfig(num_layers=5, drop_path=0.2)
    assert [block.drop_path for block in BlockPrior(config).blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert BlockPrior(BlockPriorConfig(num_layers=1, drop_path=0.2)).blocks[0].drop_path == 0


def test_attention_scale_reaches_the_softmax(make_prior):
    inputs = torch.randint(11, (2, 8)), torch.tensor([0, 1])
    logits = [make_prior(RASTER, attention_scale=scale)(*inputs).logits for scale in (1.0, 0.25)]
    assert not torch.allclose(*logits)
    quarter = make_prior(RASTER)
    with torch.no_grad():
        for block in quarter.blocks:
            block.attn.mat_qkv.weight[:16] *= 0.25
            block.attn.q_bias *= 0.25
    torch.testing.assert_close(quarter(*inputs).logits, logits[1])


# Training


def test_every_parameter_learns(layout_and_input, make_prior, make_indices):
    layout, input_embedding = layout_and_input
    for options in ({}, {"use_shared_adaln": True, "use_normalized_attention": True}):
        model = make_prior(layout, input_embedding=input_embedding, dropout=0.1, drop_path=0.1, **options).train()
        rest = layout.num_tokens - layout.block_lengths[0]
        var_input = torch.randint(11, (8, rest)) if input_embedding == "tokens" else torch.randn(8, rest, 4).double()
        labels = layout.join(make_indices(layout, batch=8))
        model(var_input, torch.arange(8) % 4, labels).loss.backward()
        for name, parameter in model.named_parameters():
            if layout.num_blocks > 1 or "word_embed" not in name:
                assert parameter.grad.abs().max() > 0, name


def test_autocast_multiplies_in_bf16_and_gives_logits_and_loss_in_float32(layout, make_prior):
    model = make_prior(layout, input_embedding="codes").float()
    var_input = torch.randn(2, layout.num_tokens - layout.block_lengths[0], 4)
    exact, dtypes = model(var_input, torch.tensor([0, 1])).logits, []
    model.head.register_forward_hook(lambda module, args, output: dtypes.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(var_input, torch.tensor([0, 1]), torch.zeros(2, layout.num_tokens, dtype=torch.int64))
    # Normalised in float32; the product alone is in autocast's type.
    assert dtypes == [(torch.float32, torch.bfloat16)]
    assert output.logits.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits, exact, rtol=0.3, atol=0.3)
    assert not torch.equal(output.logits, exact)


@pytest.mark.parametrize("chunk", [{}, {"loss_chunk_size": 300}], ids=["whole", "chunks"])
def test_a_head_in_bf16_costs_next_to_nothing_of_the_loss(chunk, make_prior):
    layout = BlockLayout.scales([16, 20])
    model = make_prior(layout, input_embedding="codes", vocab_size=1000, hidden_size=64).float().train()
    var_input, classes = torch.randn(1, 400, 4), torch.tensor([1])
    with torch.no_grad():
        # Labels as likely as a trained model finds them; the logits' deviation is about 3.
        labels = torch.distributions.Categorical(logits=model(var_input, classes).logits).sample()
    exact = model(var_input, classes, labels)
    hidden_states: list = []
    hook = model.head_nm.register_forward_hook(lambda module, args, output: hidden_states.append(output))
    model(var_input, classes)
    hook.remove()
    # The head alone under autocast, on the very states of the float32 run.
    model.head_nm.forward = lambda *given: hidden_states[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(var_input, classes, labels, **chunk)
    difference = (output.token_loss - exact.token_loss).abs()
    assert 0 < difference.max() < 0.15 and (output.loss - exact.loss).abs() < 2e-3
    output.loss.backward()
    gradient, model.head.weight.grad = model.head.weight.grad, None
    exact.loss.backward()
    error = (gradient - model.head.weight.grad).norm() / model.head.weight.grad.norm()
    assert 0 < error < 0.01 and gradient.dtype == torch.float32


# On disk


@pytest.mark.parametrize("options", [{}, {"use_shared_adaln": True, "use_normalized_attention": True}], ids=str)
def test_a_saved_model_comes_back_equal(layout_and_input, options, make_prior, tmp_path):
    layout, input_embedding = layout_and_input
    model = make_prior(layout, input_embedding=input_embedding, class_names=["a", "b", "c"], **options).float()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    for loaded in (BlockPrior.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is BlockPrior and not loaded.training
        assert_same_tensors(model.state_dict(), loaded.state_dict())
        assert_same_tensors(dict(model.named_buffers()), dict(loaded.named_buffers()))
        assert loaded.layout == layout and loaded.config.class_names == ["a", "b", "c"]
        assert loaded.config.input_embedding == input_embedding
        rest = layout.num_tokens - layout.block_lengths[0]
        var_input = torch.randint(11, (2, rest)) if input_embedding == "tokens" else torch.randn(2, rest, 4)
        with torch.no_grad():
            outputs = [each(var_input, torch.tensor([0, 3])).logits for each in (model, loaded)]
        assert torch.equal(*outputs)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BlockPriorConfig


def test_half_precision_gives_float32_logits(make_prior, tmp_path):
    model = make_prior(RASTER).float()
    model.save_pretrained(tmp_path)
    half = BlockPrior.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = torch.randint(11, (2, 8)), torch.tensor([0, 1]), torch.randint(11, (2, 9))
    output = half(*inputs)
    assert output.logits.dtype == output.loss.dtype == output.token_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(*inputs).loss, rtol=0.1, atol=0.1)


def test_layouts_with_tuples_survive_the_round_trip(tmp_path):
    for layout in (
        {"kind": "scales", "scales": (1, (2, 3), [4, 6])},
        {"kind": "tiles", "tile": (1, 2), "grid": (4, 4)},
        {"kind": "tiles", "tile": 1, "grid": 4},
    ):
        config = BlockPriorConfig(layout=layout)
        config.save_pretrained(tmp_path)
        loaded = BlockPriorConfig.from_pretrained(tmp_path)
        assert loaded.layout == config.layout
        assert loaded.block_layout() == BlockLayout.from_dict(layout)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"var_input": torch.zeros(2, 12, 4)}, r"var_input has shape \(2, 12, 4\); expected \(2, 13, 4\)"),
        ({"var_input": torch.zeros(2, 13, 5)}, r"var_input has shape \(2, 13, 5\)"),
        ({"var_input": torch.zeros(3, 13, 4)}, r"var_input has shape \(3, 13, 4\); expected \(2, 13, 4\)"),
        ({"var_input": torch.zeros(2, 13, dtype=torch.int64)}, r"var_input has shape \(2, 13\)"),
        ({"var_input": torch.zeros(2, 13, 4, dtype=torch.int64)}, "var_input has dtype torch.int64; expected floating"),
        ({"class_labels": torch.tensor([0, 4])}, r"class_labels is \[0, 4\]; expected 0 to 3 \(3: no class\)"),
        ({"class_labels": torch.tensor([-1, 0])}, r"class_labels is \[-1, 0\]"),
        ({"class_labels": torch.tensor([0, 1], dtype=torch.int32)}, "class_labels is torch.int32"),
        ({"class_labels": torch.tensor([[0], [1]])}, r"class_labels is torch.int64 \(2, 1\)"),
        ({"class_labels": torch.tensor(0)}, r"class_labels is torch.int64 \(\)"),
        ({"labels": torch.zeros(2, 13, dtype=torch.int64)}, r"labels is torch.int64 \(2, 13\); expected .*\(2, 14\)"),
        ({"labels": torch.zeros(2, 14)}, r"labels is torch.float32 \(2, 14\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, make_prior):
    fitting = {"var_input": torch.zeros(2, 13, 4), "class_labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        make_prior(SCALES)(**fitting | change)


def test_vectors_are_refused_where_indices_are_due(make_prior):
    model = make_prior(RASTER)
    with pytest.raises(ValueError, match=r"var_input has shape \(2, 8, 4\); expected \(2, 8\)"):
        model(torch.zeros(2, 8, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="var_input has dtype torch.float32; expected torch.int64 indices"):
        model(torch.zeros(2, 8), torch.tensor([0, 1]))


def test_an_unconditional_model_knows_label_zero_alone(make_prior):
    model = make_prior(RASTER, num_classes=0)
    assert model(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0])).logits.shape == (1, 9, 11)
    with pytest.raises(ValueError, match=r"class_labels is \[1\]; expected 0 to 0"):
        model(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": {"kind": "rings"}}, "layout is {'kind': 'rings'}"),
        ({"layout": "scales"}, "layout is 'scales'"),
        ({"layout": {"kind": "scales", "scales": [2, 1]}}, r"scales\[1\] is \(1, 1\), smaller"),
        ({"layout": {"kind": "tiles", "tile": 3, "grid": 4}}, r"tile \(3, 3\) does not divide"),
        ({"num_heads": 5}, "num_heads is 5; expected a divisor of hidden_size 128"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\)"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"input_embedding": "words"}, "input_embedding is 'words'"),
        ({"layout": SCALES.to_dict(), "input_embedding": "tokens"}, "input_embedding is 'tokens'; expected 'codes'"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names has 1 names; expected .*2"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        BlockPriorConfig(**options)


def test_cross_entropy_is_the_loss_of_the_logits(make_prior):
    model = make_prior(RASTER)
    inputs, labels = (torch.randint(11, (2, 8)), torch.tensor([0, 1])), torch.randint(11, (2, 9))
    output = model(*inputs, labels)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
