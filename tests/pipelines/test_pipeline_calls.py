"""The call as people write it: a diffusers user's script, wrong calls, images that depend on their generator alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.pipelines import ClassToImagePipeline

IMAGE = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16), 255)
GOOD_IDX = [torch.full((1, length), -1) for length in (1, 4, 16)]

WRONG_CALLS = [
    ({"class_labels": 3}, "class_labels holds 3; expected 0 to 2"),
    ({"class_labels": [0, -1]}, "class_labels holds -1; expected 0 to 2"),
    ({"class_labels": "tit"}, r"class_labels holds 'tit', which names 2 classes; did you mean one of \['blue tit', "),
    ({"class_labels": "wern"}, r"class_labels holds 'wern', which names no class; did you mean one of \['wren', "),
    ({"class_labels": None}, "class_labels is None; expected a label, a class name, or a list"),
    ({"class_labels": []}, r"class_labels is \[\]; expected a label"),
    ({"class_labels": 0.5}, "class_labels is 0.5; expected a label"),
    ({"class_labels": np.array([0.5])}, "class_labels holds 0.5; expected integers and class names"),
    ({"num_images_per_label": 0}, "num_images_per_label is 0; expected a positive integer"),
    ({"num_images_per_label": 1.0}, "num_images_per_label is 1.0; expected a positive integer"),
    ({"guidance_scale": -0.5}, "guidance_scale is -0.5; expected a number from 0 to 1000"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a number from 0 to 1000"),
    ({"guidance_scale": "3"}, "guidance_scale is '3'; expected a number from 0 to 1000"),
    ({"guidance_schedule": "cosine"}, "guidance_schedule is 'cosine'; expected one of .*'power-cosine'"),
    ({"guidance_power": 0}, "guidance_power is 0; expected a number from 0.001 to 1000"),
    ({"temperature": 0}, r"temperature is 0; expected a number from 1e-06 to 1e\+06"),
    ({"temperature": "hot"}, r"temperature is 'hot'; expected a number from 1e-06 to 1e\+06"),
    ({"top_k": 13}, "top_k is 13; expected an integer from 0 .* to 12"),
    ({"top_k": True}, "top_k is True; expected an integer"),
    ({"top_p": 0}, r"top_p is 0; expected a number in \(0, 1\]"),
    ({"min_p": 1.5}, r"min_p is 1.5; expected a number from 0 to 1"),
    ({"min_p": float("nan")}, "min_p is nan; expected a number"),
    ({"is_smooth": 1}, "is_smooth is 1; expected True or False"),
    ({"generator": 42}, "generator is 42; expected a torch.Generator"),
    ({"generator": [torch.Generator()] * 2}, "generator is a list of 2; expected 1 torch.Generators"),
    ({"generator": [None]}, r"generator\[0\] is None; expected a torch.Generator"),
    ({"idx_Bl": GOOD_IDX[:2]}, "idx_Bl has 2 blocks; expected a list of 3"),
    ({"idx_Bl": [idx.float() for idx in GOOD_IDX]}, r"idx_Bl\[0\] has dtype torch.float32; expected torch.int64"),
    ({"idx_Bl": [idx + 13 for idx in GOOD_IDX]}, r"idx_Bl\[0\] has 1 rows from 12 to 12; expected 1 rows from -1"),
    ({"num_images_per_label": None}, "num_images_per_label is None; expected a positive integer"),
    ({"num_images_per_label": 10**9}, "num_images_per_label is 1000000000; expected a positive integer up to 1048576"),
    ({"idx_Bl": [1, 2, 3]}, r"idx_Bl\[0\] is a int; expected a torch.int64 tensor \(batch, 1\)"),
    ({"idx_Bl": [torch.tensor(1)] * 3}, r"idx_Bl\[0\] has shape \(\); expected"),
    ({"idx_Bl": [idx[:0] for idx in GOOD_IDX]}, r"given_idx_Bl\[0\] has no row; expected 1"),
    ({"output_type": np.array(["pil"])}, r"output_type is array\(.*; expected one of"),
    ({"output_type": "jpeg"}, r"output_type is 'jpeg'; expected one of \['pil', 'np', 'pt', 'latent'\]"),
    ({"callback_on_step_end": 3}, "callback_on_step_end is 3; expected a function"),
    (
        {"callback_on_step_end_tensor_inputs": ["latents"]},
        r"callback_on_step_end_tensor_inputs is \['latents'\]; expected a list of names among \['idx', 'logits'\]",
    ),
    ({"callback_on_step_end_tensor_inputs": "idx"}, "callback_on_step_end_tensor_inputs is 'idx'; expected a list"),
    ({"decode_batch_size": 0}, "decode_batch_size is 0; expected a positive integer"),
    ({"batch_size": "8"}, "batch_size is '8'; expected a positive integer"),
    ({"batch_size": 10**12}, "batch_size is 1000000000000; expected a positive integer up to 1048576"),
]
WRONG_EDITS = [
    ("reconstruct", {"image": "bird.png"}, "image is 'bird.png'; expected a PIL image, an array, a tensor"),
    ("reconstruct", {"image": []}, r"image is \[\]; expected a PIL image"),
    ("reconstruct", {"image": torch.full((1, 3, 16, 16), 255.0)}, "image reaches .*; expected values in"),
    ("reconstruct", {"image": IMAGE, "output_type": "jpeg"}, "output_type is 'jpeg'; expected one of"),
    ("reconstruct", {"image": Image.new("RGB", (0, 4))}, "image is 0 by 4 pixels; expected at least 1 by 1"),
    ("reconstruct", {"image": torch.zeros(3, 16, 16).to_sparse()}, "image is a tensor of layout torch.sparse_coo"),
    ("reconstruct", {"image": torch.zeros(3, 16, 16).to(torch.float8_e4m3fn)}, "image is torch.float8_e4m3fn on cpu"),
    ("reconstruct", {"image": torch.zeros(3, 16, 16, device="meta")}, "image is torch.float32 on meta; expected"),
    ("inpaint", {"mask_image": torch.full((16, 16), 255.0)}, "mask_image spans 255 to 255; expected numbers from 0"),
    ("inpaint", {"num_images_per_label": None}, "num_images_per_label is None; expected a positive integer"),
    ("inpaint", {"mask_image": None}, "mask_image is None; expected a PIL image"),
    ("inpaint", {"image": [IMAGE] * 2}, "image holds 2 images; expected 1"),
    ("inpaint", {"top_p": 2}, r"top_p is 2; expected a number in \(0, 1\]"),
    ("inpaint", {"idx_Bl": GOOD_IDX}, "idx_Bl is given; expected none"),
    ("inpaint", {"num_images_per_label": 0}, "num_images_per_label is 0; expected a positive integer"),
    ("outpaint", {"box": (0, 0, 17, 16)}, r"box is \(0, 0, 17, 16\); expected \(left, top, right, bottom\) inside 16"),
    ("outpaint", {"box": (8, 0, 8, 16)}, r"box is \(8, 0, 8, 16\); expected"),
    ("outpaint", {"box": 0.5}, "box is 0.5; expected"),
    ("interpolate", {"num_steps": 10**12}, "num_steps is 1000000000000; expected an integer of at least 2, up to"),
    ("interpolate", {"num_steps": 1}, "num_steps is 1; expected an integer of at least 2"),
    ("interpolate", {"image_b": [IMAGE] * 2}, "image_b holds 2 images; expected 1"),
    ("interpolate", {"output_type": "latent"}, r"output_type is 'latent'; expected one of \['pil', 'np', 'pt'\]"),
    ("progressive", {"output_type": "latent"}, "output_type is 'latent'; expected one of"),
    ("progressive", {"temperature": -1}, r"temperature is -1; expected a number from 1e-06 to 1e\+06"),
]
GOOD_EDITS = {
    "reconstruct": {},
    "inpaint": {"image": IMAGE, "mask_image": MASK, "class_labels": 0},
    "outpaint": {"image": IMAGE, "box": (4, 4, 12, 12), "class_labels": 0},
    "interpolate": {"image_a": IMAGE, "image_b": IMAGE},
    "progressive": {"class_labels": 0},
}


class CountingHook:
    """Stands in for accelerate's offload hook: knows whether its model was moved."""

    def __init__(self):
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


