"""What a training leaves in its output folder, and reading its log `metrics.jsonl`: one JSON object a line.

Each object holds "step" and figures such as "train/loss" or "eval/psnr".
"""

from __future__ import annotations

import json
from pathlib import Path

from nextblock.files.regular import MAX_TEXT_BYTES, read_content, read_json

LOG_NAME, ALARMS_NAME, RECORD_NAME = "metrics.jsonl", "alarms.jsonl", "run.json"


def read_log(run_dir: str | Path) -> list[dict]:
    """Read the log of one training.

    Args:
        run_dir: the training's output folder.

    Returns:
        The records in the order written.

    Raises:
        ValueError: if there is no log, or a line of it is not a JSON object with a step.
    """
    path = Path(run_dir) / LOG_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the output folder of a training")
    records = []
    for number, line in enumerate(read_content(path, MAX_TEXT_BYTES).split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number} is {line[:80]!r}; expected an object with a step")
        records.append(record)
    return records


def read_starts(run_dir: str | Path) -> list[dict]:
    """Read what `run.json` says of every start of a training.

    Args:
        run_dir: the training's output folder, which has that file.

    Raises:
        ValueError: if the file is damaged.
    """
    path = Path(run_dir) / RECORD_NAME
    try:
        starts = read_json(path)["starts"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} is damaged: it holds no list of starts")
    return starts


def series(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a figure was logged and its values, by step.

    A run that was resumed logs some steps twice; the later record of a step counts.

    Args:
        records: what `read_log` returns.
        key: name of the figure, "train/loss" say.
    """
    values = {record["step"]: record[key] for record in records if key in record}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def last_value(records: list[dict], key: str) -> float | None:
    """Return the figure at the last step that logged it; None if none did."""
    values = series(records, key)[1]
    return values[-1] if values else None


def loss_curves(records: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the series of every figure that is called "loss", by name, "train/loss" and "eval/loss" say."""
    names = dict.fromkeys(key for record in records for key in record if key.split("/")[-1] == "loss")
    return {name: series(records, name) for name in names}
