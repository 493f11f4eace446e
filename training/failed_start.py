"""A training that fails before its first step leaves no folder behind that the next start would trip over."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nextblock.evaluation.training_log import RECORD_NAME


@contextmanager
def no_stub_left(output_dir: Path, is_main_process: bool) -> Iterator[None]:
    """Remove the run's folder if the work inside fails, made the folder, and took no step.

    Args:
        output_dir: the run's folder.
        is_main_process: whether this is the process that writes there.
    """
    is_new = not output_dir.exists()
    try:
        yield
    except Exception:
        if is_main_process and is_new and _num_steps(output_dir) == 0:
            shutil.rmtree(output_dir, ignore_errors=True)
        raise


def _num_steps(output_dir: Path) -> int:
    """Steps that a run has taken, by its record."""
    path = output_dir / RECORD_NAME
    if not path.is_file():
        return 0
    return json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["last_step"] or 0
