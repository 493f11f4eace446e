"""Sampling block by block: cached equals uncached, nothing skipped that matters, one image one generator."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior import generation
from nextblock.prior.conditioning import ClassCondition
from nextblock.prior.generation import generate_blocks, num_guided_blocks
from nextblock.prior.sampling import SamplingOptions, truncate_logits
from nextblock.tokenizer import LearnedCodebook, Quantizer, ScaleCodec, TileCodec

GUIDANCE = {"none": (1.0, "constant"), "constant": (2.5, "constant"), "linear": (2.5, "linear")}
guidance = pytest.mark.parametrize(("guidance_scale", "schedule"), GUIDANCE.values(), ids=GUIDANCE.keys())
VARIANTS = {
    "plain": {},
    "shared": {"use_shared_adaln": True},
    "normalised": {"use_normalized_attention": True},
    "shared, normalised": {"use_shared_adaln": True, "use_normalized_attention": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
SCALES = BlockLayout.scales([1, 2, 3])


@pytest.fixture
def recorded(monkeypatch):
    """Record the logits that each block's tokens are drawn from."""
    blocks, sample = [], generation.sample_tokens

    def recording(logits, *args):
        blocks.append(logits)
        return sample(logits, *args)

    monkeypatch.setattr(generation, "sample_tokens", recording)
    return blocks


class GivenScales(SamplingOptions):
    """Options whose guidance no schedule gives."""

    def __init__(self, scales):
        super().__init__()
        object.__setattr__(self, "given", scales)

    def scales(self, num_blocks):
        assert num_blocks == len(self.given)
        return list(self.given)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def slow_logits(model, var_input, class_labels, scale):
    """Guided logits of all tokens from two full forward passes."""
    with torch.no_grad():
        conditional = model(var_input, class_labels).logits
        unconditional = model(var_input, torch.full_like(class_labels, model.config.num_classes)).logits
    return unconditional + scale * (conditional - unconditional)


def slow_generate(model, quantizer, class_labels, scales, uniforms, teacher_input, **truncation):
    """Run the whole model over the whole sequence for each block, skip nothing, and draw token by token."""
    layout, B = model.layout, len(class_labels)
    idx_Bl = [torch.zeros(B, length, dtype=torch.int64) for length in layout.block_lengths]
    for k, (start, end) in enumerate(layout.bounds):
        logits = slow_logits(model, teacher_input(model, quantizer, idx_Bl), class_labels, scales[k])
        probabilities = truncate_logits(logits, SamplingOptions(**truncation)).softmax(-1)
        for b in range(B):
            for i in range(start, end):
                cumulative = probabilities[b, i].cumsum(0)
                idx_Bl[k][b, i - start] = (cumulative <= uniforms[b, i] * cumulative[-1]).sum()
    return idx_Bl


def assert_same_blocks(idx_Bl, expected):
    assert len(idx_Bl) == len(expected)
    for k, (idx, other) in enumerate(zip(idx_Bl, expected, strict=True)):
        assert idx.dtype == torch.int64 and torch.equal(idx, other), f"block {k}"


@guidance
@variants
def test_cached_logits_equal_uncached_ones(
    layout_and_input, guidance_scale, schedule, variant, make_prior, make_quantizer, teacher_input, recorded
):
    layout, input_embedding = layout_and_input
    model, quantizer = make_prior(layout, input_embedding=input_embedding, **variant), make_quantizer(layout)
    class_labels = torch.tensor([0, 2, 3])
    options = {"guidance_scale": guidance_scale, "guidance_schedule": schedule}
    idx_Bl = model.generate(class_labels, quantizer, generator=generators([1, 2, 3]), **options)
    assert [tuple(idx.shape) for idx in idx_Bl] == [(3, length) for length in layout.block_lengths]
    assert torch.cat(idx_Bl, 1).unique().numel() > 2
    var_input = teacher_input(model, quantizer, idx_Bl)
    scales = SamplingOptions(**options).scales(layout.num_blocks)
    assert len(recorded) == layout.num_blocks
    for scale, logits, (start, end) in zip(scales, recorded, layout.bounds, strict=True):
        expected = slow_logits(model, var_input, class_labels, scale)[:, start:end]
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@guidance
@pytest.mark.parametrize("truncation", [{}, {"temperature": 1.7, "top_k": 6, "top_p": 0.8}], ids=["all", "truncated"])
def test_indices_equal_those_of_a_slow_generator(
    layout_and_input, guidance_scale, schedule, truncation, make_prior, make_quantizer, teacher_input
):
    layout, input_embedding = layout_and_input
    model, quantizer = make_prior(layout, input_embedding=input_embedding), make_quantizer(layout)
    class_labels = torch.tensor([1, 0])
    uniforms = torch.stack(
        [torch.rand(layout.num_tokens, generator=g, dtype=torch.float64) for g in generators([5, 6])]
    )
    options = {"guidance_scale": guidance_scale, "guidance_schedule": schedule}
    idx_Bl = model.generate(class_labels, quantizer, generator=generators([5, 6]), **options, **truncation)
    scales = SamplingOptions(**options).scales(layout.num_blocks)
    expected = slow_generate(model, quantizer, class_labels, scales, uniforms, teacher_input, **truncation)
    assert_same_blocks(idx_Bl, expected)


