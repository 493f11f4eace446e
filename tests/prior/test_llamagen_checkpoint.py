"""LlamaGen transformers: converted, they compute what the reference does; exported, they are back bit for bit."""

import pytest
import torch
from safetensors.torch import save_file

from nextblock.convert_prior import main
from nextblock.convert_tokenizer import main as convert_tokenizer
from nextblock.data.blocks import BlockLayout
from nextblock.files.fingerprints import model_fingerprint
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior import LlamaPrior, LlamaPriorConfig, SamplingOptions
from nextblock.prior.llamagen_checkpoint import llamagen_arguments, llamagen_sampling, prior_from_llamagen
from nextblock.prior.sampling import truncate_logits
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.codebook_learned import LearnedCodebook
from nextblock.tokenizer.codec_tiles import TileCodec
from nextblock.tokenizer.quantizer import Quantizer

from ..parity import load_case, needs_whole

TOLERANCE = 2e-4
CASES = ("llamagen-c2i", "llamagen-t2i", "llamagen-t2i-ds8")
GRID = [4, 4]


def convert(checkpoint, output_dir, *options):
    main(["--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *map(str, options)])


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory):
    """A parity case, and the folder that the command line made of its file."""
    case, folder = load_case(request.param, is_whole=True), tmp_path_factory.mktemp(request.param)
    torch.save(case.content("gpt"), folder / "prior.pt")
    num_heads = case.facts["gpt"]["n_head"]
    convert(folder / "prior.pt", folder / "prior", "--num_heads", num_heads, "--grid", GRID)
    return case, folder / "prior"


def conditions_of(case) -> list[dict]:
    """What the model is conditioned on, in every form in which it may be given."""
    tensors = case.tensors
    if "labels" in tensors:
        return [{"class_labels": tensors["labels"]}]
    forms = [("t5_embeds", "t5_mask"), ("text_embeds", "text_mask")]
    return [{"text_embeds": tensors[embeds], "text_mask": tensors[mask]} for embeds, mask in forms]


def quantizer_of(prior: LlamaPrior) -> Quantizer:
    """Any quantizer of the same tokens: its codes are not looked at."""
    return Quantizer(TileCodec(prior.layout), LearnedCodebook(prior.vocab_size, 4, init_scale=1.0)).eval()


@needs_whole
@torch.no_grad()
def test_teacher_forcing_matches_the_reference(converted):
    case, folder = converted
    model, idx = LlamaPrior.from_pretrained(folder), case.tensors["idx"]
    for given in conditions_of(case):
        output = model(idx[:, :-1], labels=idx, **given)
        assert case.error(output.logits, "logits") < TOLERANCE
        assert case.error(output.loss, "ce_loss") < TOLERANCE
        if "uncond_logits" in case.tensors:
            null = model.conditions.of(given).null()
            assert case.error(model(idx[:, :-1], null).logits, "uncond_logits") < TOLERANCE
    if "kept" in case.tensors:
        sampling = case.facts["sampling"]
        options = SamplingOptions(top_k=sampling["kept_top_k"], top_p=sampling["kept_top_p"])
        assert torch.equal(truncate_logits(output.logits, options).isfinite(), case.tensors["kept"].bool())


@needs_whole
def test_guided_greedy_sampling_matches_the_reference(converted):
    case, folder = converted
    model = LlamaPrior.from_pretrained(folder)
    for given in conditions_of(case):
        options = {"guidance_scale": case.facts["sampling"]["cfg_scale"], "top_k": 1}
        idx_Bl = model.generate(quantizer=quantizer_of(model), **given, **options)
        assert torch.equal(torch.cat(idx_Bl, 1), case.tensors["greedy_idx"])


@needs_whole
def test_export_gives_back_every_bit(converted, tmp_path):
    case, folder = converted
    name = "llamagen" if "labels" in case.tensors else "llamagen-t2i"
    main(["--format", name, "--export", "--checkpoint", str(folder), "--output_dir", str(tmp_path)])
    facts = case.facts["gpt"]
    state = torch.load(tmp_path / f"llamagen_{facts['n_layer']}x{facts['dim']}.pt", weights_only=True)["model"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == facts["shapes"]
    assert all(torch.equal(state[name], drawn) for name, drawn in case.state_dict("gpt", "gpt.").items())
    arguments = llamagen_arguments(LlamaPriorConfig.from_pretrained(folder))
    known = {"dim", "n_layer", "n_head", "vocab_size", "block_size", "cls_token_num", "rope_base", "norm_eps"}
    assert {key: arguments[key] for key in known} == {key: facts[key] for key in known}


def small_state(**options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"layout": BlockLayout.tiles(1, [2, 3]).to_dict(), "vocab_size": 11, "hidden_size": 64, "num_layers": 2}
    sizes |= {"num_heads": 4, "inner_size": 96, "num_classes": 3}
    return LlamaPrior(LlamaPriorConfig(**sizes | options)).state_dict()


def test_a_pipeline_has_the_published_sampling_and_the_tokenizer_s_grid(tmp_path):
    save_file(small_state(num_heads=1), tmp_path / "prior.safetensors")
    sizes = {"image_size": [8, 12], "hidden_dim": 8, "embedding_dim": 4, "vocab_size": 11, "codebook_init_scale": 1.0}
    tokenizer = VQVAE(VQVAEConfig(layout="tiles", tile=1, **sizes))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--to_pipeline", "--tokenizer", tmp_path / "tokenizer"]
    convert(tmp_path / "prior.safetensors", tmp_path / "pipeline", *options)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.prior.layout.grid == (2, 3) and pipe.prior.config.num_heads == 1
    assert pipe.prior.config.tokenizer_fingerprint == model_fingerprint(pipe.tokenizer)
    assert pipe.sampling == SamplingOptions(guidance_scale=2.0)
    with pytest.raises(ValueError, match="quantizer has layout .*; expected"):
        convert(tmp_path / "prior.safetensors", tmp_path / "other", *options, "--grid", [3, 2])


@pytest.mark.parametrize(("width", "num_heads", "scale"), [(768, 12, 2.0), (1280, 20, 1.75), (3200, 32, 1.65)])
def test_published_widths_have_their_heads_and_guidance(width, num_heads, scale):
    with torch.device("meta"):
        state = small_state(hidden_size=width, num_layers=1, num_heads=1, inner_size=8)
    config = prior_from_llamagen({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, grid=2).config
    assert config.num_heads == num_heads and llamagen_sampling(config).guidance_scale == scale


def test_shared_keys_and_values_are_told_by_the_shapes():
    state = small_state(num_key_value_heads=2)
    config = prior_from_llamagen(state, grid=[2, 3], num_heads=4).config
    assert config.key_value_heads == 2 and config.inner_size == 96 and config.num_classes == 3


def test_texts_are_sampled_as_published():
    state = small_state(num_classes=0, text_dim=6, max_text_positions=5)
    config = prior_from_llamagen(state, grid=2, num_heads=2).config
    assert (config.text_dim, config.max_text_positions) == (6, 5)
    assert llamagen_sampling(config) == SamplingOptions(guidance_scale=7.5, top_k=11)


def changed(**tensors) -> dict[str, torch.Tensor]:
    """The small state with tensors in place of others, None for none."""
    state = small_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({}, [], "grid is missing; expected the rows and columns"),
        ({}, ["--grid", "[0,3]"], r"grid is \[0, 3\]"),
        ({}, ["--grid", "[2,3,4]"], r"grid is \[2, 3, 4\]"),
        ({}, ["--grid", "[2,3]", "--num_heads", 5], "num_heads is 5; expected a divisor of the width 64"),
        ({"freqs_cis": torch.zeros(3)}, ["--grid", "[2,3]", "--num_heads", 32], "multiple of 4"),
        ({"norm__weight": None}, ["--grid", "[2,3]"], r"missing: norm.weight \(64,\)"),
        ({"norm__weight": torch.ones(63)}, ["--grid", "[2,3]"], r"misshapen: norm.weight \(63,\), expected \(64,\)"),
        ({"layers__1__more": torch.ones(1)}, ["--grid", "[2,3]"], r"unexpected: layers.1.more \(1,\)"),
        ({}, ["--format", "taming", "--num_classes", "3"], "format is 'taming'; expected 'llamagen'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tensors, options, message, tmp_path):
    torch.save({"model": changed(**tensors), "steps": 3}, tmp_path / "prior.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "prior.pt", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scales 1,2", "'scales'.* do not go with format 'llamagen'"),
        ("--num_classes 3", "'num_classes'.* do not go with format 'llamagen'"),
        ("--start_token 3", "'start_token'.* do not go with format 'llamagen'"),
    ],
)
def test_options_of_other_formats_are_refused(options, message, tmp_path):
    torch.save(changed(), tmp_path / "prior.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "prior.pt", tmp_path / "out", "--grid", "[2,3]", *options.split())


@needs_whole
def test_a_pipeline_of_texts_samples_as_the_reference(tmp_path):
    case = load_case("llamagen-t2i-ds8", is_whole=True)
    torch.save(case.content("vq"), tmp_path / "vq.pt")
    torch.save(case.content("gpt"), tmp_path / "gpt.pt")
    convert_tokenizer(
        ["--checkpoint", str(tmp_path / "vq.pt"), "--output_dir", str(tmp_path / "vq"), "--image_size", "32"]
    )
    options = ["--format", "llamagen-t2i", "--num_heads", 2, "--to_pipeline", "--tokenizer", tmp_path / "vq"]
    convert(tmp_path / "gpt.pt", tmp_path / "pipe", *options)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.text_encoder is None and pipe.sampling == SamplingOptions(guidance_scale=7.5, top_k=96)
    greedy = {"guidance_scale": case.facts["sampling"]["cfg_scale"], "top_k": 1}
    for given in conditions_of(case):
        idx_Bl = pipe(**given, **greedy, output_type="latent").images
        assert torch.equal(torch.cat(idx_Bl, 1), case.tensors["greedy_idx"])
    images = 2 * pipe(**given, **greedy, output_type="pt").images - 1
    assert (images - case.tensors["greedy_img"].clamp(-1, 1)).abs().max() < 2 * TOLERANCE


def test_export_refuses_what_the_format_cannot_say(tmp_path):
    for options, message in (({}, "expected a square grid"), ({"num_classes": 0}, "num_classes is 0")):
        torch.manual_seed(0)
        layout = BlockLayout.tiles(1, [2, 3]).to_dict()
        LlamaPrior(LlamaPriorConfig(layout=layout, **{"num_classes": 2} | options)).save_pretrained(tmp_path / "prior")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "prior", tmp_path, "--format", "llamagen", "--export")
