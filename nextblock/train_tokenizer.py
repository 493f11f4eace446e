"""Train a tokenizer: `accelerate launch -m nextblock train-tokenizer --config tokenizer/digits-scales …`."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate.utils import DistributedType

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataset, collate
from nextblock.tokenizer.configuration_vqvae import VQVAEConfig
from nextblock.tokenizer.perceptual import load_perceptual_loss
from nextblock.tokenizer.task import TokenizerTask, TokenizerTrainConfig, build_tokenizer, with_initial_tokenizer
from nextblock.training.loop import fit
from nextblock.training.opened_run import opened_run
from nextblock.training.usable_images import open_training_images

from .command_line import parse_run_config
from .mistakes import reading


def train(config: TokenizerTrainConfig) -> None:
    """Train a tokenizer and save it in `config.output_dir`.

    Args:
        config: the run.

    Raises:
        ValueError: if the configuration or the data does not fit, the perceptual term's weights are out of reach, the
            launch shards models (FSDP), or another command works in the folder.
    """
    config.data.check_given()
    output_dir = Path(config.output_dir)
    with reading("loop.init_from", config.loop.init_from, "the folder of a saved tokenizer, or of a pipeline"):
        config = with_initial_tokenizer(config)
    seed, image_size = config.loop.seed, tuple(VQVAEConfig(**asdict(config.model)).image_size)
    # First of all: its weights may be out of reach here.
    perceptual = load_perceptual_loss(config.perceptual) if config.perceptual.weight > 0 else None
    with opened_run(config.loop, output_dir) as accelerator:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "the processes were launched with distributed_type FSDP; expected MULTI_GPU, as in "
                "configs/accelerate/multi-gpu.yaml: a tokenizer is trained whole on every GPU"
            )
        options = {"output_dir": output_dir, "num_workers": config.loop.num_workers}
        options["accepts_changes"] = config.loop.accepts_changed_options
        open_images = partial(open_training_images, accelerator, config.data, **options)
        train_data = ImageDataset(open_images(config.data.split), image_size, config.transform, seed)
        eval_data = None
        if config.data.eval_split is not None:
            eval_source = open_images(config.data.eval_split)
            eval_data = ImageDataset(eval_source, image_size, TransformConfig(), seed)
        task = TokenizerTask(accelerator, config, build_tokenizer(config), train_data, eval_data, perceptual)
        fit(accelerator, task, train_data, collate, config, output_dir)


def main(argv: Sequence[str]) -> None:
    """Read the command line and train."""
    train(parse_run_config(TokenizerTrainConfig, command="train-tokenizer", argv=argv))
