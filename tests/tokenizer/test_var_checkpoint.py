"""VAR tokenizers: converted, they compute what the reference does; exported, they are back bit for bit."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nextblock.convert_tokenizer import main
from nextblock.tokenizer import VQVAE, VQVAEConfig
from nextblock.tokenizer.var_checkpoint import vqvae_from_var, vqvae_to_var

from ..parity import VAR_CASES, load_case, needs_whole

TOLERANCE = 1e-4


def drawn_state(case):
    return case.state_dict("vqvae", "vae.")


def scales_of(case):
    return case.facts["vqvae"]["v_patch_nums"]


def typed(scales):
    return ",".join(map(str, scales))


def assert_case_holds(model, case):
    tensors, layout = case.tensors, model.layout
    idx_Bl = layout.split(tensors["idx"])
    with torch.no_grad():
        assert case.error(model.encode(tensors["img"]), "features") < TOLERANCE
        assert torch.equal(layout.join(model.img_to_idxBl(tensors["img"])), tensors["idx"])
        assert case.error(model.idxBl_to_var_input(idx_Bl), "var_input") < TOLERANCE
        f_hat, vq_loss, _ = model.quantizer(tensors["features"])
        assert case.error(f_hat, "f_hat") < TOLERANCE
        assert case.error(vq_loss, "vq_loss") < TOLERANCE
        assert case.image_error(model.idxBl_to_img(idx_Bl), "reconstruction") < TOLERANCE


@pytest.fixture(scope="module", params=VAR_CASES)
def converted(request, tmp_path_factory):
    """A parity case, and the folder that the command line made of its weights as a pickle."""
    case, folder = load_case(request.param), tmp_path_factory.mktemp(request.param)
    torch.save(drawn_state(case), folder / "vae.pth")
    arguments = ["--checkpoint", str(folder / "vae.pth"), "--output_dir", str(folder / "tokenizer")]
    main(["--format", "var", *arguments, "--scales", typed(scales_of(case))])
    return case, folder / "tokenizer"


def small_state(seed=0, phi_names=None, **options):
    """A tiny VAR tokenizer's tensors: two levels, one block each."""
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 32, "width_multipliers": [1, 2], "num_res_blocks": 1, "vocab_size": 11}
    sizes |= {"embedding_dim": 4, "quant_conv_kernel_size": 3, "layout": "scales", "scales": [1, 2, 3, 5]}
    sizes |= {"min_group_channels": 1}
    config = VQVAEConfig(autoencoder="vqgan", image_size=10, codebook_init_scale=1.0, **sizes | options)
    return vqvae_to_var(VQVAE(config), phi_names)


def test_matches_the_reference(converted):
    case, folder = converted
    assert_case_holds(VQVAE.from_pretrained(folder), case)


@needs_whole
@pytest.mark.parametrize("name", VAR_CASES)
def test_matches_every_pixel_of_the_reference(name):
    case = load_case(name, is_whole=True)
    assert_case_holds(vqvae_from_var(drawn_state(case), scales=scales_of(case)), case)


def test_safetensors_give_the_same_files(converted, tmp_path):
    case, folder = converted
    save_file(drawn_state(case), tmp_path / "vae.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "vae.safetensors"), "--output_dir", str(tmp_path / "out")]
    main(["--format", "var", *arguments, "--scales", typed(scales_of(case))])
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_saved_and_loaded_again_computes_the_same(converted, tmp_path):
    case, folder = converted
    first = VQVAE.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    second = VQVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [model(case.tensors["img"], return_dict=False) for model in (first, second)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][2], outputs[1][2], strict=True))


def test_config_holds_what_shapes_tell(converted):
    case, folder = converted
    config, facts = VQVAE.from_pretrained(folder).config, case.facts["vqvae"]
    assert config.hidden_dim == facts["ch"]
    assert config.width_multipliers == [1, 1, 2, 2, 4]
    assert config.num_res_blocks == 2
    assert (config.vocab_size, config.embedding_dim) == (facts["vocab_size"], facts["z_channels"])
    assert config.num_phi == facts["share_quant_resi"]
    assert config.quant_conv_kernel_size == 3
    assert config.image_size == [64, 64]


