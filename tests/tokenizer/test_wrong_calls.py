"""Wrong arguments of a tokenizer, and codebooks and codecs that do not give what they must: refused by name."""

import pytest
import torch
from torch import nn

from nextblock.tokenizer import LearnedCodebook, Quantizer, TileCodec, VQVAEConfig

from .toy_codebook import SignCodebook, SignVQVAE

PIXELS, IDX = torch.zeros(2, 3, 16, 16), torch.zeros(2, 21, dtype=torch.int64)
BLOCKS = [torch.zeros(2, length, dtype=torch.int64) for length in (1, 4, 16)]
WRONG_CALLS = [
    ("img_to_idx", None, "pixel_values is None; expected a floating-point tensor"),
    ("img_to_idx", PIXELS.numpy(), "pixel_values is a ndarray; expected a floating-point tensor"),
    ("img_to_idxBl", [PIXELS], "pixel_values is a list; expected"),
    ("encode", PIXELS.to_sparse(), "pixel_values is a tensor of layout torch.sparse_coo; expected .*, dense"),
    ("forward", PIXELS.to(torch.float8_e4m3fn), "pixel_values has dtype torch.float8_e4m3fn; expected floating point"),
    ("forward", PIXELS.to(torch.complex64), "pixel_values has dtype torch.complex64; expected floating point"),
    ("idx_to_img", BLOCKS, r"idx_BL is a list; expected a torch.int64 tensor \(batch, 21\)"),
    ("idx_to_img", IDX.numpy(), "idx_BL is a ndarray; expected"),
    ("idx_to_var_input", IDX.float(), "idx_BL has dtype torch.float32; expected torch.int64"),
    ("idx_to_var_input", IDX[:, 1:], r"idx_BL has shape \(2, 20\); expected \(batch, 21\)"),
    ("idxBl_to_img", [idx.tolist() for idx in BLOCKS], r"idx_Bl\[0\] is a list; expected a torch.int64 tensor"),
    ("idxBl_to_img", [torch.tensor(0)] * 3, r"idx_Bl\[0\] has shape \(\); expected \('batch', 1\)"),
    ("idxBl_to_var_input", [*BLOCKS[:2], None], r"idx_Bl\[2\] is None; expected a torch.int64 tensor \(batch, 16\)"),
]
FEATURES = torch.zeros(1, 4, 4, 4)
WRONG_MAPS = [
    ("forward", FEATURES.numpy(), "features is a ndarray; expected a floating-point tensor"),
    ("forward", FEATURES[:, :3], r"features is torch.float32 \(1, 3, 4, 4\); expected .* \(batch, 4, 4, 4\)"),
    ("indices", FEATURES[..., :3], r"features is torch.float32 \(1, 4, 4, 3\); expected"),
    ("indices", FEATURES.long(), "features is torch.int64"),
    ("idx_to_features", IDX + 16, r"idx_Bl\[0\] spans 16 to 16; expected 0 to 15"),
    ("var_input", IDX[0], r"idx_BL has shape \(21,\); expected \(batch, 21\)"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 16}
    return SignVQVAE(VQVAEConfig(layout="scales", scales=[1, 2, 4], num_phi=1, **sizes)).eval()


@pytest.mark.parametrize(("method", "value", "message"), WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(method, value, message, model):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(value)


@pytest.mark.parametrize(("method", "value", "message"), WRONG_MAPS)
def test_wrong_arguments_of_the_quantizer_are_refused_by_name(method, value, message, model):
    with pytest.raises(ValueError, match=message):
        getattr(model.quantizer, method)(value)


class Broken(SignCodebook):
    """A codebook whose one method gives something else."""

    def __init__(self, method: str, given):
        super().__init__(4, 0.25)
        own = getattr(self, method)
        setattr(self, method, (lambda *args, **options: given(own(*args, **options))) if callable(given) else given)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("prepare", lambda map: map[:, :2], r"prepare gives torch.float32 \(1, 2, 1, 64\); expected .*\(1, 4, 1, 64"),
        ("prepare", lambda map: map.double(), "prepare gives torch.float64"),
        ("assign", lambda idx: None, "assign gives None; expected torch.int64"),
        ("assign", lambda idx: idx.float(), "assign gives torch.float32"),
        ("assign", lambda idx: idx[..., None], r"assign gives torch.int64 \(1, 64, 1\)"),
        ("assign", lambda idx: idx + 1, "assign gives 1 to 16; expected 0 to 15"),
        ("assign", lambda idx: idx - 1, "assign gives -1 to 14; expected 0 to 15"),
        ("lookup", lambda codes: codes.mT, r"lookup gives torch.float32 \(1, 4, 64\); expected"),
        ("loss_terms", sum, "loss_terms gives torch.float32 .*; expected a list of scalars"),
        ("loss_terms", lambda terms: None, "loss_terms gives None; expected a list of scalars"),
        ("loss_terms", lambda terms: [term.item() for term in terms], r"loss_terms\[0\] gives a float"),
        ("loss_terms", lambda terms: [terms[0], terms[1][None]], r"loss_terms\[1\] gives torch.float32 \(1,\)"),
        ("loss_terms", lambda terms: [terms[0] * torch.nan], r"loss_terms\[0\] gives nan; expected a finite number"),
        ("num_codes", 16.0, "num_codes is 16.0; expected a positive integer"),
        ("dim", None, "dim is None; expected a positive integer"),
    ],
)
def test_a_codebook_that_gives_something_else_is_refused(method, given, message, monkeypatch, model):
    monkeypatch.setattr(SignVQVAE, "build_codebook", lambda self, config: Broken(method, given))
    with pytest.raises(ValueError, match=f"codebook.{message}"):
        SignVQVAE(model.config)


@pytest.mark.parametrize(
    ("builder", "built", "message"),
    [
        ("build_codebook", None, "codebook is None without num_codes, .*; expected a module that satisfies"),
        ("build_codebook", nn.Embedding(16, 4), "codebook is a Embedding without num_codes"),
        ("build_codebook", SignCodebook, "codebook is the class SignCodebook; expected"),
        ("build_codec", None, "codec is None without layout"),
        ("build_codec", LearnedCodebook(16, 4), "codec is a LearnedCodebook without layout, encode"),
        ("build_codec", TileCodec(None), "build_codec gives a codec of layout None; expected BlockLayout"),
    ],
)
def test_a_builder_that_gives_something_else_is_refused(builder, built, message, monkeypatch, model):
    monkeypatch.setattr(SignVQVAE, builder, lambda self, config: built)
    with pytest.raises(ValueError, match=message):
        SignVQVAE(model.config)


def test_codec_and_codebook_in_each_others_place_are_refused():
    with pytest.raises(ValueError, match="codec is a LearnedCodebook without layout"):
        Quantizer(LearnedCodebook(16, 4), TileCodec(None))


def test_trying_a_codebook_leaves_it_and_random_numbers_alone(model):
    before, random_state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    model.quantizer.try_out()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
