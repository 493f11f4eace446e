"""Make a model folder of a checkpoint, or a pipeline of a prior's checkpoint and its tokenizer.

nextblock export --checkpoint RUN/checkpoints/step_00001000 --output_dir DIR
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_model
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from nextblock.files.claim import claimed, is_occupied
from nextblock.files.state_dicts import check_state_dict
from nextblock.files.stored_model import check_memory
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.tokenizer import VQVAE
from nextblock.training.average import saved_average
from nextblock.training.checkpoint import MODEL_CONFIG_NAME, damage
from nextblock.training.saved_state import naming

from .command_line import parse_run_config
from .inputs import load_given, load_given_encoder
from .mistakes import reading

_EXPECTED = "the folder of a checkpoint, RUN/checkpoints/step_00001000 say"


@dataclass(kw_only=True)
class ExportConfig:
    """Make a model folder of a training's checkpoint: of the weight average where there is one, else of the weights."""

    checkpoint: str
    """Folder of the checkpoint, RUN/checkpoints/step_00001000 say."""
    output_dir: str
    """Folder to write, which must be new or empty."""
    tokenizer: str | None = None
    """With a prior's checkpoint: folder of its tokenizer, to write a pipeline of both; null writes the prior alone."""
    text_encoder: str | None = None
    """With a tokenizer and the checkpoint of a prior of captions: folder or hub repository of its text encoder."""

    def __post_init__(self):
        if self.text_encoder is not None and self.tokenizer is None:
            raise ValueError(f"text_encoder is {self.text_encoder!r}, but tokenizer is null; expected both")


def export(config: ExportConfig) -> None:
    """Write what a checkpoint has learned as a user loads it.

    Args:
        config: what to read and where to write.

    Raises:
        ValueError: if the checkpoint is damaged or of a sharded or older training, the folder holds files or another
            command works in it, or a tokenizer is given that is not the prior's, or not to a prior.
    """
    with claimed(Path(config.output_dir)):
        _export(config)


def _export(config: ExportConfig) -> None:
    """Do the work."""
    output_dir = Path(config.output_dir)
    if is_occupied(output_dir):
        raise ValueError(f"output_dir {output_dir} holds files; expected a new or empty folder")
    with reading("checkpoint", config.checkpoint, _EXPECTED):
        model, has_average = load_trained_model(Path(config.checkpoint))
    if config.tokenizer is None:
        model.save_pretrained(output_dir)
    else:
        if isinstance(model, VQVAE):
            raise ValueError(f"tokenizer is {config.tokenizer!r}; expected null with a tokenizer's checkpoint")
        tokenizer = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32)
        _pipeline(config, tokenizer, model).save_pretrained(output_dir)
    weights = "weight average" if has_average else "weights"
    print(f"{output_dir}: the {weights} of {config.checkpoint}, {model.num_parameters():,} parameters")


def _pipeline(config: ExportConfig, tokenizer: VQVAE, prior: PreTrainedModel) -> DiffusionPipeline:
    """Put a pipeline of classes or of texts together."""
    is_of_texts = hasattr(prior.conditions, "text_dim")
    if is_of_texts != (config.text_encoder is not None):
        expected = "the text encoder of a prior of captions" if is_of_texts else "null with a prior of no captions"
        raise ValueError(f"text_encoder is {config.text_encoder!r}; expected {expected}")
    if not is_of_texts:
        return ClassToImagePipeline(tokenizer=tokenizer, prior=prior)
    encoder = load_given_encoder("text_encoder", config.text_encoder, prior.conditions.max_positions)
    texts = {"text_encoder": encoder.model, "text_tokenizer": encoder.tokenizer}
    return TextToImagePipeline(tokenizer=tokenizer, prior=prior, **texts)


def load_trained_model(checkpoint: Path) -> tuple[PreTrainedModel, bool]:
    """Build the model of a checkpoint on the CPU.

    Args:
        checkpoint: its folder.

    Returns:
        The model in evaluation mode, and whether it has the weight average.

    Raises:
        ValueError: if the checkpoint is damaged, or was written by a sharded training or before its model's
            configuration was kept.
    """
    problem = damage(checkpoint)
    if problem:
        raise ValueError(f"checkpoint {checkpoint} cannot be used: {problem}; expected {_EXPECTED}")
    weights_path = checkpoint / "model.safetensors"
    for path in (checkpoint / MODEL_CONFIG_NAME, weights_path):
        if not path.is_file():
            raise ValueError(
                f"checkpoint {checkpoint} has no {path.name}; expected one of an unsharded training by this version: "
                "finish the training, which exports its model by itself"
            )
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    check_memory(MODEL_MAPPING[type(config)], config)
    model = AutoModel.from_config(config, trust_remote_code=False)
    average = saved_average(checkpoint)
    if average is None:
        # It knows which tensors the file holds once for two names.
        with naming(weights_path):
            load_model(model, weights_path)
    else:
        check_state_dict(average, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, {})
        model.load_state_dict(average)
    return model.eval(), average is not None


def main(argv: Sequence[str]) -> None:
    """Read the command line and export."""
    export(parse_run_config(ExportConfig, command="export", argv=argv))
