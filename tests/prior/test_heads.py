"""Heads of digits: their likelihood against sums over all codes, what they learn from, and what they refuse."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nextblock.data.blocks import BlockLayout
from nextblock.files.fingerprints import model_options
from nextblock.prior import BlockPriorConfig
from nextblock.prior.head_losses import head_output
from nextblock.prior.head_plan import HeadOptions, HeadPlan, configured_plan, cosine_passes, training_digits
from nextblock.prior.heads import DigitEmbedding, TokenEmbedding, build_head

from .heads_of_digits import BASES, CODES, HEADS, V, columns, digits_of, plain_loss, scores_of

D = 6
heads = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())


def make_head(options, seed=0):
    """A float64 head whose every weight has a say, and its plan."""
    torch.manual_seed(seed)
    config = BlockPriorConfig(**CODES | options)
    head = build_head(config, D).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return head, configured_plan(config)


@heads
def test_the_loss_is_the_logarithm_of_a_probability_that_sums_to_one_over_all_codes(options):
    head, plan = make_head(options)
    hidden = torch.randn(2, 1, D, dtype=torch.float64).expand(2, V, D)
    output = head_output(head, plan, hidden, torch.arange(V).expand(2, V))
    torch.testing.assert_close((-output.token_loss).exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(output.loss, output.token_loss.mean())
    for row, idx in itertools.product(range(2), range(V)):
        expected = plain_loss(scores_of(head, hidden[row, 0]), plan, idx)
        assert abs(output.token_loss[row, idx].item() - expected) < 1e-9
    # Each digit's scores are those that its loss is made of.
    assert output.logits.shape == (2, V, sum(plan.bases))
    for own, true in zip(
        columns(plan.bases), torch.tensor([digits_of(i, plan.bases) for i in range(V)]).T, strict=True
    ):
        output.token_loss -= F.cross_entropy(
            output.logits[..., own].transpose(1, 2), true.expand(2, V), reduction="none"
        )
    torch.testing.assert_close(output.token_loss, torch.zeros(2, V, dtype=torch.float64), atol=1e-9, rtol=0)


@heads
def test_a_token_is_correct_where_no_digit_is_likelier(options):
    head, plan = make_head(options)
    hidden = torch.randn(1, 1, D, dtype=torch.float64).expand(1, V, D)
    output = head_output(head, plan, hidden, torch.arange(V)[None])
    expected = []
    for idx in range(V):
        parts = zip(columns(plan.bases), digits_of(idx, plan.bases), strict=True)
        expected.append(all(output.logits[0, idx, own].argmax() == digit for own, digit in parts))
    assert output.token_correct.tolist() == [expected] and sum(expected) == 1


@heads
def test_ignored_labels_and_label_smoothing(options):
    head, plan = make_head(options)
    hidden, labels = torch.randn(2, 5, D, dtype=torch.float64), torch.randint(V, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    output = head_output(head, plan, hidden, labels, label_smoothing=0.2)
    assert output.token_loss[0, 1] == output.token_loss[1, 4] == 0 and not output.token_correct[0, 1]
    expected, token_loss = 0.0, []
    for b, n in itertools.product(range(2), range(5)):
        if labels[b, n] < 0:
            continue
        for own, digit in zip(columns(plan.bases), digits_of(labels[b, n].item(), plan.bases), strict=True):
            log_p = output.logits[b, n, own].log_softmax(0)
            expected -= (0.8 * log_p[digit] + 0.2 * log_p.mean()) / 8
        token_loss.append(plain_loss(scores_of(head, hidden[b, n]), plan, labels[b, n].item()))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.token_loss[labels >= 0], torch.tensor(token_loss, dtype=torch.float64))


@heads
@pytest.mark.parametrize("is_training", [False, True])
def test_a_loss_in_chunks_is_the_whole_one(options, is_training):
    head, plan = make_head(options)
    labels, known = torch.randint(V, (2, 5)), None
    labels[1, 2] = -100
    if plan.is_masked and is_training:
        known = plan.draw_known(torch.rand(2, 5, plan.num_digits + 1))
    results = []
    for chunk_size in (None, 1, 4, 99):
        hidden = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given = {"label_smoothing": 0.1, "chunk_size": chunk_size, "known_digits": known, "is_training": is_training}
        output = head_output(head, plan, hidden, labels, **given)
        assert (output.logits is None) == (chunk_size is not None)
        assert chunk_size is None or not output.token_loss.requires_grad
        head.zero_grad()
        output.loss.backward()
        gradients = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
        results.append([output.loss, output.token_loss, output.token_correct, *(g.clone() for g in gradients)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected)


def test_what_a_masked_head_learns_from_is_the_bound_over_all_orders():
    head, plan = make_head(HEADS["masked"])
    hidden, labels, n = torch.randn(1, 1, D, dtype=torch.float64), torch.tensor([[13]]), len(BASES)
    # Every number of hidden digits, and every choice of them, is as likely.
    expected_loss = 0.0
    for m in range(1, n + 1):
        choices = list(itertools.combinations(range(n), m))
        for hidden_ones in choices:
            known = torch.tensor([[[i not in hidden_ones for i in range(n)]]])
            output = head_output(head, plan, hidden, labels, known_digits=known, is_training=True)
            expected_loss += output.loss.item() / n / len(choices)
            assert output.loss == output.token_loss[0, 0]
    true, score, losses = digits_of(13, BASES), scores_of(head, hidden[0, 0]), []
    for order in itertools.permutations(range(n)):
        known, loss = [-1] * n, 0.0
        for i in order:
            loss -= score(known)[columns(BASES)[i]].log_softmax(0)[true[i]].item()
            known[i] = true[i]
        losses.append(loss)
    assert abs(expected_loss - sum(losses) / len(losses)) < 1e-9
    assert expected_loss > -math.log(sum(math.exp(-loss) for loss in losses) / len(losses))


def test_digits_are_hidden_evenly():
    plan = HeadPlan((2,) * 5, (5,), is_masked=True)
    uniforms = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0))
    uniforms[0, 0] = math.nextafter(1, 0)
    is_hidden = ~plan.draw_known(uniforms)
    numbers = is_hidden.sum(1).bincount(minlength=6)
    assert numbers[0] == 0 and (numbers[1:] - 4000).abs().max() < 4 * 4000**0.5
    pairs = is_hidden[is_hidden.sum(1) == 2].double().mean(0)
    assert (pairs - 0.4).abs().max() < 0.03


def test_training_hides_digits_with_torchs_generator_and_evaluation_does_not():
    head, plan = make_head(HEADS["masked"])
    hidden, labels = torch.randn(2, 3, D, dtype=torch.float64), torch.randint(V, (2, 3))

    def loss(seed, is_training):
        torch.manual_seed(seed)
        return head_output(head, plan, hidden, labels, is_training=is_training).loss.item()

    assert loss(0, True) == loss(0, True) != loss(1, True)
    assert loss(0, False) == loss(1, False)


@pytest.mark.parametrize(
    ("num_digits", "num_passes", "expected"),
    [(14, 4, (1, 3, 5, 5)), (18, 4, (1, 4, 6, 7)), (4, 4, (1, 1, 1, 1)), (3, 2, (1, 2)), (7, 1, (7,)), (2, 2, (1, 1))],
)
def test_later_passes_draw_more(num_digits, num_passes, expected):
    assert cosine_passes(num_digits, num_passes) == expected
    for n, p in itertools.product(range(1, 25), range(1, 25)):
        if p <= n:
            assert sum(cosine_passes(n, p)) == n and len(cosine_passes(n, p)) == p and min(cosine_passes(n, p)) >= 1


def test_embeddings_of_digits_are_sums():
    embedding = DigitEmbedding((2, 3), 5, has_unknown=True).double()
    rows = embedding.table.weight
    assert rows.shape == (7, 5)
    for digits, which in {(0, 0): (0, 3), (1, 2): (1, 5), (-1, 1): (2, 4), (-1, -1): (2, 6)}.items():
        expected = (rows[which[0]] + rows[which[1]]) / 2**0.5
        torch.testing.assert_close(embedding(torch.tensor([[digits]]))[0, 0], expected)
    table = TokenEmbedding((2, 3), 5).double()
    torch.testing.assert_close(table(torch.tensor([5])), table.embedding(torch.tensor([[1, 2]])))
    assert table(torch.arange(6)).unique(dim=0).shape == (6, 5)


@pytest.mark.parametrize("options", [HEADS["digits"], HEADS["in turn"], HEADS["masked"]])
@pytest.mark.parametrize("num_bits", [18, 24, 32])
def test_memory_grows_with_the_digits_and_not_with_the_codes(options, num_bits, make_prior):
    layout = BlockLayout.tiles(1, 2)
    codes = {"code_bases": [2] * num_bits, "vocab_size": 2**num_bits}
    model = make_prior(layout, **codes | options)
    small = make_prior(layout, **{"code_bases": [2] * 4, "vocab_size": 16} | options)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, small)]
    width = model.config.hidden_size
    assert sizes[0] - sizes[1] < 9 * (num_bits - 4) * width
    labels = torch.tensor([[0, 2**num_bits - 1, 5, 2**num_bits // 3]])
    output = model(labels[:, :-1], torch.tensor([1]), labels)
    assert output.loss.isfinite() and output.logits.shape == (1, 4, 2 * num_bits)


WRONG = [
    ({"head": "bits"}, "head is 'bits'; expected one of"),
    (
        {"head": "digits", "code_bases": None},
        "head is 'digits'; expected 'softmax', as the tokenizer's 24 codes have no",
    ),
    ({"head": "digits", "code_bases": [2, 3]}, r"code_bases is \[2, 3\], 6 codes; expected 24"),
    ({"code_bases": [2, 3]}, r"code_bases is \[2, 3\], 6 codes; expected 24"),
    ({"code_bases": "24"}, "code_bases is '24'; expected a list"),
    ({"head_groups": [4]}, "head_groups is .*; expected null for head 'softmax'"),
    ({"head_passes": 2}, "head_passes is 2; expected null for head 'softmax'"),
    (
        {"head": "digits", "head_passes": 2},
        "head_passes is 2; expected null for head 'digits': it is an option of masked",
    ),
    ({"head": "digits", "head_width": 8}, "head_width is 8; expected null for head 'digits'"),
    ({"head": "digits_in_turn", "head_passes": 2}, "head_passes is 2; expected null for head 'digits_in_turn'"),
    (
        {"head": "digits", "head_groups": [2, 3]},
        r"head_groups is \[2, 3\]; expected counts that add up to the 4 digits",
    ),
    ({"head": "digits", "head_groups": [4, 0]}, "head_groups is .*; expected counts"),
    ({"head": "digits", "head_groups": []}, "head_groups is .*; expected counts"),
    ({"head": "digits", "head_groups": 4}, "head_groups is 4; expected a list"),
    ({"head": "masked_digits", "head_passes": 5}, "head_passes is 5; expected an integer from 1 to 4, or null"),
    ({"head": "masked_digits", "head_passes": True}, "head_passes is True; expected an integer from 1 to 4"),
    ({"head": "masked_digits", "head_passes": 3, "head_groups": [2, 2]}, "head_passes is 3; expected .* from 1 to 2"),
    ({"head": "masked_digits", "head_width": 0}, "head_width is 0; expected an integer from 1"),
    ({"head": "masked_digits", "head_layers": 1.5}, "head_layers is 1.5; expected an integer from 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockPriorConfig(**CODES | options)


def test_digits_to_show_are_refused_where_they_do_not_fit():
    (parallel, plan), hidden = make_head(HEADS["digits"]), torch.randn(2, 3, D, dtype=torch.float64)
    labels = torch.randint(V, (2, 3))
    with pytest.raises(ValueError, match="known_digits is given; expected None for a head that is not trained"):
        head_output(parallel, plan, hidden, labels, known_digits=torch.zeros(2, 3, 4, dtype=torch.bool))
    masked, plan = make_head(HEADS["masked"])
    for known in (torch.zeros(2, 3, 3, dtype=torch.bool), torch.zeros(2, 3, 4), SimpleNamespace(shape=(2, 3))):
        with pytest.raises(ValueError, match=r"expected a torch.bool tensor \(2, 3, 4\)"):
            head_output(masked, plan, hidden, labels, known_digits=known)


def test_configurations_are_saved_and_read(tmp_path):
    config = BlockPriorConfig(**CODES, head="masked_digits", head_groups=(1, 1, 2), head_passes=2)
    config.save_pretrained(tmp_path)
    again = BlockPriorConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.head_groups == [1, 1, 2]
    assert configured_plan(again) == HeadPlan((2, 2, 6), (1, 2), is_masked=True)


def test_a_prior_without_digits_keeps_the_fingerprint_of_before(make_prior):
    layout = BlockLayout.tiles(1, 2)
    model, of_digits = make_prior(layout), make_prior(layout, **CODES)
    options = model_options(model)
    assert {*HeadOptions._fields} < {*options} and options["head"] == "softmax"
    assert not {*HeadOptions._fields} & {*model.as_fingerprinted(options, {})[0]}
    assert model.as_fingerprinted(model_options(of_digits), {})[0]["code_bases"] == BASES


def test_hidden_digits_are_a_function_of_seed_step_and_sample():
    plan, samples = HeadPlan((2, 3, 2), (1, 2), is_masked=True), torch.tensor([7, 3, 12])
    known = training_digits(plan, 5, 1, 2, samples)
    assert known.shape == (3, 5, 3) and known.dtype == torch.bool and known.view(15, 3).unique(dim=0).shape[0] > 3
    assert torch.equal(training_digits(plan, 5, 1, 2, samples[1:]), known[1:])
    assert not torch.equal(training_digits(plan, 5, 1, 3, samples), known)
    assert not torch.equal(training_digits(plan, 5, 2, 2, samples), known)
