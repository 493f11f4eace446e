"""The pipeline: labels, images that do not depend on their batch, saving, offloading, downloading."""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from nextblock.pipelines import ClassToImagePipeline, storage
from nextblock.pipelines.labels import resolve_labels
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.conditioning import ClassConditions
from nextblock.tokenizer import VQVAE, VQVAEConfig

CLASS_NAMES = ("blue tit", "great tit", "wren", "Cardigan", "cardigan", "crane", "crane")
LAYOUTS = {
    "scales": {"layout": "scales", "scales": [1, 2, 4], "num_phi": 2},
    "raster": {"tile": 1},
    "rows": {"tile": [1, 4]},
}
SIZES = {"image_size": 16, "hidden_dim": 16, "vocab_size": 24, "embedding_dim": 8}


def make_tokenizer(**options) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**SIZES | {"codebook_init_scale": 0.5} | options)).eval()


def make_prior(tokenizer: VQVAE, **options) -> BlockPrior:
    """A prior whose logits are far from uniform, so that tokens tell rounding and guidance."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 24, "embedding_dim": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    classes = {"num_classes": 7, "class_names": CLASS_NAMES, "adaln_gamma_init": 1.0}
    prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes | classes | options)).eval()
    with torch.no_grad():
        prior.head.weight.mul_(100)
        prior.class_emb.weight.mul_(5)
    return prior


def make_pipeline(layout: str = "scales", **options) -> ClassToImagePipeline:
    tokenizer = make_tokenizer(**LAYOUTS[layout])
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=make_prior(tokenizer, **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> ClassToImagePipeline:
    return make_pipeline()


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + seed) for seed in range(first, first + count)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (2, [2]),
        ("wren", [2]),
        ("WREN ", [2]),
        ("eat t", [1]),
        ("Cardigan", [3]),
        ("cardigan", [4]),
        (["wren", 0, "Blue Tit"], [2, 0, 0]),
        (range(3), [0, 1, 2]),
        ((6, 5), [6, 5]),
        (torch.tensor([5, 1]), [5, 1]),
        (torch.tensor(4), [4]),
    ],
)
def test_labels_are_numbers_names_or_parts_of_names(pipe, wanted, labels):
    assert pipe.resolve_labels(wanted) == labels


def test_accents_count_however_they_are_written():
    conditions = ClassConditions(2, ["\u00e9t\u00e9", "hiver"])
    assert resolve_labels("e\u0301te\u0301", conditions) == [0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (7, "class_labels holds 7; expected 0 to 6"),
        ([0, -1], "class_labels holds -1; expected 0 to 6"),
        (True, "class_labels holds True; expected integers and class names"),
        ([1.0], "class_labels holds 1.0; expected integers and class names"),
        (1.0, "class_labels is 1.0; expected a label, a class name, or a list of them"),
        (torch.tensor([0.5]), "class_labels holds 0.5; expected integers and class names"),
        (torch.tensor([[1]]), r"class_labels holds \[1\]; expected integers and class names"),
        ([], r"class_labels is \[\]; expected a label"),
        (None, "class_labels is None; expected a label"),
        ({1}, r"class_labels is \{1\}; expected a label"),
        ("tit", r"'tit', which names 2 classes; did you mean one of \['blue tit', 'great tit'\]"),
        ("crane", r"'crane', which names 2 classes; did you mean one of \['crane', 'crane'\]"),
        ("CARDIGAN", r"'CARDIGAN', which names 2 classes; did you mean one of \['Cardigan', 'cardigan'\]"),
        ("wrenn", r"'wrenn', which names no class; did you mean one of \['wren', "),
        ("", "'', which names no class"),
    ],
)
def test_labels_that_name_no_class_are_refused(pipe, wanted, message):
    with pytest.raises(ValueError, match=message):
        pipe(wanted)


def test_names_need_a_prior_that_has_some():
    pipe = make_pipeline(class_names=None)
    assert pipe.resolve_labels([0, 6]) == [0, 6]
    with pytest.raises(ValueError, match="'wren', but the prior has no class names; expected integers"):
        pipe("wren")


def test_images_come_label_by_label(pipe):
    together = pipe([2, 0], num_images_per_label=2, generator=generators(4), output_type="pt").images
    for position, label in enumerate((2, 2, 0, 0)):
        alone = pipe(label, generator=generators(1, first=position), output_type="pt").images
        torch.testing.assert_close(together[position], alone[0], rtol=0, atol=1e-5)
    assert len(together.flatten(1).unique(dim=0)) == 4


def test_output_types_hold_the_same_images(pipe):
    outputs = {
        kind: pipe(["wren", 1], generator=seeded(), output_type=kind).images for kind in ("latent", "pt", "np", "pil")
    }
    assert [tuple(idx.shape) for idx in outputs["latent"]] == [(2, 1), (2, 4), (2, 16)]
    expected = pipe.tokenizer.idxBl_to_img(outputs["latent"]) / 2 + 0.5
    assert torch.equal(outputs["pt"], expected) and outputs["pt"].shape == (2, 3, 16, 16)
    assert np.array_equal(outputs["np"], expected.permute(0, 2, 3, 1).numpy())
    for picture, image in zip(outputs["pil"], outputs["np"], strict=True):
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), (image * 255).round())
    assert 0 <= outputs["np"].min() < outputs["np"].max() <= 1


def test_the_output_is_a_model_output_or_a_tuple(pipe):
    output = pipe(0, generator=seeded(), output_type="pt")
    assert isinstance(output, ImagePipelineOutput)
    (images,) = pipe(0, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, output.images)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0, "guidance_schedule": "linear"}])
def test_an_image_does_not_depend_on_its_batch(layout, guidance):
    pipe = make_pipeline(layout)
    labels = [3, 1, 4, 1, 5, 0, 2, 6, 6]

    def sample(first: int, count: int, batch_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"batch_size": batch_size, **guidance}
        wanted = labels[first : first + count]
        idx_Bl = pipe(wanted, generator=generators(count, first), output_type="latent", **options).images
        images = pipe(wanted, generator=generators(count, first), output_type="pt", **options).images
        return torch.cat(idx_Bl, dim=1), images

    idx, images = sample(0, 9, None)
    assert len(idx.unique(dim=0)) == 9
    for batch_size in (None, 1, 2, 4, 64):
        whole = sample(0, 9, batch_size)
        for first, count in ((0, 9), (4, 1), (3, 3), (1, 8)):
            got, rows = sample(first, count, batch_size), slice(first, first + count)
            assert torch.equal(got[0], idx[rows]), (batch_size, count)
            torch.testing.assert_close(got[1], images[rows], rtol=0, atol=1e-5)
            # Batches of one shape round alike.
            assert batch_size is None or torch.equal(got[1], whole[1][rows]), (batch_size, count)


@pytest.mark.parametrize(
    ("batch_size", "num_images", "expected"), [(None, 1, [1]), (None, 3, [3]), (2, 3, [2, 2]), (4, 1, [4])]
)
def test_a_request_computes_the_rows_that_it_asks_for(pipe, batch_size, num_images, expected):
    sampled, decoded = [], []
    pipe.prior.blocks[0].ffn.register_forward_pre_hook(lambda module, args: sampled.append(len(args[0])))
    pipe.tokenizer.decoder.register_forward_pre_hook(lambda module, args: decoded.append(len(args[0])))
    for scale in (1.0, 2.0):
        sampled.clear(), decoded.clear()
        pipe([0] * num_images, batch_size=batch_size, guidance_scale=scale, output_type="pt")
        rows = [n * (1 + (scale != 1)) for n in expected for _ in range(pipe.num_timesteps)]
        assert sampled == rows and decoded == expected


def test_one_generator_seeds_one_for_each_image(pipe):
    generator = seeded(5)
    images = pipe([0, 1, 2], generator=generator, output_type="pt").images
    other = seeded(5)
    own = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**63 - 1, (3,), generator=other).tolist()]
    assert torch.equal(pipe([0, 1, 2], generator=own, output_type="pt").images, images)
    assert torch.equal(generator.get_state(), other.get_state())
    assert not torch.equal(pipe([0, 1, 2], generator=generator, output_type="pt").images, images)
    torch.manual_seed(5)
    assert torch.equal(pipe([0, 1, 2], output_type="pt").images, images)


def test_sampling_options_reach_the_prior(pipe):
    def idx(**options) -> torch.Tensor:
        return torch.cat(pipe(range(7), generator=seeded(), output_type="latent", **options).images, dim=1)

    plain = idx()
    for options in (
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "guidance_schedule": "linear"},
        {"temperature": 0.3},
        {"top_k": 2},
        {"top_p": 0.3},
    ):
        assert not torch.equal(idx(**options), plain), options
    likeliest = idx(top_k=1)
    assert torch.equal(likeliest, idx(temperature=1e-4)) and torch.equal(likeliest, idx(top_p=1e-6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images_per_label": 0}, "num_images_per_label is 0; expected a positive integer"),
        ({"num_images_per_label": True}, "num_images_per_label is True; expected a positive integer"),
        ({"batch_size": 0}, "batch_size is 0; expected a positive integer"),
        ({"batch_size": 2.0}, "batch_size is 2.0; expected a positive integer"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; expected one of"),
        ({"generator": generators(2)}, "generator is a list of 2; expected 1 torch.Generators"),
        ({"generator": 7}, "generator is 7; expected a torch.Generator"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; expected a number from 0 to 1000"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine'; expected one of"),
        ({"temperature": 0.0}, r"temperature is 0.0; expected a number from 1e-06 to 1e\+06"),
        ({"top_k": 25}, "top_k is 25; expected an integer from 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
    ],
)
def test_options_outside_their_range_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(0, **options)


def test_unconditional_sampling():
    pipe = make_pipeline(num_classes=0, class_names=None)
    images = pipe(num_images_per_label=3, generator=generators(3), output_type="pt").images
    assert len(images.flatten(1).unique(dim=0)) == 3
    alone = pipe(generator=generators(1, first=2), output_type="pt").images[0]
    torch.testing.assert_close(alone, images[2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="class_labels is 'wren'; expected None for an unconditional model"):
        pipe("wren")
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model without classes"):
        pipe(guidance_scale=2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
def test_a_saved_pipeline_draws_the_same_images(layout, pipeline_class, tmp_path):
    pipe = make_pipeline(layout)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassToImagePipeline"
    assert index["prior"] == ["nextblock.prior.modeling_block_prior", "BlockPrior"]
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded) is ClassToImagePipeline and not loaded.prior.training
    assert loaded.prior.config.class_names == list(CLASS_NAMES)
    loaded.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.5, "output_type": "pt"}
    images = [p(["wren", 0], 2, generator=seeded(), **options).images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_half_precision_weights_keep_the_quantizer_in_float32(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prior.dtype == torch.bfloat16 and pipe.tokenizer.quantizer.get_codebook().dtype == torch.float32
    images = pipe([0, 1, 2], generator=generators(3), batch_size=2, output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all()
    # Batches of one shape: position and request do not matter in half precision either.
    last = pipe(2, generator=generators(1, first=2), batch_size=2, output_type="pt").images
    assert torch.equal(images[2], last[0])


def test_stages_that_do_not_fit_are_refused():
    tokenizer = make_tokenizer(**LAYOUTS["scales"])
    prior = make_prior(tokenizer)
    for options, message in (
        (LAYOUTS["raster"], "quantizer has layout .*'tiles'.*; expected .*'scales'"),
        (LAYOUTS["scales"] | {"vocab_size": 25}, "quantizer has 25 codes; expected 24"),
        (LAYOUTS["scales"] | {"embedding_dim": 4}, "quantizer has codes of 4 channels; expected 8"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassToImagePipeline(tokenizer=make_tokenizer(**options), prior=prior)


class CountingHook:
    """Stands in for accelerate's offload hook."""

    def __init__(self):
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


