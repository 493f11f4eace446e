"""A training's processes and folders, opened before anything is looked at.

From here on nobody waits for a process that has died, and no other command works in the folders. A training that fails
before its first step leaves no folder behind that the next start would trip over.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator

from nextblock.evaluation.training_log import RECORD_NAME
from nextblock.files.claim import LOCK_NAME, claimed, is_occupied

from .accelerator import build_accelerator
from .loop_config import LoopConfig
from .peers import PeerWatch


@contextmanager
def opened_run(config: LoopConfig, output_dir: Path, pipeline_dir: Path | None = None) -> Iterator[Accelerator]:
    """Connect a training's processes, watch over them, and claim its folders, until the context is left.

    Args:
        config: the loop's settings.
        output_dir: the run's folder.
        pipeline_dir: another folder that the run will write in the end.

    Returns:
        The accelerator, in the context.

    Raises:
        ValueError: as `build_accelerator` does, or if another command works in one of the folders.
    """
    accelerator = build_accelerator(config, output_dir)
    with PeerWatch(accelerator), claimed(output_dir, accelerator), _no_stub_left(output_dir, accelerator):
        has_other = pipeline_dir is not None and pipeline_dir.resolve() != output_dir.resolve()
        with claimed(pipeline_dir, accelerator, option="pipeline_dir") if has_other else nullcontext():
            yield accelerator


@contextmanager
def _no_stub_left(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Empty a claimed folder again if nothing was in it and the work inside fails before its first step."""
    is_new = accelerator.is_main_process and not is_occupied(output_dir)
    try:
        yield
    except Exception:
        if is_new and _num_steps(output_dir) == 0:
            for entry in output_dir.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != LOCK_NAME:
                    entry.unlink()
        raise


def _num_steps(output_dir: Path) -> int:
    """Steps that a run has taken, by its record."""
    path = output_dir / RECORD_NAME
    if not path.is_file():
        return 0
    return json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["last_step"] or 0
