"""Take over a published prior, or write one of ours in the published format.

    nextblock convert prior --checkpoint var_d16.pth --output_dir out/var-d16 \\
        --scales 1,2,3,4,5,6,8,10,13,16 --to_pipeline --tokenizer out/var-tokenizer
    nextblock convert prior --format var --export --checkpoint out/prior --output_dir out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nextblock.files.claim import claimed
from nextblock.files.fingerprints import model_fingerprint
from nextblock.files.regular import read_text
from nextblock.pipelines import ClassToImagePipeline, TextToImagePipeline
from nextblock.prior import BlockPrior, GPTPrior, LlamaPrior, RARPrior, SamplingOptions
from nextblock.prior.class_names import imagenet_class_names
from nextblock.prior.llamagen_checkpoint import (
    count_llamagen_classes,
    is_llamagen_prior,
    is_llamagen_text_prior,
    llamagen_arguments,
    llamagen_sampling,
    prior_from_llamagen,
    prior_to_llamagen,
)
from nextblock.prior.rar_checkpoint import (
    count_rar_classes,
    is_rar_prior,
    prior_from_rar,
    prior_to_rar,
    rar_arguments,
    rar_sampling,
)
from nextblock.prior.taming_checkpoint import (
    is_taming_prior,
    prior_from_taming,
    prior_to_taming,
    taming_arguments,
    taming_sampling,
)
from nextblock.prior.var_checkpoint import (
    count_var_classes,
    is_var_prior,
    prior_from_var,
    prior_to_var,
    var_arguments,
    var_sampling,
)
from nextblock.tokenizer import VQVAE

from .conversion import ConversionConfig, Format, export, parse_conversion, read_checkpoint, take_over
from .inputs import load_given
from .mistakes import reading


@dataclass(frozen=True, kw_only=True)
class PriorFormat(Format):
    """How another project writes a prior; its adapter takes `class_names` beside the options.

    Args:
        model_class: that the adapter makes, and that `--export` loads.
        num_classes: tells it of the tensors and the command's options, before there is a model.
        sampling: the published sampling of a configuration, written into a pipeline.
        pipeline_class: that takes the prior; one of texts has no encoder then, and takes text features.
    """

    model_class: type
    num_classes: Callable[[dict[str, Tensor], ConvertPriorConfig], int]
    sampling: Callable[[Any], SamplingOptions]
    pipeline_class: type[ClassToImagePipeline | TextToImagePipeline] = ClassToImagePipeline


_LLAMAGEN: dict[str, Any] = {
    "take_over": prior_from_llamagen,
    "options": {"num_heads": "num_heads", "grid": "grid"},
    "write": prior_to_llamagen,
    "container": "model",
    "file_name": lambda model: f"llamagen_{model.config.num_layers}x{model.config.hidden_size}.pt",
    "arguments": lambda model, state: llamagen_arguments(model.config),
    "model_class": LlamaPrior,
    "sampling": llamagen_sampling,
}
FORMATS = {
    "var": PriorFormat(
        title="a VAR transformer",
        fits=is_var_prior,
        take_over=prior_from_var,
        options={"scales": "scales", "num_heads": "num_heads", "attention_scale": "attention_scale"},
        required={"scales": "sizes such as 1,2,3,4,5,6,8,10,13,16"},
        write=prior_to_var,
        file_name=lambda model: f"var_d{model.config.num_layers}.pth",
        arguments=lambda model, state: var_arguments(model.config),
        model_class=BlockPrior,
        num_classes=lambda state, config: count_var_classes(state),
        sampling=var_sampling,
    ),
    "llamagen": PriorFormat(
        title="a LlamaGen transformer of classes",
        fits=is_llamagen_prior,
        num_classes=lambda state, config: count_llamagen_classes(state),
        **_LLAMAGEN,
    ),
    "llamagen-t2i": PriorFormat(
        title="a LlamaGen transformer of texts",
        fits=is_llamagen_text_prior,
        num_classes=lambda state, config: 0,
        pipeline_class=TextToImagePipeline,
        **_LLAMAGEN,
    ),
    "taming": PriorFormat(
        title="a transformer of taming-transformers",
        fits=is_taming_prior,
        take_over=prior_from_taming,
        options={name: name for name in ("num_heads", "grid", "num_classes", "start_token")},
        required={"num_classes": "the number of classes, 1000 for ImageNet's, or 0 for an unconditional model"},
        write=prior_to_taming,
        container="state_dict",
        file_name=lambda model: f"taming_{model.config.num_layers}x{model.config.hidden_size}.ckpt",
        arguments=lambda model, state: taming_arguments(model.config),
        model_class=GPTPrior,
        num_classes=lambda state, config: config.num_classes,
        sampling=taming_sampling,
    ),
    "rar": PriorFormat(
        title="a RAR transformer",
        fits=is_rar_prior,
        take_over=prior_from_rar,
        options={"num_heads": "num_heads", "grid": "grid"},
        write=prior_to_rar,
        file_name=lambda model: "rar.bin",
        arguments=lambda model, state: rar_arguments(model.config),
        model_class=RARPrior,
        num_classes=lambda state, config: count_rar_classes(state),
        sampling=rar_sampling,
    ),
}


@dataclass(kw_only=True)
class ConvertPriorConfig(ConversionConfig):
    """Turns a published prior into a prior or a pipeline, or with `--export` a prior into the published format.

    Sizes come from the checkpoint's shapes; what shapes leave open has the published value as its default.
    """

    formats: ClassVar = FORMATS
    shared_options: ClassVar = frozenset({"class_names", "to_pipeline", "tokenizer"})

    format: Literal["auto", "var", "llamagen", "llamagen-t2i", "taming", "rar"] = "auto"
    """Whose names and arithmetic the checkpoint follows; "auto" goes by the names of its tensors."""
    num_heads: int | None = None
    """Attention heads; null: those of the published sizes, in var as many as there are learned attention temperatures,
    in rar as the norm of the queries tells, else the width over 64."""
    grid: int | list[int] | None = None
    """llamagen, llamagen-t2i, taming, rar: rows and columns of tokens, or one number for both; null: those of the
    tokenizer given, else for taming and rar a square of as many tokens as there are positions for."""
    num_classes: int | None = None
    """taming: number of classes, 0 for an unconditional model."""
    start_token: int | None = None
    """taming: code that stands first in an unconditional model; null: 0."""
    attention_scale: float | None = None
    """var: factor on 1/sqrt(head width) in the softmax, without normalised attention; null: 0.25."""
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
            export(config, FORMATS[config.format].model_class)
        else:
            _convert(config)


def _convert(config: ConvertPriorConfig) -> None:
    """Write a prior or a pipeline."""
    name, state = read_checkpoint(config)
    chosen = FORMATS[name]
    with reading("checkpoint", config.checkpoint, f"{chosen.title} that the other options fit"):
        num_classes = chosen.num_classes(state, config)
    class_names = _read_class_names(config.class_names, num_classes)
    tokenizer = None
    if config.to_pipeline:
        tokenizer = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32)
        if "grid" in chosen.options and config.grid is None:
            config = replace(config, grid=list(tokenizer.layout.grid))
    prior = take_over(config, name, state, class_names=class_names)
    kind = "prior"
    if tokenizer is not None:
        # The published pair; a checkpoint itself does not say which tokenizer is its own.
        prior.config.tokenizer_fingerprint = model_fingerprint(tokenizer)
        chosen.pipeline_class(
            tokenizer=tokenizer, prior=prior, sampling=chosen.sampling(prior.config)
        ).save_pretrained(config.output_dir)
        kind = "pipeline with a prior"
    else:
        prior.save_pretrained(config.output_dir)
    made = prior.config
    print(
        f"{config.output_dir}: {kind} (format {name}) of {made.num_layers} layers, width {made.hidden_size}, "
        f"{made.num_heads} heads, {made.num_classes} classes, {prior.num_parameters() / 1e6:.1f} M parameters"
    )
