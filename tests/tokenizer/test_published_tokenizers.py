"""Other projects' tokenizers: converted, they compute what the reference does; exported, they are back bit for bit."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from nextblock.convert_tokenizer import FORMATS, main
from nextblock.tokenizer import VQVAE, VQVAEConfig

from ..parity import load_case, needs_whole
from .published_reference import assign, decode, encode

TOLERANCE, DECODER_TOLERANCE = 1e-4, 2e-4
CASES = [("llamagen-t2i-ds8", "llamagen"), ("taming-gumbel", "taming"), ("maskgit-rar-constant", "maskgit")]
LARGER_CASES = [("llamagen-c2i", "llamagen"), ("llamagen-t2i", "llamagen"), ("taming-cin", "taming")]
LARGER_CASES += [("taming-uncond", "taming"), ("maskgit-rar", "maskgit"), ("ibq", "ibq"), ("magvit2", "magvit2")]
# Tiny tokenizers of each project's architecture.
SMALL = {"hidden_dim": 32, "min_group_channels": 1, "image_size": [8, 12], "vocab_size": 11, "embedding_dim": 4}
SMALL |= {"width_multipliers": [1, 2], "num_res_blocks": 1, "codebook_init_scale": 1.0}
GUMBEL = {"codebook": "gumbel", "codebook_init_scale": None, "z_channels": None}
STRAIGHT = {"codebook_gradient": "straight_through"}
AROUND = {"autoencoder": "vqgan", "quant_conv_kernel_size": 1, "z_channels": 6}
ARCHITECTURES = {
    "llamagen": AROUND | {"has_unit_codes": True, "epsilon": 1e-12},
    "taming": AROUND | {"attention_levels": [1]},
    "maskgit": {"autoencoder": "maskgit"},
    "ibq": AROUND | {"attention_levels": [1], "codebook_metric": "inner_product", "codebook_gradient": "index"},
    "magvit2": {"autoencoder": "magvit2", "codebook": "lfq", "vocab_size": 16, "codebook_init_scale": None},
}


def slowly(cases):
    """Mark cases that are left to the slow tests."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


SOME_PROJECTS = ["magvit2", *slowly([["llamagen"], ["taming"], ["maskgit"], ["ibq"]])]


def convert(content, folder, *options, name="x.ckpt"):
    """Convert a checkpoint by the command, and load what it wrote."""
    torch.save(content, folder / name)
    main(["--checkpoint", str(folder / name), "--output_dir", str(folder / "out"), *map(str, options)])
    return VQVAE.from_pretrained(folder / "out")


