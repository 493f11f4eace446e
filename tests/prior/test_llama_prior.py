"""The Llama and the GPT prior: cached as uncached, an independent Llama, training, refusals, compiling."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from nextblock.data.blocks import BlockLayout
from nextblock.prior import GPTPrior, GPTPriorConfig, LlamaPrior, LlamaPriorConfig
from nextblock.prior.conditioning import Condition
from nextblock.prior.family import compile_step, try_out
from nextblock.prior.generation import generate_blocks
from nextblock.prior.sampling import SamplingOptions
from nextblock.training.optim import OptimizerConfig, build_optimizer

from ..host_waits import META, HostWaits

LAYOUT, V, E = BlockLayout.tiles(1, [2, 3]), 11, 5
LENGTHS = {"equal": (3, 3), "ragged": (1, 4), "longest": (6, 2)}
KINDS = ("llama", "shared keys", *LENGTHS, "gpt", "gpt without classes")


def draw_weights(model):
    """Draw all weights anew: of a fresh model the head is zero, which hides mistakes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
    return model


def make(kind: str, **options) -> LlamaPrior | GPTPrior:
    """A tiny prior in evaluation mode."""
    sizes = {"layout": LAYOUT.to_dict(), "vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    if kind.startswith("gpt"):
        num_classes = 0 if kind.endswith("classes") else 3
        return draw_weights(GPTPrior(GPTPriorConfig(**sizes | {"num_classes": num_classes} | options))).eval()
    sizes |= {"text_dim": E, "max_text_positions": 6} if kind in LENGTHS else {"num_classes": 3}
    sizes |= {"num_key_value_heads": 2} if kind == "shared keys" else {}
    return draw_weights(LlamaPrior(LlamaPriorConfig(**sizes | {"inner_size": 24} | options))).eval()


def texts(*lengths: int, num_positions: int = 6) -> dict[str, torch.Tensor]:
    embeds = torch.randn(len(lengths), num_positions, E, generator=torch.Generator().manual_seed(5))
    return {"text_embeds": embeds, "text_mask": torch.arange(num_positions) < torch.tensor(lengths)[:, None]}


def condition_of(model, kind: str) -> Condition:
    """Two samples, and again without a condition where there is such a thing."""
    given = texts(*LENGTHS[kind]) if kind in LENGTHS else torch.tensor([0, 0] if kind.endswith("classes") else [2, 0])
    condition = model.conditions.of(given)
    return condition.joined(condition.null()) if condition.has_null else condition


def random_idx(batch: int) -> torch.Tensor:
    return torch.randint(V, (batch, LAYOUT.num_tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def cached_logits(model, condition, idx: torch.Tensor) -> torch.Tensor:
    context, cache = model.context(condition), model.new_cache(len(condition))
    hidden = [model.decode_block(None, 0, context, cache)]
    hidden += [model.decode_block(idx[:, k - 1 : k], k, context, cache) for k in range(1, LAYOUT.num_tokens)]
    return torch.cat([model.logits(each, context) for each in hidden], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_equals_uncached_under_every_mask(kind):
    model = make(kind).double()
    condition, idx = condition_of(model, kind), random_idx(2)
    uncached = model(idx.repeat(len(condition) // 2, 1)[:, :-1], condition).logits
    cached = cached_logits(model, condition, idx)
    torch.testing.assert_close(cached, uncached, rtol=1e-11, atol=1e-11)
    # Unread, a mask hides what was cut off otherwise; and rows do not depend on each other.
    if kind in LENGTHS:
        unread = model.conditions.of(texts(*LENGTHS[kind]), reads_range=False)
        unread = unread.joined(unread.null())
        assert not unread.is_whole and unread.text_mask.shape == (4, 6)
        torch.testing.assert_close(cached_logits(model, unread, idx), uncached, rtol=1e-11, atol=1e-11)
    for row in range(len(condition)):
        alone = model(idx[row % 2][None, :-1], condition[row : row + 1]).logits
        torch.testing.assert_close(alone[0], uncached[row], rtol=1e-11, atol=1e-11)


def plain_llama(model: LlamaPrior, prefix: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """Logits of one image, written down from the publication, position by position; prefix (n, D) without padding."""
    w, config = model.state_dict(), model.config
    h, d, n, columns = config.num_heads, config.hidden_size // config.num_heads, len(prefix), LAYOUT.grid[1]
    x = torch.cat([prefix, w["tok_embeddings.weight"][idx[:-1]]])

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turn(vector, position):
        if position < n:
            return torch.zeros_like(vector)
        cell, turned = divmod(position - n, columns), vector.clone()
        for pair in range(d // 2):
            place, at = divmod(pair, d // 4)
            angle = cell[place] * 10000.0 ** (-2 * at / (d / 2))
            a, b = vector[2 * pair], vector[2 * pair + 1]
            turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    for i in range(config.num_layers):
        of = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"layers.{i}.")}
        qkv = norm(x, of["attention_norm.weight"]) @ of["attention.wqkv.weight"].T
        q, k, v = qkv.unflatten(-1, (3, h, d)).unbind(1)
        out = torch.zeros_like(v)
        for head in range(h):
            for i_q in range(len(x)):
                scores = torch.stack([turn(q[i_q, head], i_q) @ turn(k[j, head], j) for j in range(i_q + 1)]) / d**0.5
                out[i_q, head] = scores.softmax(0) @ v[: i_q + 1, head]
        x = x + out.flatten(1) @ of["attention.wo.weight"].T
        y = norm(x, of["ffn_norm.weight"])
        gate = y @ of["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ of["feed_forward.w3.weight"].T)) @ of["feed_forward.w2.weight"].T
    return norm(x[n - 1 :], w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("kind", ["llama", "ragged"])
@torch.no_grad()
def test_a_llama_written_down_from_the_publication_computes_the_same(kind):
    model = make(kind).double()
    condition, idx = condition_of(model, kind), random_idx(2)
    got = model(idx.repeat(2, 1)[:, :-1], condition).logits
    for row in (0, 1, 3):
        if kind == "llama":
            prefix = model.cls_embedding.embedding_table.weight[[2, 0, 3, 3][row]][None]
        else:
            n, given = LENGTHS[kind][row % 2], texts(*LENGTHS[kind])["text_embeds"][row % 2].double()
            features = given[:n] if row < 2 else model.cls_embedding.uncond_embedding[-n:]
            hidden = F.gelu(features @ model.cls_embedding.cap_proj.fc1.weight.T, approximate="tanh")
            prefix = hidden @ model.cls_embedding.cap_proj.fc2.weight.T
        torch.testing.assert_close(plain_llama(model, prefix, idx[row % 2]), got[row], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_padded_features_never_leak():
    model, idx = make("ragged"), random_idx(2)
    given = texts(1, 4)
    expected = model(idx[:, :-1], **given).logits
    for value in (7.0, torch.nan, torch.inf):
        given["text_embeds"] = given["text_embeds"].masked_fill(~given["text_mask"][..., None], value)
        assert torch.equal(model(idx[:, :-1], **given).logits, expected)
    given["text_embeds"][1, 3] += 1
    changed = model(idx[:, :-1], **given).logits
    assert torch.equal(changed[0], expected[0]) and not torch.allclose(changed[1], expected[1])
    order = torch.tensor([5, 4, 0, 1, 2, 3])
    left = {name: tensor[:, order] for name, tensor in texts(1, 4).items()}
    torch.testing.assert_close(model(idx[:, :-1], **left).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "ragged", "gpt"])
def test_loss_in_chunks_and_checkpointed_layers_give_the_same_gradients(kind):
    model, idx = make(kind, dropout=0.2, embedding_dropout=0.1).double().train(), random_idx(2)
    given = (idx[:, :-1], condition_of(model, kind)[:2], idx.masked_fill(idx == 3, -100))

    def gradients(**options) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        output = model(*given, **options)
        output.loss.backward()
        assert (output.logits is None) == bool(options) and not output.token_loss[idx == 3].any()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()} | {"loss": output.loss}

    expected = gradients()
    got = [gradients(loss_chunk_size=5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got.append(gradients())
    for each in got:
        for name, tensor in expected.items():
            torch.testing.assert_close(each[name], tensor, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["llama", "ragged", "gpt"])
@torch.no_grad()
def test_saved_and_loaded_again_computes_the_same(kind, tmp_path):
    model, idx = make(kind), random_idx(2)
    condition = condition_of(model, kind)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    both = [each(idx.repeat(len(condition) // 2, 1)[:, :-1], condition).logits for each in (model, again)]
    assert torch.equal(*both) and again.config.to_diff_dict().items() >= model.config.to_diff_dict().items()
    output = model(idx[:, :-1], condition[:2], idx, return_dict=False)
    assert isinstance(output, tuple) and output[1].shape == (2, 6, V)


class AnyQuantizer:
    """Stands for a tokenizer's: a prior that takes indices asks nothing of it."""

    def start(self, num_images):
        return None


@torch.no_grad()
def sampled(model, condition, **options) -> torch.Tensor:
    uniforms = torch.rand(len(condition), LAYOUT.num_tokens, generator=torch.Generator().manual_seed(7)).double()
    return torch.cat(generate_blocks(model, condition, AnyQuantizer(), SamplingOptions(**options), uniforms), 1)


@pytest.mark.parametrize(("kind", "num_graphs"), [("llama", 1), ("ragged", 2), ("gpt", 1)])
def test_a_step_is_one_graph_that_serves_all_tokens(kind, num_graphs):
    torch._dynamo.reset()
    model = make(kind)
    condition = condition_of(model, kind)[:2]
    options = {"guidance_scale": 2.0} if condition.has_null else {}
    expected = sampled(model, condition, **options)
    traced = CompileCounter()
    compile_step(model, backend=traced, fullgraph=True)
    assert torch.equal(sampled(model, condition, **options), expected) and traced.frame_count == num_graphs
    assert torch.equal(sampled(model, condition, **options), expected) and traced.frame_count == num_graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "ragged", "gpt"])
def test_no_step_waits_for_a_device(kind):
    model = make(kind, dropout=0.1).to(META).train()
    condition, idx = condition_of(model, kind)[:2].to(META), torch.zeros(2, 6, dtype=torch.int64, device=META)
    optimizer = build_optimizer(model, OptimizerConfig(), model.no_decay)
    for param in model.parameters():
        param.grad = None

    def step():
        dropped = condition.dropped(0.5, 1, 2, samples=torch.zeros(2, dtype=torch.int64, device=META))
        model(idx[:, :-1], dropped, idx, loss_chunk_size=5).loss.backward()

    step()  # What is made once a device, is.
    with HostWaits() as waits:
        step()
    assert waits.found == [] and len(optimizer.param_groups) == 2
    model.eval()
    with torch.no_grad():
        context, cache = model.context(condition), model.new_cache(2)
        for k in range(4):
            with HostWaits() as waits:
                content = None if k == 0 else idx[:, :1]
                model.logits(model.decode_block(content, k, context, cache), context)
            assert waits.found == [] or k == 0


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "ragged", "gpt"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(kind, is_autocast):
    model, idx = make(kind), random_idx(2)
    condition = condition_of(model, kind)[:2]
    expected, cached = model(idx[:, :-1], condition).logits, cached_logits(model, condition, idx)
    model = model if is_autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        for got in (model(idx[:, :-1], condition).logits, cached_logits(model, condition, idx)):
            assert got.dtype == torch.float32 and (got - expected).abs().max() < 0.1 * expected.std()
    torch.testing.assert_close(cached, expected)


def test_a_fresh_prior_guesses():
    torch.manual_seed(0)
    for kind in ("llama", "ragged", "gpt"):
        config = make(kind).config
        model = (GPTPrior if kind == "gpt" else LlamaPrior)(config)
        try_out(model)
        idx = random_idx(2)
        condition = condition_of(model, kind)[:2]
        # LlamaGen's head starts at zero.
        tolerance = 0.1 if kind == "gpt" else 1e-6
        assert model(idx[:, :-1], condition, idx).loss.item() == pytest.approx(math.log(V), abs=tolerance)


def test_no_text_trains_the_projection_and_not_the_table():
    model = make("ragged").train()
    condition, idx = condition_of(model, "ragged"), random_idx(2)
    model(idx[:, :-1], condition[2:], idx).loss.backward()
    assert model.cls_embedding.cap_proj.fc1.weight.grad.abs().sum() > 0
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())


def test_weight_decay_is_the_published_one():
    for kind, names in (("llama", {"norm"}), ("gpt", {"ln", "bias", "tok_emb", "pos_emb"})):
        model = make(kind)
        _, undecayed = build_optimizer(model, OptimizerConfig(), model.no_decay).param_groups
        chosen = {id(parameter) for parameter in undecayed["params"]}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in chosen) == any(part in name for part in names), name


INPUT, CLASSES = random_idx(2)[:, :-1], torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("llama", {"var_input": INPUT.float()}, "var_input has dtype torch.float32; expected torch.int64 indices"),
        ("llama", {"var_input": INPUT[:, 1:]}, r"var_input has shape \(2, 4\); expected \(2, 5\)"),
        ("llama", {"var_input": INPUT + V}, "var_input holds .*; expected 0 to 10"),
        ("llama", {"class_labels": CLASSES + 3}, "class_labels is .*; expected 0 to 3 .3: no class."),
        ("llama", {"class_labels": None}, "is None; expected"),
        ("llama", {"class_labels": None, **texts(2, 2)}, "text_embeds is given; expected class_labels"),
        ("llama", {"orders": INPUT}, "orders is given; expected None for LlamaPrior"),
        ("ragged", {"class_labels": None}, "text_embeds is None; expected text features"),
        ("ragged", {**texts(2, 2)}, "class_labels and text_embeds are both given"),
        ("ragged", {"class_labels": CLASSES}, "the condition is Tensor; expected text_embeds and text_mask"),
        ("ragged", {"class_labels": None, **texts(2)}, r"var_input has shape \(2, 5\); expected \(1, 5\)"),
        ("gpt", {"class_labels": CLASSES + 2}, r"class_labels is \[2, 3\]; expected 0 to 2$"),
        ("gpt", {"orders": INPUT}, "orders is given; expected None for GPTPrior"),
        ("gpt without classes", {}, r"class_labels is \[0, 1\]; expected 0 to 0"),
        ("gpt", {"loss_chunk_size": 3}, "loss_chunk_size is 3 but labels is None"),
    ],
)
def test_wrong_arguments_are_refused_by_name(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind)(**{"var_input": INPUT, "class_labels": CLASSES} | arguments)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (LlamaPriorConfig, {"num_heads": 3}, "num_heads is 3; expected a divisor of hidden_size 128"),
        (LlamaPriorConfig, {"num_heads": 64}, "heads of width 2 at hidden_size 128; expected a width"),
        (LlamaPriorConfig, {"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_heads 4"),
        (LlamaPriorConfig, {"text_dim": 3, "num_classes": 2}, "num_classes is 2; expected 0 with text_dim, 3"),
        (LlamaPriorConfig, {"dropout": 1.0}, r"dropout is 1.0; expected a number in \[0, 1\)"),
        (LlamaPriorConfig, {"rope_base": 0.0}, "rope_base is 0.0; expected a finite number above 0"),
        (LlamaPriorConfig, {"layout": BlockLayout.scales([1, 2]).to_dict()}, "expected tiles of one cell"),
        (LlamaPriorConfig, {"layout": BlockLayout.tiles(2, 4).to_dict()}, "expected tiles of one cell"),
        (LlamaPriorConfig, {"mlp_ratio": 2.0}, "LlamaPriorConfig has no field mlp_ratio"),
        (LlamaPriorConfig, {"class_names": ["a"]}, "class_names has 1 names; expected 0, one a class"),
        (GPTPriorConfig, {"num_classes": 17}, "num_classes is 17; expected at most vocab_size, 16"),
        (GPTPriorConfig, {"start_token": 16}, "start_token is 16; expected an integer from 0 to 15"),
        (GPTPriorConfig, {"num_positions": 63}, "num_positions is 63; expected an integer from 64"),
        (GPTPriorConfig, {"attention_dropout": -0.1}, "attention_dropout is -0.1; expected a number"),
        (GPTPriorConfig, {"hidden_size": "wide"}, "hidden_size is 'wide'; expected an integer"),
    ],
)
def test_wrong_fields_are_refused_by_name(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**options)
