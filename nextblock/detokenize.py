"""Decode token shards back to pictures, to see what the codes hold.

nextblock detokenize --tokenizer DIR --tokens DIR --output_dir DIR --num_images 64
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from nextblock.data.pixels import to_pictures
from nextblock.data.tokens import TokenDataset, TokenManifest
from nextblock.evaluation.pictures import image_grid, save_picture
from nextblock.files.claim import claimed, is_occupied
from nextblock.tokenizer.modeling_vqvae import VQVAE
from nextblock.training.peers import PeerWatch
from nextblock.training.processes import connect_processes

from .command_line import parse_run_config
from .inputs import TOKENS_EXPECTED, load_given
from .mistakes import reading

_NUM_COLUMNS = 10


@dataclass(kw_only=True)
class DetokenizeConfig:
    """Write PNGs of the first rows of a folder of tokens, and a grid of them."""

    tokenizer: str
    """Folder of the tokenizer that made the tokens."""
    tokens: str
    """Folder of the tokens."""
    output_dir: str
    """Folder of the pictures, which must be new or empty."""
    split: str | None = None
    """Which split; the one to train on with null."""
    num_images: int = 64
    """Rows to decode, from the first on; all of a split that has fewer."""
    first_row: int = 0
    """Where to begin."""
    batch_size: int = 32
    """Rows decoded at a time."""
    cpu: bool = False
    """Decode on the CPU even where there is a GPU."""

    def __post_init__(self):
        for name, least in (("num_images", 1), ("batch_size", 1), ("first_row", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")


def detokenize(config: DetokenizeConfig) -> None:
    """Decode rows of tokens; each of several processes writes its part, the main process the grid.

    Args:
        config: the job.

    Raises:
        ValueError: if another tokenizer made the tokens, rows, split or folder do not fit, or another command works in
            the folder.
    """
    state = connect_processes(config.cpu)
    with PeerWatch(state), claimed(Path(config.output_dir), state):
        _detokenize(config, state)


@torch.no_grad()
def _detokenize(config: DetokenizeConfig, state: PartialState) -> None:
    """Do the work."""
    folder = Path(config.output_dir)
    if state.is_main_process and is_occupied(folder):
        raise ValueError(f"output_dir {folder} holds files; expected a new or empty folder")
    model = load_given("tokenizer", config.tokenizer, VQVAE, dtype=torch.float32).to(state.device).eval()
    with reading("tokens", config.tokens, TOKENS_EXPECTED):
        manifest = TokenManifest.load(Path(config.tokens))
        manifest.check_tokenizer(model, Path(config.tokens))
        tokens = TokenDataset(config.tokens, config.split or manifest.data["split"])
    if config.first_row >= len(tokens):
        raise ValueError(f"first_row is {config.first_row}; expected under {len(tokens)}, the rows of the split")
    rows = list(range(config.first_row, min(config.first_row + config.num_images, len(tokens))))
    state.wait_for_everyone()
    _write_pictures(config, state, model, tokens, rows)
    state.wait_for_everyone()
    if state.is_main_process:
        shown = rows[: _NUM_COLUMNS**2]
        pictures = [np.asarray(Image.open(folder / picture_name(row))) for row in shown]
        save_picture(image_grid(np.stack(pictures), _NUM_COLUMNS), folder / "grid.png")
        print(f"{folder}: {len(rows)} pictures and grid.png")


def _write_pictures(
    config: DetokenizeConfig, state: PartialState, model: VQVAE, tokens: TokenDataset, rows: list[int]
) -> None:
    """Decode this process's batches."""
    step = config.batch_size * state.num_processes
    for start in range(config.batch_size * state.process_index, len(rows), step):
        numbers = rows[start : start + config.batch_size]
        idx_Bl = tokens.layout.split(tokens.__getitems__(numbers)["labels"].to(state.device))
        for row, picture in zip(numbers, to_pictures(model.idxBl_to_img(idx_Bl)), strict=True):
            save_picture(picture, Path(config.output_dir) / picture_name(row))


def picture_name(row: int) -> str:
    """Return the file name of a row's picture."""
    return f"{row:08d}.png"


def main(argv: Sequence[str]) -> None:
    """Read the command line and decode."""
    detokenize(parse_run_config(DetokenizeConfig, command="detokenize", argv=argv))
