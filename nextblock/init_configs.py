"""Write configs for a folder of pictures, after looking at it: `nextblock init my_images/`."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from nextblock.data.image_folder import ImageFolderSource, scan_image_folder
from nextblock.data.selection import is_held_out
from nextblock.files.atomic import write_text_whole
from nextblock.files.claim import claimed
from nextblock.files.regular import open_regular

from .commands import example_text
from .output_folders import check_writable

_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = ("test", "val", "validation", "valid", "eval")
_EVAL_FRACTIONS = (0.1, 0.2, 0.3, 0.5)
_MAX_OPENED = 200
_SIDES = (32, 64, 128, 256)
_TOKENIZER_STEPS, _PRIOR_STEPS = 5000, 10000


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """What a folder of pictures shows of itself.

    Args:
        path: the folder.
        split: sub-folder to train on; None where the whole folder is.
        eval_split: sub-folder held out; None where there is none.
        eval_fraction: share held out instead; None where pictures are too few for one.
        num_images: pictures, those of a held-out sub-folder not counted.
        class_names: empty where pictures lie in no sub-folders.
        sizes: (width, height) of some of the pictures.
    """

    path: Path
    split: str | None
    eval_split: str | None
    eval_fraction: float | None
    num_images: int
    class_names: list[str]
    sizes: list[tuple[int, int]]

    @property
    def image_side(self) -> int:
        """The largest usual side that at least half of the pictures fill."""
        typical = median(min(size) for size in self.sizes)
        return max([side for side in _SIDES if side <= typical] or _SIDES[:1])


def look_at(folder: Path) -> FolderFacts:
    """Find out what a folder of pictures holds.

    Args:
        folder: of pictures, of a sub-folder for each class, or of splits of either.

    Raises:
        ValueError: if it is no folder of pictures, or none of those looked at can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"path={str(folder)!r} is not a folder; expected a folder of images")
    inside = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    split = next((name for name in _TRAIN_NAMES if name in inside), None)
    eval_split = next((name for name in _EVAL_NAMES if name in inside), None) if split else None
    source = scan_image_folder(folder, split or "train")
    return FolderFacts(
        path=folder,
        split=split,
        eval_split=eval_split,
        eval_fraction=_eval_fraction([source.identifier(index) for index in range(len(source))]),
        num_images=len(source),
        class_names=source.class_names,
        sizes=_sizes_of(folder, source),
    )


def _eval_fraction(names: list[str]) -> float | None:
    """The first share under which there are pictures on both sides."""
    for fraction in _EVAL_FRACTIONS:
        if len({is_held_out(name, fraction) for name in names}) == 2:
            return fraction
    return None


