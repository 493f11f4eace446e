"""VAR transformers: converted, they compute what the reference does; exported, they are back bit for bit."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from nextblock.convert_prior import main
from nextblock.files.fingerprints import model_fingerprint
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig, SamplingOptions
from nextblock.prior.class_names import imagenet_class_names
from nextblock.prior.var_checkpoint import prior_from_var, prior_to_var, var_arguments
from nextblock.tokenizer.var_checkpoint import vqvae_from_var

from ..parity import VAR_CASES, load_case, needs_whole

TOLERANCE = 1e-4
MIN_BF16_AGREEMENT = 0.95
MAX_BF16_ERROR = 0.06  # in standard deviations of the logits


def drawn_state(case):
    return case.state_dict("var", "var.")


def scales_of(case):
    return case.facts["vqvae"]["v_patch_nums"]


def heads_of(case):
    """The option that a checkpoint needs whose shapes leave the heads open."""
    facts = case.facts["var"]
    return [] if facts["attn_l2_norm"] else ["--num_heads", str(facts["num_heads"])]


def tokenizer_of(case):
    return vqvae_from_var(case.state_dict("vqvae", "vae."), scales=scales_of(case))


def convert(checkpoint, output_dir, case, *options):
    paths = ["--checkpoint", str(checkpoint), "--output_dir", str(output_dir)]
    scales = ",".join(map(str, scales_of(case)))
    main(["--format", "var", *paths, "--scales", scales, *heads_of(case), *options])


def logits_of(model, case):
    with torch.no_grad():
        return model(case.tensors["var_input"], case.tensors["labels"]).logits


@pytest.fixture(scope="module", params=VAR_CASES)
def converted(request, tmp_path_factory):
    """A parity case, and the folder that the command line made of its weights as a pickle."""
    case, folder = load_case(request.param), tmp_path_factory.mktemp(request.param)
    torch.save(drawn_state(case), folder / "var.pth")
    convert(folder / "var.pth", folder / "prior", case)
    return case, folder / "prior"


def small_state(**options):
    """A tiny VAR transformer's tensors."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 1, "mlp_ratio": 2.0, "num_classes": 3}
    sizes |= {"layout": {"kind": "scales", "scales": [1, 2, 3]}, "attention_scale": 0.25}
    return prior_to_var(BlockPrior(BlockPriorConfig(vocab_size=7, embedding_dim=5, **sizes | options)))


def test_teacher_forcing_matches_the_reference(converted):
    case, folder = converted
    model = BlockPrior.from_pretrained(folder)
    with torch.no_grad():
        output = model(case.tensors["var_input"], case.tensors["labels"], case.tensors["idx"])
    assert case.error(output.logits, "logits") < TOLERANCE
    assert case.error(output.loss, "ce_loss") < TOLERANCE


def assert_sampling_holds(model, tokenizer, case):
    cfg = case.facts["sampling"]["cfg"]
    guidance = {"guidance_scale": 1 + cfg, "guidance_schedule": "linear"}
    idx_Bl = model.generate(case.tensors["labels"], tokenizer.quantizer, top_k=1, **guidance)
    assert torch.equal(tokenizer.layout.join(idx_Bl), case.tensors["greedy_idx"])
    images = (tokenizer.idxBl_to_img(idx_Bl) + 1) / 2
    assert case.image_error(images, "greedy_img") < TOLERANCE


def test_guided_greedy_sampling_matches_the_reference(converted):
    case, folder = converted
    assert_sampling_holds(BlockPrior.from_pretrained(folder), tokenizer_of(case), case)


@needs_whole
@pytest.mark.parametrize("name", VAR_CASES)
def test_sampling_matches_every_pixel_of_the_reference(name):
    case = load_case(name, is_whole=True)
    num_heads = case.facts["var"]["num_heads"]
    model = prior_from_var(drawn_state(case), scales=scales_of(case), num_heads=num_heads)
    assert_sampling_holds(model, tokenizer_of(case), case)


@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
def test_pipeline_computes_what_the_reference_does(converted, pipeline_class, tmp_path):
    case, folder = converted
    tokenizer_of(case).save_pretrained(tmp_path / "tokenizer")
    options = ["--to_pipeline", "--tokenizer", str(tmp_path / "tokenizer")]
    convert(folder.with_name("var.pth"), tmp_path / "pipeline", case, *options)
    pipe = pipeline_class.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipe, ClassToImagePipeline)
    assert pipe.prior.config.tokenizer_fingerprint == model_fingerprint(pipe.tokenizer)
    # The published sampling, as far as a small codebook allows.
    truncation = {"top_k": min(900, pipe.prior.vocab_size), "top_p": 0.96}
    assert pipe.sampling == SamplingOptions(guidance_scale=2.5, guidance_schedule="linear", **truncation)
    pipe.set_progress_bar_config(disable=True)
    labels, cfg = case.tensors["labels"].tolist(), case.facts["sampling"]["cfg"]
    guidance = {"guidance_scale": 1 + cfg, "guidance_schedule": "linear", "num_images_per_label": 1}
    images = pipe(class_labels=labels, top_k=1, output_type="pt", **guidance).images
    assert case.image_error(images, "greedy_img") < TOLERANCE


