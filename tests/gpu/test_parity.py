"""On a GPU, public checkpoints compute what the reference does, in float32 to the token and in bf16 nearly."""

import pytest
import torch

from nextblock.prior import BlockPrior
from nextblock.prior.var_checkpoint import prior_from_var
from nextblock.tokenizer.var_checkpoint import vqvae_from_var
from nextblock.training.precision import set_tf32

from ..needs_gpu import CUDA, NEEDS_GPU
from ..parity import VAR_CASES, Case, load_case

pytestmark = NEEDS_GPU
TOLERANCE = 5e-4
MIN_BF16_AGREEMENT = 0.95
MAX_BF16_ERROR = 0.06  # in standard deviations of the logits


@pytest.fixture(scope="module", params=VAR_CASES)
def case(request) -> Case:
    """A case whose inputs and outputs lie on the GPU."""
    case = load_case(request.param)
    case.tensors = {name: tensor.to(CUDA) for name, tensor in case.tensors.items()}
    return case


@pytest.fixture(params=[False, True], ids=["float32", "TF32 allowed"])
def allows_tf32(request):
    """Let convolutions and products outside of the quantizer use TF32, or not; torch's defaults come back."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(request.param)
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tokenizer_of(case: Case):
    return vqvae_from_var(case.state_dict("vqvae", "vae."), scales=case.facts["vqvae"]["v_patch_nums"]).to(CUDA)


def prior_of(case: Case, dtype: torch.dtype = torch.float32) -> BlockPrior:
    scales, num_heads = case.facts["vqvae"]["v_patch_nums"], case.facts["var"]["num_heads"]
    return prior_from_var(case.state_dict("var", "var."), scales=scales, num_heads=num_heads).to(CUDA, dtype)


@torch.no_grad()
def test_a_tokenizers_indices_are_the_references_whatever_tf32_is_allowed(case, allows_tf32):
    model, tensors = tokenizer_of(case), case.tensors
    assert torch.equal(model.img_to_idx(tensors["img"]), tensors["idx"])
    assert case.error(model.idx_to_var_input(tensors["idx"]), "var_input") < TOLERANCE
    f_hat, vq_loss, _ = model.quantizer(tensors["features"])
    assert case.error(f_hat, "f_hat") < TOLERANCE and case.error(vq_loss, "vq_loss") < TOLERANCE
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allows_tf32
    if not allows_tf32:
        assert case.error(model.encode(tensors["img"]), "features") < TOLERANCE
        assert case.image_error(model.idx_to_img(tensors["idx"]), "reconstruction") < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("allows_tf32", [False], indirect=True)
def test_a_prior_matches_the_reference(case, allows_tf32):
    model, tokenizer, tensors = prior_of(case), tokenizer_of(case), case.tensors
    output = model(tensors["var_input"], tensors["labels"], tensors["idx"])
    assert case.error(output.logits, "logits") < TOLERANCE and case.error(output.loss, "ce_loss") < TOLERANCE
    guidance = {"guidance_scale": 1 + case.facts["sampling"]["cfg"], "guidance_schedule": "linear"}
    idx_Bl = model.generate(tensors["labels"], tokenizer.quantizer, top_k=1, **guidance)
    assert torch.equal(tokenizer.layout.join(idx_Bl), tensors["greedy_idx"])
    assert case.image_error((tokenizer.idxBl_to_img(idx_Bl) + 1) / 2, "greedy_img") < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("is_autocast", [False, True], ids=["cast", "autocast"])
def test_bf16_agrees_with_float32(case, is_autocast):
    inputs = case.tensors["var_input"], case.tensors["labels"]
    expected = prior_of(case)(*inputs).logits
    model = prior_of(case, torch.float32 if is_autocast else torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
        logits = model(*inputs).logits
    assert logits.dtype == torch.float32
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= MIN_BF16_AGREEMENT
    assert (logits - expected).abs().max() <= MAX_BF16_ERROR * expected.std()