@pytest.fixture(scope="module")
def pipe(build_pipeline) -> ClassToImagePipeline:
    return build_pipeline()


@pytest.fixture
def unchanged(pipe):
    """Check that a call left the pipeline, the random numbers and the models' devices as they were."""

    def state() -> list:
        tensors = [*pipe.prior.state_dict().values(), *pipe.tokenizer.state_dict().values()]
        attributes = {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        return [{name: repr(value) for name, value in attributes.items()}, versions]

    before, random_state = state(), torch.get_rng_state()
    yield
    assert state() == before and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("options", "message"), WRONG_CALLS)
def test_wrong_calls_are_refused_by_name_and_leave_everything_alone(options, message, pipe, unchanged, monkeypatch):
    generator, hooks = torch.Generator().manual_seed(0), [CountingHook(), CountingHook()]
    for model, hook in zip((pipe.prior, pipe.tokenizer), hooks, strict=True):
        monkeypatch.setattr(model, "_hf_hook", hook, raising=False)
    before = generator.get_state()
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 0, "generator": generator} | options)
    assert torch.equal(generator.get_state(), before) and [hook.num_calls for hook in hooks] == [0, 0]


@pytest.mark.parametrize(("method", "options", "message"), WRONG_EDITS)
def test_wrong_edits_are_refused_by_name_and_leave_everything_alone(method, options, message, pipe, unchanged):
    with pytest.raises(ValueError, match=message):
        getattr(pipe, method)(**GOOD_EDITS[method] | options)