def make(project, seed=0, **options):
    """Return a tiny tokenizer of a project's architecture, its norms not those of the start."""
    torch.manual_seed(seed)
    model = VQVAE(VQVAEConfig(**SMALL | ARCHITECTURES[project] | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, 3, *model.config.image_size, generator=generator) - 1


@needs_whole
@pytest.mark.parametrize(("name", "project"), [*CASES, *slowly(LARGER_CASES)])
def test_matches_the_reference(name, project, tmp_path):
    case = load_case(name, is_whole=True)
    is_unit = case.facts.get("pixels") == "unit"
    img = 2 * case.tensors["img"] - 1 if is_unit else case.tensors["img"]
    H, W = img.shape[2:]
    model = convert(case.content(), tmp_path, "--image_size", f"[{H},{W}]")
    with torch.no_grad():
        assert case.error(model.encode(img), "features") < TOLERANCE
        assert torch.equal(model.img_to_idx(img), case.tensors["idx"])
        codes = model.quantizer.idx_to_features(case.tensors["idx"])
        if "quantized" in case.tensors:
            assert case.error(codes, "quantized") < TOLERANCE
        image = model.decode(codes)
    assert case.error((image + 1) / 2 if is_unit else image, "reconstruction") < DECODER_TOLERANCE
    greedy = case.tensors.get("greedy_idx")
    if greedy is not None:
        expected = case.tensors["greedy_img"]
        expected = expected.clamp(0, 1) * 2 - 1 if is_unit else expected.clamp(-1, 1)
        assert (model.idx_to_img(greedy.flatten(1)) - expected).abs().max() < 2 * DECODER_TOLERANCE


@needs_whole
@pytest.mark.slow
@pytest.mark.parametrize("name", ["magvit2", "ibq"])
def test_plain_weights_on_demand(name, tmp_path):
    case = load_case(name, is_whole=True)
    H, W = case.tensors["img"].shape[2:]
    model = convert(case.content(), tmp_path, "--image_size", f"[{H},{W}]", "--averaged_weights", "false")
    assert torch.equal(model.img_to_idx(case.tensors["img"]), case.tensors["raw_idx"])
    assert not torch.equal(case.tensors["idx"], case.tensors["raw_idx"])


# Over shapes that a checkpoint tells.
UNEVEN = {"width_multipliers": [2, 1, 3], "num_res_blocks": 2, "image_size": 16}
SHAPES = [(project, UNEVEN) for project in ARCHITECTURES]
SHAPES += [("taming", GUMBEL), ("taming", {"attention_levels": []}), ("llamagen", {"has_unit_codes": False})]
MORE_SHAPES = [(project, {}) for project in ARCHITECTURES]
MORE_SHAPES += [(project, {"width_multipliers": [1], "image_size": [4, 6]}) for project in ARCHITECTURES]
MORE_SHAPES += [(project, {"vocab_size": 5, "embedding_dim": 8}) for project in ARCHITECTURES if project != "magvit2"]
MORE_SHAPES += [("magvit2", {"embedding_dim": 3, "vocab_size": 8}), ("ibq", {"attention_levels": []})]
for levels in ([0], [0, 1]):
    MORE_SHAPES += [("taming", {"attention_levels": levels})]
    MORE_SHAPES += [("ibq", {"attention_levels": levels, "z_channels": None})]


@pytest.mark.parametrize(("project", "options"), [*SHAPES, *slowly(MORE_SHAPES)])
def test_every_shape_is_told_and_computes_as_described(project, options):
    if project in ("taming", "ibq") and options.get("width_multipliers"):
        options = options | {"attention_levels": [len(options["width_multipliers"]) - 1]}
    model = make(project, **options)
    chosen = FORMATS[project]
    state = chosen.write(model)
    fitting = [name for name, each in FORMATS.items() if each.fits(state)]
    assert fitting == (["taming", "ibq"] if project in ("taming", "ibq") else [project])
    normalized = {} if model.config.has_unit_codes or project != "llamagen" else {"has_normalized_codes": False}
    back = chosen.take_over(state, image_size=model.config.image_size, **normalized)
    unsaid = ("codebook_init_scale", "epsilon", "dtype", "transformers_version")
    told = {name: value for name, value in back.config.to_dict().items() if name not in unsaid}
    assert told["z_channels"] in (None, model.config.latent_channels)
    told["z_channels"] = model.config.z_channels
    assert told == {name: getattr(model.config, name) for name in told}
    again = chosen.write(back)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    images = pixels(model)
    with torch.no_grad():
        features = back.encode(images)
        assert (features - encode(state, images, project)).abs().max() < TOLERANCE
        expected = assign(state, features, project, is_normalized=not normalized)
        assert torch.equal(back.quantizer.indices(features), expected)
        codes = back.quantizer.idx_to_features(expected)
        assert (back.decode(codes) - decode(state, codes, project)).abs().max() < TOLERANCE


@pytest.mark.parametrize("project", SOME_PROJECTS)
def test_the_command_gives_back_every_bit(project, tmp_path):
    model = make(project)
    model.save_pretrained(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--output_dir", str(tmp_path / "there"), "--export"]
    main(["--format", project, *arguments])
    (path,) = (tmp_path / "there").iterdir()
    content = torch.load(path, weights_only=True)
    container = FORMATS[project].container
    state = content if container is None else content[container]
    assert list(content) == [container] if container else True
    size = ["--format", project, "--image_size", str(model.config.image_size)]
    for name in ("x.ckpt", "x.safetensors"):
        if name.endswith("safetensors"):
            save_file(state, tmp_path / name)
            main(["--checkpoint", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), *size])
            back = VQVAE.from_pretrained(tmp_path / "out")
        else:
            back = convert(content, tmp_path, *size)
        tensors = model.state_dict()
        assert back.state_dict().keys() == tensors.keys()
        assert all(torch.equal(back.state_dict()[name], tensors[name]) for name in tensors)


def averaged(state):
    """Return a file's tensors with averages of other values beside them."""
    averages = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in state.items()}
    return state | averages | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}


