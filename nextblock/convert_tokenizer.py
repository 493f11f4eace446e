"""Take over a published tokenizer, or write one of ours in the published format.

    nextblock convert tokenizer --checkpoint vae_ch160v4096z32.pth --output_dir out/var-tokenizer \\
        --scales 1,2,3,4,5,6,8,10,13,16
    nextblock convert tokenizer --format var --export --checkpoint out/tokenizer --output_dir out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from nextblock.files.claim import claimed
from nextblock.files.foreign_checkpoints import has_averaged
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.ibq_checkpoint import vqvae_from_ibq, vqvae_to_ibq
from nextblock.tokenizer.llamagen_checkpoint import (
    is_llamagen_tokenizer,
    llamagen_arguments,
    vqvae_from_llamagen,
    vqvae_to_llamagen,
)
from nextblock.tokenizer.magvit2_checkpoint import (
    is_magvit2_tokenizer,
    magvit2_arguments,
    vqvae_from_magvit2,
    vqvae_to_magvit2,
)
from nextblock.tokenizer.maskgit_checkpoint import (
    is_maskgit_tokenizer,
    maskgit_arguments,
    vqvae_from_maskgit,
    vqvae_to_maskgit,
)
from nextblock.tokenizer.taming_checkpoint import (
    is_taming_tokenizer,
    taming_arguments,
    vqvae_from_taming,
    vqvae_to_taming,
)
from nextblock.tokenizer.var_checkpoint import is_var_tokenizer, var_arguments, vqvae_from_var, vqvae_to_var

from .conversion import ConversionConfig, Format, export, parse_conversion, read_checkpoint, take_over

LIGHTNING_OPTIONS = {"image_size": "image_size", "averaged_weights": "takes_averages"}
FORMATS = {
    "var": Format(
        title="a VAR tokenizer",
        fits=is_var_tokenizer,
        take_over=vqvae_from_var,
        options={
            "scales": "scales",
            "image_size": "image_size",
            "normalized_codes": "has_normalized_codes",
            "phi_ratio": "phi_ratio",
            "beta": "beta",
        },
        required={"scales": "sizes such as 1,2,3,4,5,6,8,10,13,16"},
        write=vqvae_to_var,
        export_options={"phi_names": "phi_names"},
        file_name=lambda model: "vae.pth",
        arguments=var_arguments,
    ),
    "llamagen": Format(
        title="a LlamaGen tokenizer",
        fits=is_llamagen_tokenizer,
        take_over=vqvae_from_llamagen,
        options={"image_size": "image_size", "normalized_codes": "has_normalized_codes"},
        write=vqvae_to_llamagen,
        container="model",
        file_name=lambda model: f"vq_ds{model.config.downsampling}.pt",
        arguments=llamagen_arguments,
    ),
    "taming": Format(
        title="a VQGAN of taming-transformers",
        fits=is_taming_tokenizer,
        is_meant=lambda names: is_taming_tokenizer(names) and not has_averaged(names),
        take_over=vqvae_from_taming,
        options=LIGHTNING_OPTIONS,
        write=vqvae_to_taming,
        container="state_dict",
        file_name=lambda model: "vqgan.ckpt",
        arguments=taming_arguments,
    ),
    "maskgit": Format(
        title="MaskGIT's VQGAN",
        fits=is_maskgit_tokenizer,
        take_over=vqvae_from_maskgit,
        options={"image_size": "image_size"},
        write=vqvae_to_maskgit,
        file_name=lambda model: "maskgit-vqgan.bin",
        arguments=maskgit_arguments,
    ),
    "ibq": Format(
        title="an IBQ tokenizer",
        fits=is_taming_tokenizer,
        is_meant=lambda names: is_taming_tokenizer(names) and has_averaged(names),
        take_over=vqvae_from_ibq,
        options=LIGHTNING_OPTIONS,
        write=vqvae_to_ibq,
        container="state_dict",
        file_name=lambda model: "ibq.ckpt",
        arguments=taming_arguments,
    ),
    "magvit2": Format(
        title="an Open-MAGVIT2 tokenizer",
        fits=is_magvit2_tokenizer,
        take_over=vqvae_from_magvit2,
        options=LIGHTNING_OPTIONS,
        write=vqvae_to_magvit2,
        container="state_dict",
        file_name=lambda model: "magvit2.ckpt",
        arguments=magvit2_arguments,
    ),
}


@dataclass(kw_only=True)
class ConvertTokenizerConfig(ConversionConfig):
    """Turns a published tokenizer into a tokenizer folder, or with `--export` a folder into the published format.

    Sizes come from the checkpoint's shapes; what shapes leave open has the published value as its default.
    """

    formats: ClassVar = FORMATS

    format: Literal["auto", "var", "llamagen", "taming", "maskgit", "ibq", "magvit2"] = "auto"
    """Whose names and arithmetic the checkpoint follows; "auto" goes by the names of its tensors."""
    image_size: int | list[int] | None = None
    """H and W in pixels, or one number for both; null: the last scale of var, or the 16×16 tokens of magvit2, times the
    downsampling, else 256."""
    normalized_codes: bool | None = None
    """var: compare codes by cosine, null: false; llamagen: L2-normalise features and codes, null: true."""
    averaged_weights: bool | None = None
    """taming, ibq, magvit2: whether averaged weights are taken where a file has them; null: true."""
    phi_ratio: float | None = None
    """var: weight of a φ convolution against the identity; 0: the checkpoint has none; null: 0.5."""
    beta: float | None = None
    """var: weight of the commitment loss; null: 0.25."""
    phi_names: Literal["shared", "partially_shared", "separate"] | None = None
    """var, with `--export`: names of φ convolutions; null: as in the checkpoint they came from, else by number."""

    def __post_init__(self):
        if self.phi_names is not None and not self.export:
            raise ValueError(f"phi_names is {self.phi_names!r} without export; expected null")
        super().__post_init__()


def main(argv: Sequence[str]) -> None:
    """Convert the tokenizer that the command line names."""
    config = parse_conversion(
        ConvertTokenizerConfig,
        command="convert tokenizer",
        argv=argv,
        flags=("export", "normalized_codes", "averaged_weights"),
    )
    with claimed(Path(config.output_dir)):
        if config.export:
            export(config, VQVAE)
        else:
            _convert(config)


def _convert(config: ConvertTokenizerConfig) -> None:
    """Write a tokenizer folder."""
    name, state = read_checkpoint(config)
    model = take_over(config, name, state)
    model.save_pretrained(config.output_dir)
    made, layout = model.config, model.layout
    H, W = made.image_size
    print(
        f"{config.output_dir}: {FORMATS[name].title} (format {name}) of {H}×{W} images, {made.vocab_size} codes of "
        f"{made.embedding_dim} channels, {layout.num_tokens} tokens in {layout.num_blocks} blocks, "
        f"{model.num_parameters() / 1e6:.1f} M parameters"
    )
