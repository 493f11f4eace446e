"""Mass sampling of prompts: images are those of single prompts, files say which prompt is which, mistakes are named."""

import numpy as np
import pytest
import torch

from nextblock.evaluation.sample_sets import is_of_prompts, open_samples
from nextblock.files.regular import read_json
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.prior.text_encoder import load_text_encoder
from nextblock.sample import SampleConfig, image_seed, sample
from nextblock.tokenizer import VQVAE

PROMPTS = ["a red bird", "the small blue cat in the green", "dog"]


@pytest.fixture(scope="module")
def pipeline_dir(tokenizer_dir, text_encoder_dir, tmp_path_factory):
    torch.manual_seed(0)
    tokenizer, encoder = VQVAE.from_pretrained(tokenizer_dir), load_text_encoder(text_encoder_dir, 9)
    sizes = {"vocab_size": 24, "embedding_dim": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    texts = {"text_dim": 8, "max_text_positions": 9, "adaln_gamma_init": 1.0}
    prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes, **texts))
    with torch.no_grad():
        prior.head.weight.normal_()
    folder = tmp_path_factory.mktemp("pipeline")
    given = {"text_encoder": encoder.model, "text_tokenizer": encoder.tokenizer}
    TextToImagePipeline(tokenizer=tokenizer, prior=prior, **given).save_pretrained(folder)
    return folder


@pytest.fixture
def draw(run_here, pipeline_dir, tmp_path):
    """Draw two images of each prompt."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")

    def run(name: str, *options):
        where = ["--pipeline", pipeline_dir, "--output_dir", tmp_path / name, "--cpu", "true", "--batch_size", 4]
        count = ["--num_images_per_label", 2, "--prompts", tmp_path / "prompts.txt"]
        run_here(sample, SampleConfig, *where, *count, *options)
        return tmp_path / name

    return run


def test_images_are_those_of_single_prompts(draw, pipeline_dir):
    folder = draw("npz", "--sampling.guidance_scale", 2.0, "--negative_prompt", "the")
    assert (folder / "prompts.txt").read_text().splitlines() == PROMPTS
    with np.load(folder / "images.npz") as arrays:
        images, labels, index = (arrays[name] for name in ("arr_0", "arr_1", "index"))
    assert sorted(index) == list(range(6)) and labels.tolist() == (index // 2).tolist()
    pipe = TextToImagePipeline.from_pretrained(pipeline_dir)
    options = {"guidance_scale": 2.0, "negative_prompt": "the"}
    for image, label, number in zip(images, labels, index.tolist(), strict=True):
        generator = [torch.Generator().manual_seed(image_seed(0, number))]
        alone = np.asarray(pipe(PROMPTS[label], generator=generator, **options).images[0])
        assert np.abs(alone.astype(int) - image).max() <= 1
    job = read_json(folder / "job.json")
    assert job["negative_prompt"] == "the" and len(job["prompts_sha256"]) == 64 and "class_labels" not in job
    assert job["num_prompts"] == 3 and job["text_encoder_sha256"] == pipe.text_fingerprint()


def test_pictures_lie_in_a_folder_a_prompt(draw, tmp_path):
    folder = draw("pictures", "--output_format", "png")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob("images/*/*.png"))
    assert found == [f"images/{number // 2}/{number}.png" for number in range(6)]
    # An evaluation takes them as the job's, in its order, and their prompts for no classes.
    samples = open_samples(folder)
    assert len(samples) == 6 and sorted(samples.index) == list(range(6)) and is_of_prompts(samples.job)
    (tmp_path / "prompts.txt").write_text("another\n" * 3)
    with pytest.raises(ValueError, match="holds another job, whose prompts_sha256"):
        draw("pictures", "--output_format", "png")


def test_what_does_not_fit_is_refused_by_name(draw, run_here, ten_class_pipeline_dir, pipeline_dir, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for options, message in (
        (["--prompts", tmp_path / "empty.txt"], "prompts is .*: it holds no prompt"),
        (["--prompts", tmp_path / "missing.txt"], "prompts is .*missing.txt"),
        (["--prompts", "null"], "prompts is null; expected prompts alone"),
        (["--class_labels", "[0]"], r"class_labels is \[0\]; expected prompts alone"),
        (["--negative_prompt", "the"], "negative_prompt is given; expected None without guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            draw("wrong", *options)
    assert not (tmp_path / "wrong").exists()
    where = ["--pipeline", ten_class_pipeline_dir, "--output_dir", tmp_path / "classes", "--cpu", "true"]
    with pytest.raises(ValueError, match="prompts is .*; expected null for a pipeline of classes"):
        run_here(sample, SampleConfig, *where, "--prompts", tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="expected classes"):
        ClassToImagePipeline.from_pretrained(pipeline_dir)