@pytest.mark.parametrize(
    ("scales", "num_guided"),
    [([1, 1, 1], 0), ([2, 1, 1], 1), ([1, 2, 1], 2), ([1, 1, 2], 3), ([2, 1, 2], 3), ([0, 0, 1], 2), ([1, 0, 0.5], 3)],
)
@pytest.mark.parametrize("layout", [SCALES, BlockLayout.tiles((1, 4), (3, 4))], ids=["scales", "rows"])
def test_unconditional_work_is_skipped_where_it_cannot_matter_and_only_there(
    scales, num_guided, layout, make_prior, make_quantizer, teacher_input
):
    model, quantizer = make_prior(layout), make_quantizer(layout)
    class_labels, uniforms = torch.tensor([1, 0]), torch.rand(2, layout.num_tokens, dtype=torch.float64)
    layer_rows, head_rows = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: layer_rows.append(len(args[0])))
    model.head.register_forward_pre_hook(lambda module, args: head_rows.append(len(args[0])))
    with torch.no_grad():
        condition = ClassCondition(class_labels, null_class=3)
        idx_Bl = generate_blocks(model, condition, quantizer, GivenScales(scales), uniforms)
    assert num_guided_blocks(scales) == num_guided
    assert layer_rows == [4 if k < num_guided else 2 for k in range(3)]
    assert head_rows == [2 if scale == 1 else 4 for scale in scales]
    assert_same_blocks(idx_Bl, slow_generate(model, quantizer, class_labels, scales, uniforms, teacher_input))


@guidance
@variants
def test_what_depends_on_the_class_alone_is_computed_once(
    guidance_scale, schedule, variant, make_prior, make_quantizer
):
    model, calls = make_prior(SCALES, **variant), []
    watched = [model.class_emb, model.head_nm.ada_lin]
    watched += [model.shared_ada_lin] if model.config.use_shared_adaln else [block.ada_lin for block in model.blocks]
    for module in watched:
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    model.generate(
        torch.tensor([0, 1]), make_quantizer(SCALES), guidance_scale=guidance_scale, guidance_schedule=schedule
    )
    assert len(calls) == len(watched) and set(calls) == set(watched)


def test_the_quantizer_is_not_called_for_a_table_of_tokens(make_prior, make_quantizer, monkeypatch):
    layout = BlockLayout.tiles(1, 3)
    model, quantizer = make_prior(layout, input_embedding="tokens"), make_quantizer(layout)
    monkeypatch.setattr(quantizer, "advance", None)
    model.generate(torch.tensor([0]), quantizer)


@guidance
def test_an_image_does_not_depend_on_the_batch_around_it(layout, guidance_scale, schedule, make_prior, make_quantizer):
    model, quantizer = make_prior(layout), make_quantizer(layout)
    class_labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 2])
    options = {"guidance_scale": guidance_scale, "guidance_schedule": schedule, "top_k": 8, "top_p": 0.95}

    def generate(rows):
        labels = class_labels[rows]
        return torch.cat(model.generate(labels, quantizer, generator=generators(rows.tolist()), **options), 1)

    eight = generate(torch.arange(8))
    assert eight.unique(dim=0).shape[0] > 3
    for i in range(8):
        assert torch.equal(generate(torch.tensor([i]))[0], eight[i])
    for rows in ([2, 0, 5], [7, 6, 1]):
        assert torch.equal(generate(torch.tensor(rows)), eight[rows])


def test_a_single_generator_gives_image_i_the_same_in_every_batch(make_prior, make_quantizer):
    model, quantizer = make_prior(SCALES), make_quantizer(SCALES)

    def generate(num_images, seed=11):
        labels = torch.zeros(num_images, dtype=torch.int64)
        return torch.cat(model.generate(labels, quantizer, generator=torch.Generator().manual_seed(seed)), 1)

    eight = generate(8)
    for num_images in (1, 3):
        assert torch.equal(generate(num_images), eight[:num_images])
    assert not torch.equal(generate(8, seed=12), eight)


