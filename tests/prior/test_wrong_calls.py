"""Wrong arguments of a prior, and families that do not give what they must: refused by name."""

import pytest
import torch

from nextblock.data.blocks import BlockLayout
from nextblock.prior.family import check_output, try_out
from nextblock.prior.generation import generate
from nextblock.prior.losses import PriorOutput
from nextblock.prior.sampling import SamplingOptions

from .toy_family import BagConfig, BagPrior

SCALES, RASTER = BlockLayout.scales([1, 2]), BlockLayout.tiles(1, 2)
INPUT, LABELS, CLASSES = torch.zeros(2, 4, 4), torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"var_input": None}, r"var_input is None; expected a tensor \(2, 4, 4\) of floating-point vectors"),
        ({"var_input": INPUT.numpy()}, "var_input is a ndarray; expected"),
        ({"var_input": INPUT.bool()}, "var_input has dtype torch.bool; expected floating-point vectors"),
        ({"var_input": INPUT.to(torch.complex64)}, "var_input has dtype torch.complex64; expected floating"),
        ({"class_labels": [0, 1]}, "class_labels is a list; expected a torch.int64 tensor"),
        ({"class_labels": None}, "class_labels is None; expected a torch.int64 tensor"),
        ({"labels": LABELS.tolist()}, r"labels is a list; expected a torch.int64 tensor \(2, 5\), or None"),
        ({"labels": LABELS + 11}, "labels holds 11; expected 0 to 10, or -100"),
        ({"labels": LABELS - 1}, "labels holds -1; expected 0 to 10, or -100"),
        ({"loss_chunk_size": 1.5}, "loss_chunk_size is 1.5; expected an integer of at least 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, make_prior):
    with pytest.raises(ValueError, match=message):
        make_prior(SCALES)(**{"var_input": INPUT, "class_labels": CLASSES, "labels": LABELS} | arguments)


def test_indices_that_are_no_codes_are_refused(make_prior):
    with pytest.raises(ValueError, match="var_input holds 11; expected 0 to 10$"):
        make_prior(RASTER)(torch.tensor([[0, 11, 3]]), CLASSES[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "wren"}, "class_labels is 'wren'; expected a torch.int64 tensor"),
        ({"class_labels": None}, "class_labels is None; expected"),
        ({"class_labels": CLASSES[:0]}, "class_labels holds no label; expected one an image"),
        ({"quantizer": None}, "quantizer is None without layout, .*; expected a tokenizer's quantizer"),
        ({"quantizer": torch.nn.Identity()}, "quantizer is a Identity without layout"),
        ({"on_block_end": 3}, "on_block_end is 3; expected a function, or None"),
        ({"given_idx_Bl": [1, 2]}, r"idx_Bl\[0\] is a int; expected a torch.int64 tensor"),
        ({"given_idx_Bl": [LABELS[:0, :1], LABELS[:0, 1:]]}, r"given_idx_Bl\[0\] has no row; expected 2"),
    ],
)
def test_wrong_arguments_of_generate_are_refused_by_name(arguments, message, make_prior, make_quantizer):
    with pytest.raises(ValueError, match=message):
        make_prior(SCALES).generate(**{"class_labels": CLASSES, "quantizer": make_quantizer(SCALES)} | arguments)


def bag(method: str, given) -> BagPrior:
    """A toy prior whose one method, or attribute, gives something else."""
    prior = BagPrior(BagConfig(RASTER.to_dict(), 11, 2)).eval()
    own = getattr(prior, method)
    if callable(given):
        setattr(prior, method, lambda *args: given(own(*args)))
    else:
        setattr(prior, method, given)
    return prior


WRONG_TENSORS = [
    ("context", lambda context: context.vector, "context gives tensor.*; expected a Context of"),
    ("decode_block", lambda hidden: None, "decode_block gives a NoneType for block 0; expected"),
    ("decode_block", lambda hidden: hidden[:, 0], r"decode_block gives \(\d, 8\) in .* for block 0; expected \(\d, 1"),
    ("decode_block", lambda hidden: hidden.repeat(2, 1, 1), r"decode_block gives \(\d, 1, 8\)"),
    ("logits", lambda logits: logits[..., 1:], r"logits gives \(\d, 1, 10\) in .* for block 0; expected \(\d, 1, 11\)"),
    ("logits", lambda logits: logits[:0], r"logits gives \(0, 1, 11\)"),
    ("logits", lambda logits: logits.bfloat16(), "logits gives .* in torch.bfloat16 .*; expected .* in float32"),
    ("logits", lambda logits: logits.flatten(0, 1), r"logits gives \(\d, 11\)"),
]


@pytest.mark.parametrize(("method", "given", "message"), WRONG_TENSORS)
def test_a_family_that_gives_something_else_is_refused_before_a_training_and_while_sampling(
    method, given, message, make_quantizer
):
    prior = bag(method, given)
    with pytest.raises(ValueError, match=f"prior.{message}"):
        try_out(prior)
    condition, generators = prior.conditions.from_batch({"class_labels": CLASSES}), [torch.Generator()] * 2
    with pytest.raises(ValueError, match=f"prior.{message}"):
        generate(prior, condition, make_quantizer(RASTER), SamplingOptions(), generators)


@pytest.mark.parametrize(
    ("attribute", "given", "message"),
    [
        ("takes_indices", None, "takes_indices is None; expected a bool"),
        ("takes_indices", False, "decode_block fails for block 1, given what takes_indices False .* say: .*Long"),
        ("layout", RASTER.to_dict(), "layout is .*; expected a BlockLayout"),
        ("layout", SCALES, "takes_indices is True; expected False for a scale layout"),
        ("vocab_size", "11", "vocab_size is '11'; expected a int"),
        ("conditions", None, "conditions is None without has_null, of, from_batch; expected what the prior takes"),
    ],
)
def test_a_family_with_wrong_attributes_is_refused(attribute, given, message):
    with pytest.raises(ValueError, match=f"prior.{message}"):
        try_out(bag(attribute, given))


def test_trying_a_family_leaves_its_mode_and_random_numbers_alone(make_prior):
    prior, random_state = make_prior(SCALES, dropout=0.5).train(), torch.get_rng_state()
    try_out(prior)
    assert prior.training and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", ["loss", "token_loss", "token_correct"])
def test_a_forward_pass_that_gives_other_shapes_is_refused(name):
    good = {"loss": torch.zeros(()), "token_loss": torch.zeros(2, 5), "token_correct": torch.zeros(2, 5)}
    check_output(PriorOutput(**good), (2, 5))
    for wrong in (None, torch.zeros(1)):
        with pytest.raises(ValueError, match=f"the prior's forward pass gives .* as {name}; expected"):
            check_output(PriorOutput(**good | {name: wrong}), (2, 5))