def test_methods_beside_forward_call_the_offload_hook():
    pipe = make_pipeline()
    hooks = {name: CountingHook() for name in ("prior", "tokenizer")}
    for name, hook in hooks.items():
        getattr(pipe, name)._hf_hook = hook
    idx_Bl = pipe.prior.generate(torch.tensor([0]), pipe.tokenizer.quantizer, generator=generators(1))
    assert (hooks["prior"].num_calls, hooks["tokenizer"].num_calls) == (1, 0)
    images = pipe.tokenizer.idxBl_to_img(idx_Bl)
    assert hooks["tokenizer"].num_calls == 1
    pipe.tokenizer.img_to_idxBl(images)
    assert hooks["tokenizer"].num_calls == 2
    pipe.tokenizer.idxBl_to_var_input(idx_Bl)
    assert hooks["tokenizer"].num_calls == 3


def test_hooks_are_released_after_sampling(monkeypatch):
    pipe, released = make_pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: released.append(True))
    pipe(0)
    assert released == [True] and ClassToImagePipeline.model_cpu_offload_seq == "prior->tokenizer"


def test_a_download_fetches_configuration_and_safetensors_alone(monkeypatch, tmp_path):
    calls = []

    def snapshot_download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(tmp_path)

    make_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(storage, "snapshot_download", snapshot_download)
    patterns = {"allow_patterns": ["*.json", "*.safetensors", "README.md", "samples.png", "text_tokenizer/*"]}
    assert ClassToImagePipeline.download("someone/birds") == str(tmp_path)
    assert calls == [(("someone/birds",), patterns)]
    pipe = ClassToImagePipeline.from_pretrained(
        "someone/birds", revision="v1", cache_dir="cache", token="secret", dtype=torch.float32
    )
    assert type(pipe) is ClassToImagePipeline
    args, kwargs = calls[1]
    assert args == ("someone/birds",)
    expected = patterns | {"revision": "v1", "cache_dir": "cache", "token": "secret"}
    assert {name: kwargs.get(name) for name in expected} == expected
    assert set(kwargs) <= {*expected, "force_download", "local_files_only"}


def test_the_progress_bar_shows_blocks_and_can_be_disabled(capsys):
    pipe = make_pipeline()
    pipe([0, 1, 2], batch_size=1)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe([0, 1, 2], batch_size=1)
    assert "9/9" in capsys.readouterr().err


def test_sampling_leaves_no_gradients_and_no_weights_changed():
    pipe = make_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.prior.state_dict().items()}
    images = pipe(0, generator=seeded(), output_type="pt").images
    assert not images.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.prior.state_dict().items())


def test_diffusers_knows_the_class():
    assert diffusers.ClassToImagePipeline is ClassToImagePipeline
    components = SimpleNamespace(**make_pipeline().components)
    assert isinstance(components.prior, BlockPrior) and isinstance(components.tokenizer, VQVAE)
