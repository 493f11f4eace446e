"""RAR transformers: converted, they compute what the reference does; exported, they are back bit for bit."""

import re

import pytest
import torch
from safetensors.torch import save_file

from nextblock.convert_prior import main
from nextblock.convert_tokenizer import main as convert_tokenizer
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import RARPrior, RARPriorConfig, SamplingOptions
from nextblock.prior.rar_checkpoint import prior_from_rar, prior_to_rar, rar_sampling

from ..parity import WHOLE, load_case

CASES = ("maskgit-rar", "maskgit-rar-constant")
TOLERANCE = 2e-4


def convert(checkpoint, output_dir, *options):
    main(["--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *map(str, options)])


def small_state(**options) -> dict[str, torch.Tensor]:
    """A tiny RAR transformer's tensors, of 2×3 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_classes": 3, "vocab_size": 7}
    layout = {"kind": "tiles", "tile": [1, 1], "grid": [2, 3]}
    return prior_to_rar(RARPrior(RARPriorConfig(layout=layout, **sizes | options)))


@pytest.mark.skipif(not WHOLE.is_dir(), reason="the parity cases are not there")
@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_computes_what_the_reference_does(name, tmp_path):
    case = load_case(name, is_whole=True)
    state, sampling = case.state_dict("gpt", "gpt."), case.facts["sampling"]
    torch.save(state, tmp_path / "rar.bin")
    torch.save(case.content("vq"), tmp_path / "maskgit.bin")
    size = ["--image_size", str(case.facts["vq"]["resolution"])]
    paths = ["--checkpoint", str(tmp_path / "maskgit.bin"), "--output_dir", str(tmp_path / "tokenizer")]
    convert_tokenizer([*paths, *size])
    convert(tmp_path / "rar.bin", tmp_path / "pipeline", "--to_pipeline", "--tokenizer", tmp_path / "tokenizer")
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    prior, given = pipe.prior, case.tensors
    idx, labels, orders = given["idx"], given["labels"], given["orders"]
    with torch.no_grad():
        output = prior(idx[:, :-1], labels, idx)
        uncond = prior(idx[:, :-1], torch.full_like(labels, prior.config.num_classes))
        permuted = prior(idx[:, :-1], labels, idx, orders=orders)
    assert case.error(output.logits, "logits") < TOLERANCE
    assert case.error(output.loss, "ce_loss") < TOLERANCE
    assert case.error(uncond.logits, "uncond_logits") < TOLERANCE
    assert case.error(permuted.loss, "ce_loss_permuted") < TOLERANCE
    in_order = permuted.logits.gather(1, orders[..., None].expand_as(permuted.logits))
    assert case.error(in_order, "logits_permuted") < TOLERANCE
    options = {"guidance_scale": sampling["guidance_scale"], "guidance_power": sampling["guidance_scale_pow"]}
    assert pipe.sampling.guidance_schedule == "power-cosine-open"
    scales = pipe.sampling.changed(**options).scales(prior.layout.num_tokens)
    assert scales == pytest.approx(sampling["scales"], abs=1e-5)
    options |= {"top_k": 1, "temperature": sampling["randomize_temperature"]}
    greedy = pipe(labels, output_type="latent", **options).images
    assert torch.equal(torch.cat(greedy, dim=1), given["greedy_idx"])
    images = pipe(labels, output_type="pt", **options).images
    assert (images - given["greedy_img"].clamp(0, 1)).abs().max() < TOLERANCE
    convert(tmp_path / "pipeline" / "prior", tmp_path / "back", "--format", "rar", "--export")
    back = torch.load(tmp_path / "back" / "rar.bin")
    assert back.keys() == state.keys() and all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_sizes_come_from_shapes_and_unused_rows_are_kept(tmp_path):
    state = small_state(inner_size=24, num_position_rows=6 + 1024, num_step_rows=106)
    save_file(state, tmp_path / "rar.safetensors")
    convert(tmp_path / "rar.safetensors", tmp_path / "prior", "--grid", "[2,3]", "--class_names", "none")
    config = RARPrior.from_pretrained(tmp_path / "prior").config
    expected = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_classes": 3, "vocab_size": 7}
    expected |= {"inner_size": 24, "num_position_rows": 1030, "num_step_rows": 106, "class_names": None}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.block_layout().grid == (2, 3)
    back = prior_to_rar(RARPrior.from_pretrained(tmp_path / "prior"))
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "grid is missing; expected it for 6 tokens, which make no square"),
        (["--grid", "[2,2]"], r"grid is \[2, 2\]; expected 6 cells"),
        (["--grid", "[2,3]", "--num_heads", "4"], "num_heads is 4; expected 2, as the norm of the queries tells"),
        (["--grid", "0"], "grid is 0; expected a positive integer"),
        (["--grid", "[2,3]", "--scales", "1,2"], r"\['scales'\] do not go with format 'rar'"),
        (["--grid", "[2,3]", "--format", "var", "--scales", "1,2"], r"\['grid'\] do not go with format 'var'"),
        (["--format", "var", "--scales", "1,2"], "format is 'var'; expected 'rar'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    torch.save(small_state(), tmp_path / "rar.bin")
    with pytest.raises((ValueError, SystemExit)) as refused:
        convert(tmp_path / "rar.bin", tmp_path / "prior", *options)
    assert re.search(message, f"{refused.value} {capsys.readouterr().err}")
    assert not (tmp_path / "prior" / "model.safetensors").exists()


def test_a_checkpoint_that_is_no_rar_is_refused_by_name():
    state = small_state()
    changed = state | {"blocks.1.attn.k_norm.weight": torch.ones(3), "extra": torch.ones(2)}
    del changed["blocks.0.mlp.fc1.bias"]
    with pytest.raises(ValueError) as refused:
        prior_from_rar(changed, grid=[2, 3])
    for part in ("missing: blocks.0.mlp.fc1.bias", "unexpected: extra", "misshapen: blocks.1.attn.k_norm.weight"):
        refused.match(part)
    short = state | {"embeddings.weight": state["embeddings.weight"][:9]}
    with pytest.raises(ValueError, match="embeddings.weight has 9 rows; expected at least 10, for codes and classes"):
        prior_from_rar(short, grid=[2, 3])


def test_what_rar_has_no_form_for_is_refused():
    with pytest.raises(ValueError, match="num_classes is 0; expected at least 1"):
        small_state(num_classes=0)
    with pytest.raises(ValueError, match="norm_eps is 1e-05; expected 1e-06"):
        small_state(norm_eps=1e-5)
    with pytest.raises(ValueError, match="timesteps_embeddings has 200 rows; expected at most 106"):
        small_state(num_step_rows=200)


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "expected"),
    [
        (24, 768, {"guidance_scale": 16.0, "guidance_power": 2.75, "temperature": 1.0}),
        (24, 1024, {"guidance_scale": 15.5, "guidance_power": 2.5, "temperature": 1.02}),
        (32, 1280, {"guidance_scale": 6.9, "guidance_power": 1.5, "temperature": 1.02}),
        (40, 1408, {"guidance_scale": 8.0, "guidance_power": 1.2, "temperature": 1.02}),
        (2, 16, {"guidance_scale": 4.0, "guidance_power": 0.0, "temperature": 1.0}),
    ],
)
def test_the_published_sampling_goes_by_the_size(num_layers, hidden_size, expected):
    sampling = rar_sampling(RARPriorConfig(num_layers=num_layers, hidden_size=hidden_size, num_heads=16, num_classes=2))
    assert sampling == SamplingOptions(guidance_schedule="power-cosine-open", **expected)