@pytest.mark.parametrize("is_autocast", [False, True])
def test_bfloat16_stays_near_float32(converted, is_autocast):
    case, folder = converted
    expected = logits_of(BlockPrior.from_pretrained(folder), case)
    model = BlockPrior.from_pretrained(folder, dtype=torch.float32 if is_autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        logits = logits_of(model, case)
    assert logits.dtype == torch.float32
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= MIN_BF16_AGREEMENT
    assert (logits - expected).abs().max() <= MAX_BF16_ERROR * expected.std()


def test_safetensors_give_the_same_files(converted, tmp_path):
    case, folder = converted
    save_file(drawn_state(case), tmp_path / "var.safetensors")
    convert(tmp_path / "var.safetensors", tmp_path / "out", case)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_saved_and_loaded_again_computes_the_same(converted, tmp_path):
    case, folder = converted
    first = BlockPrior.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    assert torch.equal(logits_of(first, case), logits_of(BlockPrior.from_pretrained(tmp_path), case))


def test_config_holds_what_shapes_tell(converted):
    case, folder = converted
    config, facts = BlockPrior.from_pretrained(folder).config, case.facts["var"]
    assert (config.num_layers, config.hidden_size) == (facts["depth"], facts["embed_dim"])
    assert (config.num_heads, config.num_classes) == (facts["num_heads"], facts["num_classes"])
    assert config.use_shared_adaln == facts["shared_aln"]
    assert config.use_normalized_attention == facts["attn_l2_norm"]
    assert config.mlp_ratio == 4
    assert config.norm_eps == facts["norm_eps"]
    assert config.drop_path == pytest.approx(0.1 * facts["depth"] / 24)
    assert config.class_names is None


def test_export_gives_back_every_bit(converted, tmp_path):
    case, folder = converted
    paths = ["--checkpoint", str(folder), "--output_dir", str(tmp_path)]
    main(["--format", "var", "--export", *paths])
    depth = case.facts["var"]["depth"]
    state, drawn = torch.load(tmp_path / f"var_d{depth}.pth", weights_only=True), drawn_state(case)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == case.facts["var"]["shapes"]
    assert all(torch.equal(state[name], drawn[name]) for name in drawn)
    again = prior_from_var(state, scales=scales_of(case), num_heads=case.facts["var"]["num_heads"])
    assert torch.equal(logits_of(again, case), logits_of(BlockPrior.from_pretrained(folder), case))


def test_export_writes_the_derived_tensors():
    state = small_state(use_normalized_attention=True)
    assert state["lvl_1L"].tolist() == [[0] + [1] * 4 + [2] * 9]
    visible = [1] + [5] * 4 + [14] * 9
    bias = state["attn_bias_for_masking"]
    assert bias.shape == (1, 1, 14, 14)
    for row, num_visible in enumerate(visible):
        assert bias[0, 0, row].tolist() == [0.0] * num_visible + [-torch.inf] * (14 - num_visible)
    assert torch.equal(state["blocks.1.attn.zero_k_bias"], torch.zeros(64))


def test_export_names_the_arguments_of_the_reference():
    config = prior_from_var(small_state(use_shared_adaln=True), scales=[1, 2, 3]).config
    assert var_arguments(config) == {
        "num_classes": 3,
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 1,
        "mlp_ratio": 2.0,
        "norm_eps": 1e-6,
        "shared_aln": True,
        "attn_l2_norm": False,
        "patch_nums": (1, 2, 3),
    }


def test_every_odd_tensor_is_named():
    state = small_state(use_normalized_attention=True)
    del state["class_emb.weight"], state["word_embed.weight"], state["blocks.1.ffn.fc1.weight"]
    state["head.weight"] = torch.zeros(7, 63)
    state["blocks.0.attn.zero_k_bias"] = torch.zeros(63)
    state["blocks.0.ada_lin.0.weight"] = torch.zeros(1)
    state["pos_start"] = torch.zeros(1, 1, 64, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:
        prior_from_var(state, scales=[1, 2, 3])
    problems = [re.sub(r" \(.*", "", line) for line in str(caught.value).splitlines()[1:]]
    assert problems == [
        "  missing: class_emb.weight",
        "  missing: word_embed.weight",
        "  missing: blocks.1.ffn.fc1.weight",
        "  unexpected: blocks.0.ada_lin.0.weight",
        "  misshapen: head.weight",
        "  misshapen: blocks.0.attn.zero_k_bias",
        "  no floating point: pos_start torch.int64",
    ]


@pytest.mark.parametrize("options", [{"use_normalized_attention": True}, {"use_shared_adaln": True}])
def test_each_missing_tensor_is_named(options):
    whole = small_state(**options)
    derived = ("lvl_1L", "attn_bias_for_masking", ".zero_k_bias")
    for name in whole:
        state = {other: tensor for other, tensor in whole.items() if other != name}
        if name.endswith(derived):
            prior_from_var(state, scales=[1, 2, 3])
            continue
        with pytest.raises(ValueError, match=f"missing: {name} "):
            prior_from_var(state, scales=[1, 2, 3])


def test_scales_that_are_not_the_checkpoint_s_are_refused():
    with pytest.raises(ValueError, match=r"misshapen: pos_1LC \(1, 14, 64\), expected \(1, 21, 64\)"):
        prior_from_var(small_state(), scales=[1, 2, 4])


def test_key_biases_are_refused():
    state = small_state()
    state["blocks.1.attn.zero_k_bias"][3] = 1
    with pytest.raises(ValueError, match=r"key biases \['blocks.1.attn.zero_k_bias'\]"):
        prior_from_var(state, scales=[1, 2, 3])


def test_heads_are_told_by_temperatures_else_by_the_width():
    options = {"hidden_size": 128, "num_heads": 4}
    normalized = small_state(use_normalized_attention=True, **options)
    assert prior_from_var(normalized, scales=[1, 2, 3]).config.num_heads == 4
    with pytest.raises(ValueError, match="num_heads is 2; expected 4"):
        prior_from_var(normalized, scales=[1, 2, 3], num_heads=2)
    plain = small_state(**options)
    assert prior_from_var(plain, scales=[1, 2, 3]).config.num_heads == 2
    assert prior_from_var(plain, scales=[1, 2, 3], num_heads=8).config.num_heads == 8
    with pytest.raises(ValueError, match="num_heads is missing; expected it for a width of 96"):
        prior_from_var(small_state(hidden_size=96, num_heads=3), scales=[1, 2, 3])


def test_imagenet_names_are_those_of_its_labels():
    names = imagenet_class_names()
    assert len(set(names)) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 388: "giant panda", 980: "volcano"}
    known |= {134: "crane bird", 517: "crane", 817: "sports car", 999: "toilet tissue"}
    assert {label: names[label] for label in known} == known


@pytest.mark.parametrize(
    ("num_classes", "option", "expected"),
    [
        (1000, None, imagenet_class_names()),
        (1000, "none", None),
        (3, None, None),
        (3, "file", ["cat", "dog", "élan"]),
    ],
)
def test_class_names_follow_the_option(num_classes, option, expected, tmp_path):
    torch.save(small_state(num_classes=num_classes), tmp_path / "var.pth")
    (tmp_path / "file").write_text("cat\ndog\nélan\n", encoding="utf-8")
    paths = ["--checkpoint", str(tmp_path / "var.pth"), "--output_dir", str(tmp_path / "out")]
    names = {None: [], "none": ["--class_names", "none"], "file": ["--class_names", str(tmp_path / "file")]}
    main(["--format", "var", *paths, "--scales", "1,2,3", *names[option]])
    assert BlockPrior.from_pretrained(tmp_path / "out").config.class_names == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_names", "nowhere.txt"], "class_names is 'nowhere.txt'"),
        (["--class_names", "imagenet"], "class_names has 1000 names; expected 3"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(options, message, tmp_path):
    torch.save(small_state(), tmp_path / "var.pth")
    paths = ["--checkpoint", str(tmp_path / "var.pth"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        main(["--format", "var", *paths, "--scales", "1,2,3", *options])


@pytest.mark.parametrize("options", [["--to_pipeline"], ["--tokenizer", "folder"]])
def test_a_pipeline_needs_its_tokenizer(options, capsys):
    with pytest.raises(SystemExit):
        main(["--format", "var", "--checkpoint", "a", "--output_dir", "b", "--scales", "1", *options])
    assert "expected both or neither" in capsys.readouterr().err


def test_a_pipeline_refuses_a_tokenizer_of_other_sizes(converted, tmp_path):
    case, _ = converted
    torch.save(small_state(), tmp_path / "var.pth")
    tokenizer_of(case).save_pretrained(tmp_path / "tokenizer")
    paths = ["--checkpoint", str(tmp_path / "var.pth"), "--output_dir", str(tmp_path / "pipeline")]
    options = ["--to_pipeline", "--tokenizer", str(tmp_path / "tokenizer")]
    with pytest.raises(ValueError, match="quantizer has .* codes; expected 7"):
        main(["--format", "var", *paths, *options, "--scales", "1,2,3"])
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": {"kind": "tiles", "tile": [1, 1], "grid": [2, 2]}}, "expected square scales"),
        ({"layout": {"kind": "scales", "scales": [1, [1, 2]]}}, "expected square scales"),
        ({"num_classes": 0}, "num_classes is 0; expected at least 1"),
        ({"attention_scale": 1.0}, "attention_scale is 1.0; expected 0.25"),
    ],
)
def test_export_refuses_what_the_format_cannot_say(options, message):
    with pytest.raises(ValueError, match=message):
        small_state(**options)