def test_export_gives_back_every_bit(converted, tmp_path):
    case, folder = converted
    main(["--format", "var", "--checkpoint", str(folder), "--output_dir", str(tmp_path), "--export"])
    state, drawn = torch.load(tmp_path / "vae.pth", weights_only=True), drawn_state(case)
    counter = state.pop("quantize.ema_vocab_hit_SV")
    assert torch.equal(counter, torch.zeros(len(scales_of(case)), case.facts["vqvae"]["vocab_size"]))
    assert state.keys() == drawn.keys()
    assert all(torch.equal(state[name], drawn[name]) for name in drawn)


@pytest.mark.parametrize(
    ("phi_names", "num_phi", "prefix"),
    [
        ("partially_shared", 4, "qresi_ls.3."),
        ("partially_shared", 3, "qresi_ls.2."),
        ("shared", 1, "qresi."),
        ("separate", 4, "3."),
    ],
)
def test_phi_convolutions_are_told_by_their_names(phi_names, num_phi, prefix):
    state = small_state(num_phi=num_phi, phi_names=phi_names)
    assert f"quantize.quant_resi.{prefix}weight" in state
    model = vqvae_from_var(state, scales=[1, 2, 3, 5])
    assert model.config.num_phi == num_phi
    assert model.config.image_size == [10, 10]
    back = vqvae_to_var(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_phi_ratio_zero_takes_a_checkpoint_without_phi():
    state = small_state(num_phi=0)
    assert not [name for name in state if "quant_resi" in name]
    model = vqvae_from_var(state, scales=[1, 2, 3, 5], phi_ratio=0)
    assert model.config.num_phi == 0
    with pytest.raises(ValueError, match="missing: quantize.quant_resi.qresi_ls.0.weight"):
        vqvae_from_var(state, scales=[1, 2, 3, 5])


def reference_indices(state, features, scales, phi_of_scale, is_normalized):
    """Multi-scale quantization in float64, written down once more from the published description."""
    codes, rest, indices = state["quantize.embedding.weight"].double(), features.double(), []
    size = scales[-1]
    for scale, phi in zip(scales, phi_of_scale, strict=True):
        z = F.interpolate(rest, size=(scale, scale), mode="area").permute(0, 2, 3, 1)
        if is_normalized:
            idx = (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
        else:
            idx = (z[..., None, :] - codes).square().sum(-1).argmin(-1)
        h = codes[idx].permute(0, 3, 1, 2)
        h = F.interpolate(h, size=(size, size), mode="bicubic") if scale != size else h
        weight, bias = (state[f"quantize.quant_resi.{phi}{kind}"].double() for kind in ("weight", "bias"))
        rest = rest - 0.5 * h - 0.5 * F.conv2d(h, weight, bias, padding=1)
        indices.append(idx.flatten(1))
    return indices


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize(
    ("phi_names", "num_phi", "phi_of_scale"),
    [
        ("partially_shared", 3, ["qresi_ls.0.", "qresi_ls.0.", "qresi_ls.1.", "qresi_ls.2."]),
        ("separate", 4, ["0.", "1.", "2.", "3."]),
        ("shared", 1, ["qresi."] * 4),
    ],
)
def test_quantizes_as_described(is_normalized, phi_names, num_phi, phi_of_scale, tmp_path):
    state = small_state(num_phi=num_phi, phi_names=phi_names)
    torch.save(state, tmp_path / "vae.pth")
    arguments = ["--checkpoint", str(tmp_path / "vae.pth"), "--output_dir", str(tmp_path / "out")]
    flags = ["--normalized_codes"] if is_normalized else []
    main(["--format", "var", *flags, *arguments, "--scales", "1,2,3,5"])
    model = VQVAE.from_pretrained(tmp_path / "out")
    assert (model.config.codebook_metric == "cosine") == is_normalized
    features = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = reference_indices(state, features, [1, 2, 3, 5], phi_of_scale, is_normalized)
    assert not model.config.has_unit_codes
    assert torch.equal(model.quantizer.indices(features), torch.cat(expected, 1))


def test_other_scales_take_the_same_codes():
    model = vqvae_from_var(small_state(num_phi=4), scales=[1, 3, 4, 6, 8])
    assert model.config.image_size == [16, 16]
    assert model.layout.block_lengths == (1, 9, 16, 36, 64)


def test_every_odd_tensor_is_named():
    state = small_state(num_phi=4)
    del state["quantize.embedding.weight"], state["encoder.mid.attn_1.qkv.bias"]
    del state["encoder.down.1.block.0.conv1.weight"]
    state["encoder.conv_in.weight"] = torch.zeros(31, 3, 3, 3)
    state["quantize.quant_resi.qresi_ls.1.bias"] = torch.zeros(5)
    state["discriminator.head.weight"] = torch.zeros(1)
    state["decoder.norm_out.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(ValueError) as caught:
        vqvae_from_var(state, scales=[1, 2, 3, 5])
    assert str(caught.value).splitlines()[1:] == [
        "  missing: encoder.down.1.block.0.conv1.weight (64, 32, 3, 3)",
        "  missing: encoder.mid.attn_1.qkv.bias (192,)",
        "  missing: quantize.embedding.weight (11, 4)",
        "  unexpected: discriminator.head.weight (1,)",
        "  misshapen: encoder.conv_in.weight (31, 3, 3, 3), expected (32, 3, 3, 3)",
        "  misshapen: quantize.quant_resi.qresi_ls.1.bias (5,), expected (4,)",
        "  no floating point: decoder.norm_out.bias torch.int64",
    ]


def test_each_missing_tensor_is_named():
    whole = small_state(num_phi=3)
    autoencoder = [name for name in whole if name.startswith(("encoder.", "decoder."))]
    others = whole.keys() - set(autoencoder) - {"quantize.ema_vocab_hit_SV"}
    for name in [*autoencoder[::7], *others]:
        state = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(ValueError, match=f"missing: {name} "):
            vqvae_from_var(state, scales=[1, 2, 3, 5])


class Stowaway:
    """Something that a pickle may not hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": Stowaway()}, r"holds \['weight'\], no tensors"),
        ({"trainer": {"weight": torch.zeros(1)}}, r"holds \['trainer'\], no tensors"),
        ([torch.zeros(1)], "holds a list; expected tensors by name"),
        ({"weight": torch.zeros(1)}, "lacks the tensors encoder.conv_in.weight"),
    ],
)
def test_other_pickles_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "vae.pth")
    arguments = ["--checkpoint", str(tmp_path / "vae.pth"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        main(["--format", "var", *arguments, "--scales", "1,2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vae.pth", "vae.safetensors"])
@pytest.mark.parametrize("content", [bytes(range(100)), b"", b"notes\n", b"{}\n", b"PK\x03\x04", b"\x80\x04N."])
def test_damaged_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = ["--checkpoint", str(tmp_path / name), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"{name}' cannot be read"):
        main(["--format", "var", *arguments, "--scales", "1,2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "scales is missing"),
        (["--scales", "1,two"], "scales is '1,two'; expected sizes"),
        (["--scales", "1,2", "--phi_names", "shared"], "phi_names is 'shared' without export"),
        (["--scales", "1,2", "--export"], r"\['scales'\] do not go with export"),
        (["--export", "--beta", "0.5"], r"\['beta'\] do not go with export"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--format", "var", "--checkpoint", "a", "--output_dir", "b", *arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "tiles", "scales": None}, "layout is 'tiles'; expected 'scales'"),
        ({"num_channels": 1}, "num_channels is 1; expected 3"),
        ({"hidden_dim": 16}, "hidden_dim is 16; expected a multiple of 32"),
        ({"min_group_channels": 4}, "min_group_channels is 4; expected at most 1 with hidden_dim 32"),
        ({"z_channels": 8}, "z_channels is 8, embedding_dim 4"),
        ({"scales": [1, [2, 3], 5]}, "expected square ones"),
        ({"num_phi": 1, "phi_names": "partially_shared"}, "expected 'shared'"),
        ({"num_phi": 4, "phi_names": "shared"}, "expected 'partially_shared'"),
        ({"phi_ratio": 0.0}, "phi_ratio is 0 with num_phi 4"),
    ],
)
def test_export_refuses_what_the_format_cannot_say(options, message):
    with pytest.raises(ValueError, match=message):
        small_state(**options)


def test_a_codebook_by_moving_average_is_exported_without_its_averages():
    state = small_state(codebook_update="ema", revival_threshold=0.1)
    assert not [name for name in state if "code_" in name]
    model = vqvae_from_var(state, scales=[1, 2, 3, 5])
    assert torch.equal(model.quantizer.get_codebook(), state["quantize.embedding.weight"])


def test_codes_that_are_nan_are_refused():
    state = small_state()
    state["quantize.embedding.weight"][3, 1] = torch.nan
    with pytest.raises(ValueError, match="quantization: codebook.weight has 1 of 44 values NaN or infinite"):
        vqvae_from_var(state, scales=[1, 2, 3, 5])
