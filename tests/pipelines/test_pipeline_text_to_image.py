"""Prompts to images: a prompt stands alone, negative prompts, features in place of texts, saving, editing, mistakes."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior import SamplingOptions

PROMPTS = ["a red bird", "the small blue cat in", "dog"]
GUIDED = {"guidance_scale": 2.5, "guidance_schedule": "constant"}


@pytest.fixture(scope="module")
def pipe(build_text_pipeline):
    return build_text_pipeline()


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_batch_of_mixed_lengths_equals_single_prompts(pipe):
    together = pipe(PROMPTS, generator=seeds(3), output_type="pt", **GUIDED).images
    for n, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, generator=seeds(3)[n : n + 1], output_type="pt", **GUIDED).images
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-5)
    other = pipe(PROMPTS[::-1], generator=seeds(3), output_type="pt", **GUIDED).images
    assert not torch.allclose(other[0], together[0], atol=1e-2)
    # In parts, and as many of each as are asked for.
    small = pipe(PROMPTS, generator=seeds(3), output_type="pt", batch_size=2, **GUIDED).images
    torch.testing.assert_close(small, together, rtol=0, atol=1e-5)
    several = pipe(PROMPTS[:2], num_images_per_prompt=2, generator=seeds(4), output_type="pt", **GUIDED).images
    torch.testing.assert_close(several[0], together[0], rtol=0, atol=1e-5)
    second = pipe(PROMPTS[1], generator=seeds(4)[2:3], output_type="pt", **GUIDED).images
    torch.testing.assert_close(several[2], second[0], rtol=0, atol=1e-5)


def test_features_stand_in_for_prompts(pipe, build_text_pipeline):
    expected = pipe(PROMPTS, generator=seeds(3), output_type="pt", **GUIDED).images
    embeds, mask = pipe.encode_prompt(PROMPTS)
    given = {"text_embeds": embeds, "text_mask": mask}
    assert torch.equal(pipe(**given, generator=seeds(3), output_type="pt", **GUIDED).images, expected)
    without = build_text_pipeline(has_encoder=False)
    assert torch.equal(without(**given, generator=seeds(3), output_type="pt", **GUIDED).images, expected)
    with pytest.raises(ValueError, match="text_encoder is None, and a prompt is given"):
        without("dog")
    steps = without.progressive(**given, generator=seeds(3), output_type="pt", **GUIDED)
    assert torch.equal(steps[-1], expected)
    image, mask = pipe(PROMPTS[0], generator=seeds(1)).images[0], np.ones((16, 16), np.float32)
    painted = [
        each.inpaint(image, mask, *prompt, generator=seeds(3), output_type="pt", **features).images
        for each, prompt, features in ((pipe, [PROMPTS], {}), (without, [], given))
    ]
    assert torch.equal(*painted)
    assert len(without.outpaint(image, (0, 0, 8, 16), num_images_per_prompt=2, **given).images) == 6


def test_a_negative_prompt_stands_in_for_no_text(pipe):
    def logits(**options):
        seen = []

        def look(pipe, step, timestep, tensors):
            seen.append(tensors["logits"])
            return {}

        options |= {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["logits"]}
        pipe(generator=seeds(3), output_type="latent", **options)
        return seen[0]

    scale = GUIDED["guidance_scale"]
    positive, negative = logits(prompt=PROMPTS, guidance_scale=1.0), logits(prompt=["dog"] * 3, guidance_scale=1.0)
    guided = logits(prompt=PROMPTS, negative_prompt="dog", **GUIDED)
    torch.testing.assert_close(guided, negative + scale * (positive - negative), rtol=1e-4, atol=1e-4)
    assert torch.equal(guided, logits(prompt=PROMPTS, negative_prompt=["dog"] * 3, **GUIDED))
    embeds, mask = pipe.encode_prompt("dog")
    features = {"negative_text_embeds": embeds, "negative_text_mask": mask}
    torch.testing.assert_close(logits(prompt=PROMPTS, **features, **GUIDED), guided, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, logits(prompt=PROMPTS, **GUIDED), atol=1e-3)


def test_a_saved_pipeline_comes_back_with_its_encoder(pipe, build_text_pipeline, tmp_path):
    expected = pipe(PROMPTS, generator=seeds(3), output_type="pt", **GUIDED).images
    pipe.save_pretrained(tmp_path / "pipe", sample_images=[Image.new("RGB", (16, 16))])
    for loader, options in (
        (TextToImagePipeline, {}),
        (DiffusionPipeline, {}),
        (DiffusionPipeline, {"custom_pipeline": str(tmp_path / "pipe"), "trust_remote_code": True}),
    ):
        loaded = loader.from_pretrained(tmp_path / "pipe", **options)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded).__name__ == "TextToImagePipeline"
        assert torch.equal(loaded(PROMPTS, generator=seeds(3), output_type="pt", **GUIDED).images, expected)
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "pipe('a prompt', num_images_per_prompt=4)" in card
    assert "| text | BertModel, features of 8 channels, 7 tokens at most |" in card
    build_text_pipeline(has_encoder=False).save_pretrained(tmp_path / "without")
    assert TextToImagePipeline.from_pretrained(tmp_path / "without").text_encoder is None
    assert "pipe(text_embeds=text_embeds, text_mask=text_mask" in (tmp_path / "without" / "README.md").read_text()
    with pytest.raises(ValueError, match="expected classes"):
        ClassToImagePipeline.from_pretrained(tmp_path / "without")


def test_what_is_too_long_is_cut_off_with_a_warning_that_quotes_it(pipe, caplog):
    prompt = "a red bird in the green and blue cat"
    with caplog.at_level(logging.WARNING):
        images = pipe(prompt, generator=seeds(1), output_type="pt").images
    assert "this is cut off: 'green and blue cat'" in caplog.text and "more than 7 tokens" in caplog.text
    assert torch.equal(images, pipe("a red bird in the", generator=seeds(1), output_type="pt").images)


def test_pictures_are_painted_by_prompts_and_shown_block_by_block(pipe):
    image = pipe(PROMPTS[0], generator=seeds(1)).images[0]
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    drawn = pipe.inpaint(image, mask, PROMPTS[:2], num_images_per_prompt=2, generator=seeds(4), output_type="latent")
    given = pipe.tokenizer.img_to_idxBl(torch.from_numpy(pixels([image])).movedim(3, 1) / 127.5 - 1)
    is_outside = ~(torch.arange(4) >= 2).expand(4, 4).flatten()
    assert torch.equal(drawn.images[2][:, is_outside], given[2][:, is_outside].expand(4, -1))
    assert len(pipe.outpaint(image, (0, 0, 8, 16), PROMPTS, generator=seeds(3)).images) == 3
    with pytest.raises(ValueError, match="image holds 2 images; expected 1 or 3, one a prompt"):
        pipe.inpaint([image] * 2, mask, PROMPTS)
    steps = pipe.progressive(PROMPTS, negative_prompt="the", generator=seeds(3), output_type="pt", **GUIDED)
    last = pipe(PROMPTS, negative_prompt="the", generator=seeds(3), output_type="pt", **GUIDED).images
    assert len(steps) == 3 and torch.equal(steps[-1], last)
    assert len(pipe.reconstruct([image, image]).images) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "prompt and text features: neither given"),
        ({"prompt": []}, r"prompt is \[\]; expected a text, or a list of at least one"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": ["a", 3]}, r"prompt is \['a', 3\]"),
        ({"prompt": "a", "text_embeds": torch.zeros(1, 2, 8)}, "both given; expected one of them"),
        ({"prompt": "a", "negative_prompt": "the"}, "negative_prompt is given; expected None without guidance"),
        ({"prompt": ["a"] * 3, "negative_prompt": ["a"] * 2, **GUIDED}, "negative_prompt holds 2 texts; expected 1 or"),
        ({"prompt": "a", "negative_prompt": [], **GUIDED}, r"negative_prompt is \[\]"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "text_mask": torch.ones(1, 2)}, "text_mask is given; expected None without text_embeds"),
        ({"prompt": "a", "negative_text_mask": torch.ones(1, 2)}, "None without negative_text_embeds"),
        ({"text_embeds": torch.zeros(1, 2, 9)}, r"text_embeds is torch.float32 \(1, 2, 9\)"),
        ({"text_embeds": torch.zeros(1, 8, 8)}, "valid positions; expected 1 to 7"),
        ({"prompt": "a", "generator": seeds(2)}, "generator"),
        ({"prompt": "a", "top_p": 2.0}, "top_p"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type"),
    ],
)
def test_wrong_calls_are_refused_by_name(call, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_components_that_do_not_fit_are_refused_by_name(pipe, build_text_pipeline, text_encoder):
    parts = {"tokenizer": pipe.tokenizer, "prior": pipe.prior}
    with pytest.raises(ValueError, match="text_tokenizer is None; expected text_encoder and text_tokenizer"):
        TextToImagePipeline(**parts, text_encoder=text_encoder.model)
    with pytest.raises(ValueError, match="text_encoder is a BertTokenizer"):
        TextToImagePipeline(**parts, text_encoder=text_encoder.tokenizer, text_tokenizer=text_encoder.model)
    with pytest.raises(ValueError, match="text_encoder is a BertModel of width 8; expected 12"):
        build_text_pipeline(text_dim=12)
    with pytest.raises(ValueError, match="expected classes"):
        ClassToImagePipeline(**parts)
    with pytest.raises(ValueError, match="guidance"):
        TextToImagePipeline(**parts, sampling=SamplingOptions(guidance_scale=-1.0))


def test_a_stored_encoder_without_all_of_its_weights_or_with_code_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights, config = (tmp_path / "text_encoder" / name for name in ("model.safetensors", "config.json"))
    tensors, fields = load_file(weights), json.loads(config.read_text())
    tensors.pop("embeddings.LayerNorm.bias")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder' lack 1 tensors of a BertModel: .*LayerNorm.bias'.; expected"):
        TextToImagePipeline.from_pretrained(tmp_path)
    config.write_text(json.dumps(fields | {"_attn_implementation": "evil/kernel"}))
    with pytest.raises(ValueError, match="_attn_implementation is 'evil/kernel'; expected none of a repository"):
        TextToImagePipeline.from_pretrained(tmp_path)
