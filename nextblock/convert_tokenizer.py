"""Take over a published tokenizer, or write one of ours in the published format.

    nextblock convert tokenizer --format var --checkpoint vae_ch160v4096z32.pth --output_dir out/var-tokenizer \\
        --scales 1,2,3,4,5,6,8,10,13,16
    nextblock convert tokenizer --format var --export --checkpoint out/tokenizer --output_dir out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from nextblock.files.claim import claimed
from nextblock.files.state_dicts import read_state_dict, write_state_dict
from nextblock.tokenizer import VQVAE
from nextblock.tokenizer.var_checkpoint import var_arguments, vqvae_from_var, vqvae_to_var

from .conversion import ConversionConfig, parse_conversion
from .inputs import load_given
from .mistakes import reading


@dataclass(kw_only=True)
class ConvertTokenizerConfig(ConversionConfig):
    """Turns a VAR tokenizer into a tokenizer folder, or with `--export` a folder into a VAR tokenizer.

    Sizes come from the checkpoint's shapes; what shapes leave open has the published value as its default.
    """

    export_options: ClassVar[frozenset[str]] = ConversionConfig.export_options | {"phi_names"}

    image_size: int | list[int] | None = None
    """H and W in pixels, or one number for both; null: the last scale times the downsampling."""
    normalized_codes: bool = False
    """Compare codes by cosine."""
    phi_ratio: float = 0.5
    """Weight of a φ convolution against the identity; 0: the checkpoint has no φ convolutions."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    phi_names: Literal["shared", "partially_shared", "separate"] | None = None
    """With `--export`: names of φ convolutions; null: as in the checkpoint they came from, else by number."""

    def __post_init__(self):
        super().__post_init__()
        if self.phi_names is not None and not self.export:
            raise ValueError(f"phi_names is {self.phi_names!r} without export; expected null")


def main(argv: Sequence[str]) -> None:
    """Convert the tokenizer that the command line names."""
    config = parse_conversion(
        ConvertTokenizerConfig,
        command="convert tokenizer",
        argv=argv,
        flags=("export", "normalized_codes"),
    )
    with claimed(Path(config.output_dir)):
        _convert(config)


def _convert(config: ConvertTokenizerConfig) -> None:
    """Do the work."""
    output_dir = Path(config.output_dir)
    if config.export:
        model = load_given("checkpoint", config.checkpoint, VQVAE, dtype=torch.float32)
        state = vqvae_to_var(model, config.phi_names)
        write_state_dict(state, output_dir / "vae.pth")
        print(f"{output_dir / 'vae.pth'}: {len(state)} tensors for VAR with {var_arguments(model, state)}")
        return
    with reading("checkpoint", config.checkpoint, "a VAR tokenizer that the other options fit"):
        model = vqvae_from_var(
            read_state_dict(config.checkpoint),
            scales=config.scales,
            image_size=config.image_size,
            has_normalized_codes=config.normalized_codes,
            phi_ratio=config.phi_ratio,
            beta=config.beta,
        )
    model.save_pretrained(output_dir)
    H, W = model.config.image_size
    print(
        f"{output_dir}: tokenizer of {H}×{W} images, {model.config.vocab_size} codes of "
        f"{model.config.embedding_dim} channels, {model.layout.num_tokens} tokens in "
        f"{model.layout.num_blocks} scales, {model.num_parameters() / 1e6:.1f} M parameters"
    )
