"""Sampling that a model was made for travels with it: into folders, out of them, and into every call."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from nextblock.pipelines import ClassToImagePipeline
from nextblock.pipelines import demo_handlers as handlers
from nextblock.prior import SamplingOptions

STORED = SamplingOptions(guidance_scale=2.0, guidance_schedule="linear", temperature=0.8, top_k=5, top_p=0.9)


def drawn(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    asked = {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    return torch.cat(pipe([0, 1, 2], 4, **asked, **options).images, dim=1)


@pytest.fixture
def pipe(build_pipeline):
    return build_pipeline()


@pytest.fixture
def stored(pipe):
    return ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, sampling=STORED)


@pytest.mark.parametrize("pipeline_class", [ClassToImagePipeline, DiffusionPipeline])
def test_calls_take_what_was_saved_and_what_is_given_wins(pipeline_class, pipe, stored, tmp_path):
    stored.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert loaded.sampling == STORED
    assert torch.equal(drawn(loaded), drawn(pipe, **asdict(STORED)))
    given = asdict(STORED) | {"guidance_scale": 1.0, "top_k": 0}
    assert torch.equal(drawn(loaded, guidance_scale=1.0, top_k=0), drawn(pipe, **given))
    assert not torch.equal(drawn(loaded), drawn(pipe))
    frames = loaded.progressive([1], 2, generator=torch.Generator().manual_seed(0), output_type="np")
    images = pipe([1], 2, generator=torch.Generator().manual_seed(0), output_type="np", **asdict(STORED)).images
    np.testing.assert_array_equal(frames[-1], images)


def test_saving_again_keeps_it(stored, tmp_path):
    stored.save_pretrained(tmp_path / "first")
    ClassToImagePipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert ClassToImagePipeline.from_pretrained(tmp_path / "second").sampling == STORED
    replaced = ClassToImagePipeline.from_pretrained(tmp_path / "second", sampling=SamplingOptions(top_k=3))
    assert replaced.sampling == SamplingOptions(top_k=3)


def test_folders_without_it_have_the_defaults(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    del index["sampling"]
    path.write_text(json.dumps(index))
    assert ClassToImagePipeline.from_pretrained(tmp_path).sampling == SamplingOptions()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"guidance": 2.0}, r"sampling holds \['guidance'\]; expected some of \['guidance_scale'"),
        ({"top_k": 13}, "top_k is 13; expected an integer from 0"),
        ({"top_p": 0}, "top_p is 0; expected a number in"),
        ([1.5], r"sampling is \[1.5\]; expected SamplingOptions"),
    ],
)
def test_what_cannot_be_sampled_so_is_refused(pipe, sampling, message):
    with pytest.raises(ValueError, match=message):
        ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, sampling=sampling)


def test_a_model_without_classes_needs_no_word_about_guidance(build_pipeline):
    pipe = build_pipeline(num_classes=0)
    assert len(pipe(3).images) == 3
    with pytest.raises(ValueError, match="guidance_scale is 2.0; expected 1 for a model without classes"):
        ClassToImagePipeline(tokenizer=pipe.tokenizer, prior=pipe.prior, sampling=STORED)


def test_classes_are_told_by_name_and_by_label(pipe, build_pipeline):
    assert pipe.class_names == ["blue tit", "great tit", "wren"]
    assert pipe.id2label == {0: "blue tit", 1: "great tit", 2: "wren"}
    pipe.prior.config.class_names = None
    assert pipe.class_names is None and pipe.id2label == {0: "0", 1: "1", 2: "2"}
    assert build_pipeline(num_classes=0).id2label == {}


def test_the_demo_writes_down_only_what_differs(stored):
    text = handlers.call_text(stored, [1], 2, 7, asdict(STORED) | {"top_k": 3})
    assert "top_k=3" in text and "guidance" not in text and "top_p" not in text
    names = {"pipe": stored, "torch": torch}
    exec(text, names)
    expected, _ = handlers.sample(stored, [1], 2, 7, {"top_k": 3})
    assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image, _ in expected]