def test_a_failure_while_sampling_offloads_the_models_again(build_pipeline, monkeypatch):
    pipe, freed = build_pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

    def fail(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(0, callback_on_step_end=fail)
    assert freed == [True]
    with pytest.raises(ValueError, match="top_p is 2"):
        pipe.inpaint(IMAGE, MASK, 0, top_p=2)
    assert freed == [True, True]


def test_smooth_sampling_needs_scales(build_pipeline):
    with pytest.raises(ValueError, match="is_smooth is True; expected False for a tile layout"):
        build_pipeline("rows")(0, is_smooth=True)


@pytest.mark.parametrize("layout", ["scales", "rows"])
def test_64_images_are_the_same_in_every_batch(layout, build_pipeline, seeds):
    pipe, labels = build_pipeline(layout), [n % 3 for n in range(64)]
    options = {"guidance_scale": 1.5, "guidance_schedule": "linear", "top_k": 10, "output_type": "latent"}

    def idx(size: int) -> torch.Tensor:
        """Draw all in calls of `size` requests."""
        calls = [
            pipe(labels[start : start + size], generator=seeds(size, first=start), **options).images
            for start in range(0, 64, size)
        ]
        return torch.cat([torch.cat(blocks, dim=1) for blocks in calls])

    together = idx(64)
    assert torch.equal(idx(1), together) and torch.equal(idx(8), together)
    assert len(together.unique(dim=0)) > 32


def test_a_request_is_decoded_in_parts(pipe, seeds):
    options = {"class_labels": [0, 1, 2], "num_images_per_label": 3, "output_type": "pt"}
    whole, sizes = pipe(generator=seeds(9), **options).images, []
    hook = pipe.tokenizer.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for decode_batch_size, expected in ((1, [1] * 9), (4, [4, 4, 1]), (5, [5, 4]), (None, [9])):
        sizes.clear()
        parts = pipe(generator=seeds(9), decode_batch_size=decode_batch_size, **options).images
        assert sizes == expected
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    hook.remove()


def test_a_model_without_classes_takes_a_number_of_images(build_pipeline, seeds):
    pipe = build_pipeline(num_classes=0)
    images = pipe(num_images_per_label=4, generator=seeds(4), output_type="pt").images
    assert torch.equal(pipe(4, generator=seeds(4), output_type="pt").images, images)
    assert torch.equal(pipe(2, 2, generator=seeds(4), output_type="pt").images, images)
    assert pipe.resolve_labels(np.int64(2)) == [0, 0] and len(pipe().images) == 1
    for wrong in (0, "wren", [1], True):
        with pytest.raises(ValueError, match="expected None for an unconditional model, or a positive number"):
            pipe(wrong)


def test_labels_may_be_numpys(pipe):
    assert pipe.resolve_labels(np.array([2, 0])) == [2, 0]
    assert pipe.resolve_labels(np.int64(1)) == [1] and pipe.resolve_labels([np.int32(1), "wren"]) == [1, 2]


def test_guidance_and_truncation_reach_the_tokens(pipe, seeds):
    def idx(**options) -> torch.Tensor:
        images = pipe([0, 1, 2], 4, generator=seeds(12), output_type="latent", **options).images
        return torch.cat(images, dim=1)

    constant, linear = idx(guidance_scale=6.0), idx(guidance_scale=6.0, guidance_schedule="linear")
    cosine = idx(guidance_scale=6.0, guidance_schedule="power-cosine")
    late = idx(guidance_scale=6.0, guidance_schedule="power-cosine", guidance_power=1e3)
    assert len({tuple(each.flatten().tolist()) for each in (constant, linear, late)}) == 3
    # Three blocks: at the middle one, the plain cosine is at a half too.
    assert torch.equal(cosine, linear)
    assert torch.equal(idx(min_p=1.0), idx(top_k=1)) and not torch.equal(idx(min_p=0.3), idx())


def test_a_diffusers_users_script(build_pipeline, tmp_path):
    build_pipeline().save_pretrained(tmp_path)

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe = pipe.to("cpu")
    pipe.set_progress_bar_config(disable=True)
    scales = []

    def stop_guidance(pipe, step_index, timestep, callback_kwargs):
        scales.append(pipe.guidance_scale)
        if step_index == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = 1.0
        return callback_kwargs

    generator = [torch.Generator("cpu").manual_seed(seed) for seed in range(4)]
    (images,) = pipe(
        ["wren", "blue tit"],
        num_images_per_label=2,
        guidance_scale=3.0,
        generator=generator,
        output_type="np",
        return_dict=False,
        callback_on_step_end=stop_guidance,
        callback_on_step_end_tensor_inputs=["logits"],
    )
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1 and scales == [3.0, 3.0, 1.0]
    alone = pipe("blue tit", guidance_scale=3.0, generator=generator[3].manual_seed(3), output_type="pil").images[0]
    assert isinstance(alone, Image.Image) and alone.size == (16, 16)
