"""Images that cannot be read are left out of a training: found before step 0, and then the same to its end.

`unreadable.json` in the run's folder lists them by split; a resumed run takes them from there.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object

from nextblock.data.images import ImageDataConfig, ImageSource, load_source, source_files
from nextblock.data.source_record import Check, check_files
from nextblock.data.token_shards import split_identifier
from nextblock.data.usable import UsableImages, describe_unreadable, find_unreadable, source_fingerprint
from nextblock.files.atomic import set_aside, write_text_whole
from nextblock.files.regular import read_json

from .checkpoint import saved_steps

UNREADABLE_NAME = "unreadable.json"
logger = get_logger(__name__)


def open_training_images(
    accelerator: Accelerator,
    config: ImageDataConfig,
    split: str,
    output_dir: Path,
    num_workers: int = 0,
    accepts_changes: bool = False,
) -> ImageSource:
    """Open the images of a split, without those that cannot be read where `config.on_error` is "skip".

    Every process must call this; each reads its share of the images once.

    Args:
        accelerator: connects the processes.
        config: where the images are.
        split: which of them.
        output_dir: the run's folder.
        num_workers: threads that read, at least one.
        accepts_changes: whether a run goes on with files that have changed.

    Returns:
        The images.

    Raises:
        ValueError: if the images are missing or unusable, or are no longer those that the run began with.
    """
    source = load_source(config, split)
    if config.on_error == "skip":
        source = _without_unreadable(accelerator, config, split, source, output_dir, num_workers)
    if accelerator.is_main_process:
        # Sizes alone: a machine that is lent anew has its copy of the images with other times.
        check_run_files(output_dir, split, *source_files(config, source, split), "sizes", accepts_changes)
    return source


def _without_unreadable(
    accelerator: Accelerator,
    config: ImageDataConfig,
    split: str,
    source: ImageSource,
    output_dir: Path,
    num_workers: int,
) -> ImageSource:
    """Find the images that cannot be read, or take them from the run's list, and leave them out."""
    path, fingerprint = output_dir / UNREADABLE_NAME, source_fingerprint(source)
    is_begun = _is_begun(output_dir)
    known = _read(path) if accelerator.is_main_process else {}
    # One process looks, so that all agree.
    (entry,) = broadcast_object_list([known.get(split) if is_begun else None])
    if entry is None:
        mine = range(accelerator.process_index, len(source), accelerator.num_processes)
        logger.info(f"reading the {len(source)} images of split {split!r} once, to find those that cannot be read")
        found = gather_object(find_unreadable(source, mine, max(1, num_workers)))
        unreadable = sorted(found, key=lambda item: item["index"])
        entry = {"num_images": len(source), "source_sha256": fingerprint, "unreadable": unreadable}
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            # What an earlier run of other splits has left is nothing of this one.
            known = {name: known[name] for name in known if name in (config.split, config.eval_split)}
            write_text_whole(path, json.dumps(known | {split: entry}, indent=2, ensure_ascii=False) + "\n")
    elif entry["source_sha256"] != fingerprint:
        raise ValueError(
            f"split {split!r} has {len(source)} images that are not the {entry['num_images']} of {path}, which the run "
            "began with; expected the same, or remove that file to have them read again"
        )
    if not entry["unreadable"]:
        return source
    described = describe_unreadable(entry["unreadable"], len(source), split)
    logger.warning(f"{described}; all of them are in {path}")
    return UsableImages(source, [item["index"] for item in entry["unreadable"]])


def check_run_files(
    output_dir: Path, name: str, root: Path | None, files: Sequence[str], check: Check, accepts_changes: bool
) -> None:
    """Refuse to go on with other files than a run began with; one process does it for all.

    Args:
        output_dir: the run's folder, which keeps a record of them.
        name: of the split, or whatever the files are.
        root: their folder; None where there is none.
        files: paths below it.
        check: what of them must be the same.
        accepts_changes: whether the run goes on with files that have changed.

    Raises:
        ValueError: naming the first that has changed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    record = output_dir / f"source-{split_identifier(name)}.npz"
    hint = "expected the same files, or loop.accepts_changed_options true to go on with those that are there"
    check_files(record, root, files, check, is_begun=_is_begun(output_dir) and not accepts_changes, hint=hint)


def _is_begun(output_dir: Path) -> bool:
    """Whether a run has come to a checkpoint."""
    return bool(saved_steps(output_dir / "checkpoints"))


def _read(path: Path) -> dict:
    """What a run has found so far, by split; a damaged file is set aside, and all images are read once more."""
    if not path.exists():
        return {}
    try:
        known = read_json(path)
        if not all(_is_entry(entry) for entry in known.values()):
            raise ValueError("an entry is not what a training writes")
    except (ValueError, AttributeError, OSError) as error:
        aside = set_aside(path)
        logger.warning(f"{path} is damaged ({error}); it is set aside as {aside}, and all images are read anew")
        return {}
    return known


def _is_entry(entry) -> bool:
    """Tell whether an entry says what is needed of a split."""
    if not isinstance(entry, dict) or not {"num_images", "source_sha256", "unreadable"} <= entry.keys():
        return False
    items = entry["unreadable"]
    return isinstance(items, list) and all(isinstance(i, dict) and type(i.get("index")) is int for i in items)
