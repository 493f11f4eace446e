"""Train a prior on tokens or images: `accelerate launch -m nextblock train-prior --config prior/digits-scales …`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel

from nextblock.data.tokens import MANIFEST_NAME
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior.building import build_prior, with_initial_prior
from nextblock.prior.sampling import SamplingOptions
from nextblock.prior.task import PriorTask, PriorTrainConfig
from nextblock.prior.text_encoder import TextEncoder
from nextblock.prior.text_training import text_length
from nextblock.prior.training_data import image_data, token_data
from nextblock.tokenizer import VQVAE
from nextblock.training.loop import fit
from nextblock.training.opened_run import opened_run
from nextblock.training.usable_images import check_run_files, open_training_images

from .command_line import parse_run_config
from .inputs import TOKENS_EXPECTED, load_given, load_given_encoder
from .mistakes import reading


def export_pipeline(
    folder: str,
    license: str | None,
    encoder: TextEncoder | None,
    prior: PreTrainedModel,
    tokenizer: PreTrainedModel,
    sampling: SamplingOptions,
    recipe: dict,
    metrics: dict[str, float],
    images: list[Image.Image],
) -> None:
    """Save prior and tokenizer together as a pipeline, whose card says how it was trained and what it reached.

    Args:
        folder: the pipeline's.
        license: of the weights; None states none.
        encoder: of captions; None for a prior that is not conditioned on text.
        prior: the trained prior.
        tokenizer: whose tokens it predicts.
        sampling: how the pipeline draws tokens where a call does not say.
        recipe: name → value.
        metrics: name → number.
        images: samples.
    """
    if encoder is None:
        pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=sampling)
    else:
        texts = {"text_encoder": encoder.model, "text_tokenizer": encoder.tokenizer}
        pipe = TextToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=sampling, **texts)
    pipe.save_pretrained(folder, recipe=recipe, metrics=metrics, sample_images=images, license=license)


def train(config: PriorTrainConfig) -> None:
    """Train a prior and save a pipeline in `config.pipeline_dir`.

    Args:
        config: the run.

    Raises:
        ValueError: if the configuration or the data do not fit, another tokenizer made the tokens, or another command
            works in one of the folders.
    """
    if config.data is not None:
        config.data.check_given()
    output_dir, encoder = Path(config.output_dir), None
    if config.text.encoder is not None:
        with reading("tokens", config.tokens, TOKENS_EXPECTED):
            length = text_length(config.text, config.tokens)
        encoder = load_given_encoder("text.encoder", config.text.encoder, length)
    tokenizer = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32).eval().requires_grad_(False)
    with reading("loop.init_from", config.loop.init_from, "the folder of a saved prior, or of a pipeline"):
        config = with_initial_prior(config, tokenizer, encoder)
    with opened_run(config.loop, output_dir, Path(config.pipeline_dir)) as accelerator:
        if config.tokens is not None:
            with reading("tokens", config.tokens, TOKENS_EXPECTED):
                if accelerator.is_main_process:
                    files = Path(config.tokens), [MANIFEST_NAME]  # It has the checksums of all others.
                    check_run_files(output_dir, "tokens", *files, "content", config.loop.accepts_changed_options)
                data = token_data(config.tokens, tokenizer, config.samples_views, config.loop.seed, encoder)
        else:
            options = {"output_dir": output_dir, "num_workers": config.loop.num_workers}
            options["accepts_changes"] = config.loop.accepts_changed_options
            open_images = partial(open_training_images, accelerator, config.data, **options)
            size = tuple(tokenizer.config.image_size)
            data = image_data(config.data, config.transform, config.loop.seed, size, open_images, encoder)
        model = build_prior(config, tokenizer, data.class_names, encoder)
        export = partial(export_pipeline, config.pipeline_dir, config.license, encoder)
        task = PriorTask(accelerator, config, model, tokenizer, data, export, encoder)
        fit(accelerator, task, data.train, data.collate, config, output_dir)


def main(argv: Sequence[str]) -> None:
    """Read the command line and train."""
    train(parse_run_config(PriorTrainConfig, command="train-prior", argv=argv))