def test_a_file_of_taming_s_names_is_told_by_its_averages(tmp_path, capsys):
    state = FORMATS["taming"].write(make("taming"))
    plain = convert({"state_dict": state | {"loss.x": torch.zeros(1)}}, tmp_path, "--image_size", 8)
    assert (plain.config.codebook_metric, "(format taming)" in capsys.readouterr().out) == ("euclidean", True)
    mean = convert({"state_dict": averaged(state)}, tmp_path, "--image_size", 8)
    assert (mean.config.codebook_metric, "(format ibq)" in capsys.readouterr().out) == ("inner_product", True)
    codes = mean.quantizer.get_codebook() - plain.quantizer.get_codebook()
    assert torch.allclose(codes, torch.ones_like(codes), atol=1e-6)
    named = convert({"state_dict": averaged(state)}, tmp_path, "--image_size", 8, "--format", "taming")
    assert named.config.codebook_metric == "euclidean"


def test_the_first_stage_comes_out_of_a_joint_file(tmp_path):
    state = FORMATS["taming"].write(make("taming"))
    joint = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    joint |= {"transformer.tok_emb.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1)}
    joint |= {"first_stage_model.loss.count": torch.zeros(1, dtype=torch.int64), "loss.y": torch.zeros(1)}
    model = convert({"state_dict": joint}, tmp_path, "--image_size", 8)
    assert torch.equal(model.quantizer.get_codebook(), state["quantize.embedding.weight"])
    with pytest.raises(ValueError, match=r"unexpected: else.z \(1,\)"):
        convert({"state_dict": joint | {"else.z": torch.zeros(1)}}, tmp_path, "--image_size", 8)


class Poison:
    """Pickled, a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_poisoned_file_is_converted_and_nothing_in_it_called(tmp_path):
    state = FORMATS["magvit2"].write(make("magvit2"))
    beside = {"callbacks": {Poison: Poison(tmp_path / "mark")}, "epoch": 3}
    model = convert({"state_dict": state | {"loss.x": torch.zeros(1)}} | beside, tmp_path, "--image_size", 8)
    assert torch.equal(model.decoder.conv_out.weight, state["decoder.conv_out.weight"])
    with pytest.raises(ValueError, match=r"holds \['encoder.conv_in.weight'\], no tensors"):
        convert({"state_dict": state | {"encoder.conv_in.weight": Poison(tmp_path / "mark")}}, tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("project", SOME_PROJECTS)
def test_each_odd_tensor_is_named(project):
    chosen = FORMATS[project]
    whole = chosen.write(make(project))
    whole.pop("quantize.codebook_used", None)
    size = {"image_size": [8, 12]}
    for name in list(whole)[::8]:
        state = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(ValueError, match=f"missing: {re.escape(name)} "):
            chosen.take_over(state, **size)
    with pytest.raises(ValueError, match=r"unexpected: head.weight \(1,\)"):
        chosen.take_over(whole | {"head.weight": torch.zeros(1)}, **size)
    with pytest.raises(ValueError, match=r"misshapen: decoder.norm_out.bias \(5,\), expected \(32,\)"):
        chosen.take_over(whole | {"decoder.norm_out.bias": torch.zeros(5)}, **size)
    with pytest.raises(ValueError, match="no floating point: decoder.norm_out.bias torch.int64"):
        chosen.take_over(whole | {"decoder.norm_out.bias": torch.zeros(32, dtype=torch.int64)}, **size)
    if project != "magvit2":
        codes = whole["quantize.embedding.weight"].clone()
        codes[1, 1] = torch.nan
        with pytest.raises(ValueError, match="codebook.weight has 1 of .* values NaN"):
            chosen.take_over(whole | {"quantize.embedding.weight": codes}, **size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "maskgit"], r"format is 'maskgit'; expected 'taming' or 'ibq': it holds \d+ tensors, encoder"),
        (["--format", "var", "--scales", "1,2"], "format is 'var'; expected 'taming' or 'ibq'"),
        (["--image_size", "7"], r"image_size is \[7, 7\]; expected sides divisible by 2"),
        (["--image_size", "[8,x]"], "image_size"),
        (["--scales", "1,2"], r"\['scales'\] do not go with format 'taming'; expected none but .*'image_size'"),
        (["--format", "taming", "--phi_ratio", "0.5"], r"\['phi_ratio'\] do not go with format 'taming'"),
        (["--format", "llamagen", "--averaged_weights"], r"\['averaged_weights'\] do not go with format 'llamagen'"),
        (["--format", "magvit2", "--normalized_codes"], r"\['normalized_codes'\] do not go with format 'magvit2'"),
        (["--format", "ibq", "--export", "--image_size", "8"], r"\['image_size'\] do not go with export"),
        (["--format", "ibq", "--export", "--phi_names", "shared"], r"\['phi_names'\] do not go with export"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        convert({"state_dict": FORMATS["taming"].write(make("taming"))}, tmp_path, *options)
    assert re.search(message, capsys.readouterr().err + str(caught.value))


@pytest.mark.parametrize(
    ("project", "options", "message"),
    [
        ("llamagen", {"attention_levels": [0]}, r"attention_levels is \[0\]; expected one of \[None, \[1\]\] in Llama"),
        ("llamagen", {"quant_conv_kernel_size": 3}, "quant_conv_kernel_size is 3; expected 1"),
        ("llamagen", {"tile": 2}, r"tile is \[2, 2\]; expected \[1, 1\] in LlamaGen's format"),
        ("llamagen", {"layout": "scales", "scales": [1, [4, 6]]}, "layout is 'scales'; expected 'tiles'"),
        ("llamagen", {"has_unit_codes": False, "codebook_metric": "cosine"}, "codebook_metric is 'cosine'"),
        ("taming", {"has_unit_codes": True}, "has_unit_codes is True; expected False in taming's format"),
        ("taming", {"codebook_metric": "inner_product"}, "codebook_metric is 'inner_product'; expected 'euclidean'"),
        ("ibq", {**GUMBEL, "codebook_metric": "euclidean", **STRAIGHT}, "codebook is 'gumbel'; expected 'learned'"),
        ("ibq", {"codebook_metric": "euclidean"}, "codebook_metric is 'euclidean'; expected 'inner_product' in IBQ's"),
        ("maskgit", {"autoencoder": "magvit2"}, "autoencoder is 'magvit2'; expected 'maskgit' in MaskGIT's format"),
        ("maskgit", {"hidden_dim": 16}, "hidden_dim is 16; expected a multiple of 32 for MaskGIT"),
        ("ibq", {"codebook_digits": [4, 3], "vocab_size": 12}, r"codebook_digits is \[4, 3\]; expected None in IBQ's"),
        ("magvit2", {"min_group_channels": 4}, "min_group_channels is 4; expected at most 1 with hidden_dim 32"),
        ("magvit2", {"codebook": "bsq"}, "codebook is 'bsq'; expected 'lfq' in Open-MAGVIT2's format"),
    ],
)
def test_export_refuses_what_the_format_cannot_say(project, options, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[project].write(make(project, **options))


@pytest.mark.parametrize(
    ("project", "options"), [("magvit2", {}), *slowly([("maskgit", {}), ("ibq", {}), ("taming", GUMBEL)])]
)
def test_the_architectures_learn_from_scratch(project, options):
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(**SMALL | ARCHITECTURES[project] | options))
    images = pixels(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for is_checkpointed in [False] * 8 + [True] * 7:
        if is_checkpointed:
            model.activation_checkpointing_enable()
        loss = model.train()(images).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