def _sizes_of(folder: Path, source: ImageFolderSource) -> list[tuple[int, int]]:
    """Sizes of pictures spread over the folder; those that cannot be opened are left out."""
    sizes, step = [], max(1, len(source) // _MAX_OPENED)
    for index in range(0, len(source), step):
        try:
            with open_regular(folder / source.identifier(index)) as file, Image.open(file) as image:
                sizes.append(image.size)
        except (OSError, ValueError, SyntaxError):  # What PIL raises for files that are no pictures.
            continue
    if not sizes:
        raise ValueError(f"path={str(folder)!r}: none of the pictures looked at can be opened; expected images")
    return sizes


def config_texts(facts: FolderFacts, configs_dir: Path) -> dict[str, str]:
    """Write the configs of the four steps from pictures to samples.

    Args:
        facts: about the pictures.
        configs_dir: where the configs will lie; results go to folders beside them.

    Returns:
        File name → YAML with comments.
    """
    out = {name: _quoted(configs_dir / name) for name in ("tokenizer", "tokens", "prior", "pipeline", "samples")}
    texts = {
        "tokenizer.yaml": _tokenizer_lines(facts, out),
        "tokenize.yaml": [
            "# Turns the pictures into tokens: those that the tokenizer was trained on, since no data is named here.",
            f"tokenizer: {out['tokenizer']}",
            f"output_dir: {out['tokens']}",
            "# Pictures that cannot be read are listed in rejected.jsonl; stop would end the job at the first.",
            "on_error: skip",
            "# The mirrored picture too; leave it out where left and right matter, as in text.",
            "has_flipped_view: true",
        ],
        "prior.yaml": _prior_lines(facts, out),
        "sample.yaml": [
            "# Draws pictures, guided and truncated as prior.yaml says under sampling.",
            f"pipeline: {out['pipeline']}",
            f"output_dir: {out['samples']}",
            "output_format: npz",
            "# Of each class, or in all where there are no classes.",
            "num_images_per_label: 16",
            "batch_size: 16",
        ],
    }
    return {name: "\n".join(lines) + "\n" for name, lines in texts.items()}


def _data_lines(facts: FolderFacts) -> list[str]:
    """The lines that say where the pictures are and which are held out."""
    lines = ["data:", "  source: folder", f"  path: {_quoted(facts.path)}"]
    if facts.split not in (None, "train"):
        lines.append(f"  split: {facts.split}")
    if facts.eval_split is not None:
        return [*lines, f"  eval_split: {facts.eval_split}"]
    if facts.eval_fraction is None:
        return [*lines, "  eval_split: null   # too few pictures to hold some out"]
    if (facts.path / "test").is_dir():
        lines.append("  eval_split: heldout   # test is a class here")
    return [*lines, f"  eval_fraction: {facts.eval_fraction}   # no split is there: a share chosen by file names"]


def _tokenizer_lines(facts: FolderFacts, out: dict[str, str]) -> list[str]:
    """The tokenizer's config; the latent grid has 8 or 16 cells a side."""
    side, (common, count) = facts.image_side, Counter(facts.sizes).most_common(1)[0]
    num_classes, is_small = len(facts.class_names), facts.image_side <= 64
    sizes = f"most often {common[0]}x{common[1]} ({count} of {len(facts.sizes)} looked at)"
    grid = side // 4 if is_small else side // 16
    scales = [step for step in (1, 2, 3, 4, 6, 8, 12) if step < grid] + [grid]
    model = ["  autoencoder: vqgan", "  hidden_dim: 64", "  width_multipliers: [1, 1, 2, 2, 4]", "  num_res_blocks: 1"]
    if is_small:
        model = ["  autoencoder: simple", "  hidden_dim: 96", "  num_res_blocks: 2"]
    return [
        f"# A tokenizer for {facts.num_images} pictures, {sizes}, {num_classes or 'no'} classes.",
        *_data_lines(facts),
        "# Training pictures are varied by these; left and right are mirrored, which suits most photographs.",
        "transform:",
        "  horizontal_flip: true",
        "  resize_ratio: 1.1",
        "  random_crop: true",
        "model:",
        f"  image_size: {side}   # the center of every picture is cut out and brought to this size",
        *model,
        "  vocab_size: 1024   # more codes keep more detail, and make the prior's task harder",
        "  embedding_dim: 16",
        "  layout: scales",
        f"  scales: {scales}   # token maps from coarse to fine; the last is the latent grid",
        "  codebook_update: ema",
        "  codebook_init: data",
        "  revival_threshold: 0.02",
        "optimizer: {learning_rate: 4.0e-4, warmup_steps: 200}",
        "loop:",
        f"  num_steps: {_TOKENIZER_STEPS}",
        f"  batch_size: {min(32, facts.num_images)}   # over all processes",
        "  num_workers: 2",
        "  ema_decay: 0.999",
        f"output_dir: {out['tokenizer']}",
    ]


def _prior_lines(facts: FolderFacts, out: dict[str, str]) -> list[str]:
    """The prior's config."""
    guidance = "{guidance_scale: 1.5, guidance_schedule: linear, top_p: 0.95}" if facts.class_names else "{top_p: 0.95}"
    return [
        "# The prior over the tokens; classes and layout come with them.",
        f"tokens: {out['tokens']}",
        f"tokenizer: {out['tokenizer']}",
        "model: {hidden_size: 384, num_layers: 8, num_heads: 6, dropout: 0.1}",
        "optimizer: {learning_rate: 5.0e-4, weight_decay: 0.05, warmup_steps: 200}",
        "loop:",
        f"  num_steps: {_PRIOR_STEPS}",
        f"  batch_size: {min(32, facts.num_images)}   # over all processes",
        "  ema_decay: 0.999",
        "# How samples are drawn, here and by the finished pipeline where a call does not say.",
        f"sampling: {guidance}",
        f"output_dir: {out['prior']}",
        f"pipeline_dir: {out['pipeline']}",
    ]


def _quoted(path: Path) -> str:
    """A path as YAML takes it, whatever its name: JSON's strings are YAML's."""
    return json.dumps(os.fspath(path), ensure_ascii=False)


def main(argv: Sequence[str]) -> None:
    """Look at the folder that the command line names and write configs for it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nextblock init", epilog=example_text("init"), formatter_class=raw)
    parser.description = "Look at a folder of pictures and write configs for training on it, with comments."
    parser.add_argument("images", type=Path, help="folder of pictures, with or without splits and class folders")
    parser.add_argument("--output_dir", type=Path, default=None, help="folder of the configs (default: NAME-configs)")
    arguments = parser.parse_args(argv)
    if arguments.output_dir is not None:
        check_writable("output_dir", arguments.output_dir)
    folder = arguments.output_dir or Path(f"{arguments.images.resolve().name}-configs")
    facts = look_at(arguments.images)
    texts = config_texts(facts, folder)
    with claimed(folder):
        there = sorted(name for name in texts if (folder / name).exists())
        if there:
            raise ValueError(f"output_dir {folder} holds {there}; expected a folder without them")
        for name, text in texts.items():
            write_text_whole(folder / name, text)
    share = "none" if facts.eval_fraction is None else f"{facts.eval_fraction:.0%} of them, chosen by name"
    found = f"{facts.num_images} pictures, {len(facts.class_names) or 'no'} classes"
    print(f"{arguments.images}: {found}; held out: {facts.eval_split or share}")
    print("Next:")
    for command, name in (("train-tokenizer", "tokenizer"), ("tokenize", "tokenize"), ("train-prior", "prior")):
        print(f"  nextblock {command} --config {folder / name}.yaml")
    print(f"  nextblock sample --config {folder / 'sample'}.yaml")
