"""Measures a tokenizer on held-out images: reconstruction and use of the codebook.

nextblock evaluate-tokenizer --config tokenizer/evaluate-digits
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from nextblock.data.augment import TransformConfig
from nextblock.data.images import ImageDataConfig, ImageDataset, collate
from nextblock.data.usable import open_usable
from nextblock.evaluation.codebook import codebook_summary
from nextblock.evaluation.pictures import comparison_grid, save_picture
from nextblock.evaluation.reconstruction import reconstruct
from nextblock.evaluation.report import Row, environment, format_table, write_json
from nextblock.files.claim import claimed
from nextblock.tokenizer import VQVAE

from .command_line import parse_run_config
from .inputs import load_given
from .run_data import data_of_run


@dataclass(kw_only=True)
class EvaluateTokenizerConfig:
    """Measures a tokenizer on one split of a data set and writes report.json and reconstructions.png."""

    tokenizer: str
    """Folder of the tokenizer."""
    output_dir: str
    """Folder that the report and the picture go to."""
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    """Images to measure on. Not given: what the tokenizer was trained on, and held out."""
    split: str | None = None
    """Split of the data; by default the one that the data configuration holds out (`data.eval_split`)."""
    batch_size: int = 100
    """Images encoded at a time."""
    num_pictures: int = 10
    """Originals shown above their reconstructions."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""
    def __post_init__(self):
        if self.split is None and self.data.eval_split is None:
            raise ValueError(
                "split and data.eval_split are both null; expected the name of a split to measure on"
            )
        for name in ("batch_size", "num_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive integer")


def main(argv: Sequence[str]) -> None:
    """Measure the tokenizer that the command line names, print the figures and write the report."""
    config = parse_run_config(EvaluateTokenizerConfig, command="evaluate-tokenizer", argv=argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected a single process")
    with claimed(Path(config.output_dir)):
        _evaluate(config)


def _evaluate(config: EvaluateTokenizerConfig) -> None:
    """Do the work."""
    if config.data.source is None:
        config = replace(config, data=data_of_run(config.tokenizer)[0])
    device = "cuda" if torch.cuda.is_available() and not config.cpu else "cpu"
    split = config.split or config.data.eval_split
    source = open_usable(config.data, split, print)
    tokenizer = load_given("tokenizer", config.tokenizer, VQVAE).to(device).eval()
    dataset = ImageDataset(source, tokenizer.config.image_size, TransformConfig(), seed=0)
    loader = DataLoader(dataset, batch_size=config.batch_size, collate_fn=collate)
    result = reconstruct(tokenizer, loader, tokenizer.config.vocab_size, num_kept=config.num_pictures)

    figures = result.figures()
    output_dir = Path(config.output_dir)
    report = {
        "tokenizer": config.tokenizer,
        "data": asdict(config.data) | {"measured_split": split, "num_images": len(dataset)},
        "figures": figures,
        "codebook": codebook_summary(result.code_counts),
        "parameters": {"tokenizer": tokenizer.num_parameters()},
        "precision": {"dtype": str(tokenizer.dtype), "device": device, "threads": torch.get_num_threads()},
        "versions": environment(),
    }
    write_json(report, output_dir / "report.json")
    picture = comparison_grid(result.originals, result.reconstructions, num_columns=config.num_pictures)
    save_picture(picture, output_dir / "reconstructions.png")
    print(format_table([Row(name, name.replace("_", " "), value) for name, value in figures.items()]))
    print(f"{len(dataset)} images of split {split!r}; report and picture in {output_dir}")