def test_generation_leaves_the_global_generator_and_the_graph_alone(make_prior, make_quantizer):
    model, quantizer = make_prior(SCALES), make_quantizer(SCALES)
    quantizer.train()
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    model.generate(torch.tensor([0, 1]), quantizer, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_guidance_pulls_samples_towards_the_class(make_prior, make_quantizer):
    """A head that knows nothing but the class shows the sign and size of guidance in closed form."""
    layout = BlockLayout.tiles(1, 3)
    model, quantizer = make_prior(layout), make_quantizer(layout)
    with torch.no_grad():
        for block in model.blocks:  # gates at zero: what a block's input is no longer matters
            block.ada_lin[1].weight.zero_()
            block.ada_lin[1].bias.zero_()
        model.pos_1LC.zero_()
        model.lvl_embed.weight.zero_()
        model.word_embed.weight.zero_()
    labels = torch.tensor([1] * 400)
    greedy = model.generate(labels[:1], quantizer, top_k=1)[1]
    shares = []
    for scale in (0.0, 1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        idx_Bl = model.generate(labels, quantizer, guidance_scale=scale, generator=generator)
        shares.append((idx_Bl[1] == greedy).double().mean().item())
    with torch.no_grad():
        logits = model(torch.zeros(2, 8, dtype=torch.int64), torch.tensor([1, 3])).logits[:, 1]
    for scale, share in zip((0.0, 1.0, 3.0), shares, strict=True):
        expected = (logits[1] + scale * (logits[0] - logits[1])).softmax(0)[greedy.item()].item()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5 + 1e-9


def test_half_precision_and_autocast_generate_too(layout, make_prior, make_quantizer, recorded):
    quantizer = make_quantizer(layout).float()
    for use_normalized_attention in (False, True):
        model = make_prior(layout, use_normalized_attention=use_normalized_attention).float()
        options = {"guidance_scale": 2.0, "guidance_schedule": "linear"}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.generate(torch.tensor([0, 1]), quantizer, generator=generators([1, 2]), **options)
        low = model.bfloat16().generate(torch.tensor([0, 1]), quantizer, generator=generators([1, 2]), **options)
        for idx_Bl in (mixed, low):
            assert [tuple(idx.shape) for idx in idx_Bl] == [(2, length) for length in layout.block_lengths]
    assert {logits.dtype for logits in recorded} == {torch.float32}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 12}, "top_k is 12"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1; expected 2"),
        ({"generator": 3}, "generator is 3"),
        ({"class_labels": torch.tensor([0, 4])}, r"class_labels is \[0, 4\]; expected 0 to 3"),
        ({"class_labels": torch.tensor([-1, 0])}, r"class_labels is \[-1, 0\]"),
        ({"class_labels": torch.tensor([[0, 1]])}, r"class_labels is torch.int64 \(1, 2\)"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "class_labels is torch.float32"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options, message, make_prior, make_quantizer):
    model, quantizer = make_prior(SCALES), make_quantizer(SCALES)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"class_labels": torch.tensor([0, 1]), "quantizer": quantizer} | options)


def test_guidance_of_an_unconditional_model_is_refused(make_prior, make_quantizer):
    model, quantizer = make_prior(SCALES, num_classes=0), make_quantizer(SCALES)
    with pytest.raises(ValueError, match="guidance_scale is 1.5; expected 1 for a model without classes"):
        model.generate(torch.tensor([0, 0]), quantizer, guidance_scale=1.5)
    assert len(model.generate(torch.tensor([0, 0]), quantizer)) == 3


@pytest.mark.parametrize(
    ("sizes", "codec", "message"),
    [
        ((12, 4), ScaleCodec(SCALES, 4), "quantizer has 12 codes; expected 11"),
        ((11, 5), ScaleCodec(SCALES, 5), "quantizer has codes of 5 channels; expected 4"),
        ((11, 4), ScaleCodec(BlockLayout.scales([1, 3]), 4), "quantizer has layout .*'scales'"),
        ((11, 4), TileCodec(BlockLayout.tiles(1, 3)), "quantizer has layout .*'tiles'"),
    ],
)
def test_another_tokenizers_quantizer_is_refused(sizes, codec, message, make_prior):
    quantizer = Quantizer(codec, LearnedCodebook(*sizes))
    with pytest.raises(ValueError, match=message):
        make_prior(SCALES).generate(torch.tensor([0, 1]), quantizer)


def test_codes_of_any_width_serve_a_table_of_tokens(make_prior):
    layout = BlockLayout.tiles(1, 3)
    quantizer = Quantizer(TileCodec(layout), LearnedCodebook(11, 7))
    assert len(make_prior(layout).generate(torch.tensor([0]), quantizer)) == 9
    with pytest.raises(ValueError, match="quantizer has codes of 7 channels; expected 4"):
        make_prior(layout, input_embedding="codes").generate(torch.tensor([0]), quantizer)
