"""Take over a published prior, or write one of ours in the published format.

    nextblock convert prior --format var --checkpoint var_d16.pth --output_dir out/var-d16 \\
        --scales 1,2,3,4,5,6,8,10,13,16 --to_pipeline --tokenizer out/var-tokenizer
    nextblock convert prior --format var --export --checkpoint out/prior --output_dir out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nextblock.files.claim import claimed
from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.regular import read_text
from nextblock.files.state_dicts import infer_size, read_state_dict, write_state_dict
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior
from nextblock.prior.class_names import imagenet_class_names
from nextblock.prior.var_checkpoint import (
    VAR_ATTENTION_SCALE,
    prior_from_var,
    prior_to_var,
    var_arguments,
    var_sampling,
)
from nextblock.tokenizer import VQVAE

from .conversion import ConversionConfig, parse_conversion
from .inputs import load_given
from .mistakes import reading


@dataclass(kw_only=True)
class ConvertPriorConfig(ConversionConfig):
    """Turns a VAR transformer into a prior or a pipeline, or with `--export` a prior into a VAR transformer.

    Sizes come from the checkpoint's shapes; what shapes leave open has the published value as its default.
    """

    num_heads: int | None = None
    """Attention heads; null: as many as there are learned attention temperatures, else the width over 64."""
    attention_scale: float = VAR_ATTENTION_SCALE
    """Factor on 1/sqrt(head width) in the softmax, without normalised attention."""
    class_names: str | None = None
    """File with a class name a line, "imagenet" or "none"; null: ImageNet's for 1000 classes, else none."""
    to_pipeline: bool = False
    """Write a pipeline of the tokenizer and the prior."""
    tokenizer: str | None = None
    """With `--to_pipeline`: folder of the tokenizer whose tokens the prior has learned, which it then knows."""

    def __post_init__(self):
        super().__post_init__()
        if self.to_pipeline != (self.tokenizer is not None):
            raise ValueError(
                f"to_pipeline is {self.to_pipeline}, tokenizer {self.tokenizer!r}; expected both or neither"
            )


def _read_class_names(source: str | None, num_classes: int) -> list[str] | None:
    """Return the names that the class_names option asks for."""
    if source == "imagenet" or (source is None and num_classes == 1000):
        return imagenet_class_names()
    if source in (None, "none"):
        return None
    if not Path(source).is_file():
        raise ValueError(f"class_names is {source!r}; expected a file with names, 'imagenet' or 'none'")
    with reading("class_names", source, "a file with a class name a line"):
        return read_text(source).splitlines()


def _export(config: ConvertPriorConfig) -> None:
    """Write a VAR transformer."""
    model = load_given("checkpoint", config.checkpoint, BlockPrior, dtype=torch.float32)
    state = prior_to_var(model)
    path = Path(config.output_dir) / f"var_d{model.config.num_layers}.pth"
    write_state_dict(state, path)
    print(f"{path}: {len(state)} tensors for VAR with {var_arguments(model.config)}")


def main(argv: Sequence[str]) -> None:
    """Convert the prior that the command line names."""
    config = parse_conversion(
        ConvertPriorConfig,
        command="convert prior",
        argv=argv,
        flags=("export", "to_pipeline"),
    )
    with claimed(Path(config.output_dir)):
        if config.export:
            _export(config)
        else:
            _convert(config)


def _convert(config: ConvertPriorConfig) -> None:
    """Write a prior or a pipeline."""
    with reading("checkpoint", config.checkpoint, "a VAR transformer that the other options fit"):
        state = read_state_dict(config.checkpoint)
        num_classes = infer_size(state, ("class_emb.weight", 0), default=1) - 1
    class_names = _read_class_names(config.class_names, num_classes)
    with reading("checkpoint", config.checkpoint, "a VAR transformer that the other options fit"):
        prior = prior_from_var(
            state,
            scales=config.scales,
            num_heads=config.num_heads,
            attention_scale=config.attention_scale,
            class_names=class_names,
        )
    kind = "prior"
    if config.to_pipeline:
        tokenizer = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32)
        # The published pair; a checkpoint itself does not say which tokenizer is its own.
        prior.config.tokenizer_fingerprint = model_fingerprint(tokenizer)
        pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling=var_sampling(prior.config))
        pipe.save_pretrained(config.output_dir)
        kind = "pipeline with a prior"
    else:
        prior.save_pretrained(config.output_dir)
    print(
        f"{config.output_dir}: {kind} of {prior.config.num_layers} layers, width {prior.config.hidden_size}, "
        f"{prior.config.num_heads} heads, {prior.config.num_classes} classes, "
        f"{prior.num_parameters() / 1e6:.1f} M parameters"
    )
