"""What a run leaves for people: metrics.jsonl, alarms.jsonl, tracker entries, pictures."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from nextblock.evaluation.pictures import save_picture
from nextblock.evaluation.training_log import ALARMS_NAME, LOG_NAME
from nextblock.files.atomic import set_aside, write_whole, writing
from nextblock.files.regular import MAX_TEXT_BYTES, read_content

from .sharding import whole_tensor

logger = get_logger(__name__)


class Recorder:
    """Average training metrics between log lines and write them, on the main process alone.

    Values that are not finite count for no mean, and a figure that never was finite is left out of its line.

    Args:
        accelerator: sums over processes and holds the trackers.
        output_dir: gets `metrics.jsonl`, `alarms.jsonl` and `pictures/`.
        first_step: steps already taken; later lines of an earlier run are dropped.
        options: the run's, for the tracker that shows them (Weights & Biases).
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int, options: Mapping | None = None):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.last_evaluation: dict[str, float] | None = None
        """Held-out metrics of the newest step, None before any; a resumed run finds those of its first step."""
        self.evaluations: list[dict[str, float]] = []
        """Held-out metrics of all steps so far, those of the run before it was resumed too."""
        self._last_means: dict[str, float] = {}
        self._seconds_before = 0.0
        self._sums: dict[tuple[str, ...], Tensor] = {}
        if accelerator.is_main_process:
            for name in ("pictures", "logs"):
                if (output_dir / name).exists() and not (output_dir / name).is_dir():
                    logger.warning(f"{output_dir / name} is no folder; it is now {set_aside(output_dir / name)}")
            (output_dir / "pictures").mkdir(parents=True, exist_ok=True)
            if (output_dir / ALARMS_NAME).exists():
                _keep_lines_up_to(output_dir / ALARMS_NAME, first_step, _is_alarm)
            lines = _keep_lines_up_to(output_dir / LOG_NAME, first_step, _has_figures)
            self._seconds_before = max((line.get("time/total", 0.0) for line in lines), default=0.0)
            self.evaluations = [metrics for line in lines if (metrics := _evaluation_of(line))]
            self.last_evaluation = _evaluation_at(lines, first_step)
        if first_step:
            # Whether the first step still has to be evaluated must be agreed on.
            agreed = broadcast_object_list([self.last_evaluation, self.evaluations])
            self.last_evaluation, self.evaluations = agreed
        try:
            accelerator.init_trackers("nextblock", init_kwargs={"wandb": {"dir": str(output_dir), "config": options}})
        except Exception as error:  # Services, keys and networks fail in ways of their own.
            trackers = accelerator.log_with
            raise ValueError(
                f"tracker is {', '.join(map(str, trackers))}, which does not start: {type(error).__name__}: {error}; "
                "expected null, or one that works here"
            ) from error

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one step's metrics to the running sums, without waiting for the device."""
        device = self.accelerator.device
        # Filled, not copied: copying a number of the host's would wait for the device.
        values = [
            whole_tensor(value.detach()).to(device, torch.float64)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in metrics.values()
        ]
        # All at once: many small operations a step would cost a tiny model several percent.
        values = torch.stack(values)
        is_finite = values.isfinite()
        counted = torch.stack([values.where(is_finite, 0.0), is_finite.double()], dim=1)
        names = tuple(metrics)
        self._sums[names] = self._sums[names] + counted if names in self._sums else counted

    def log_training(self, step: int) -> dict[str, float]:
        """Write the means since the last call, over steps and processes; return them, "train/loss" say."""
        by_name: dict[str, Tensor] = {}
        for step_names, rows in self._sums.items():
            for name, row in zip(step_names, rows, strict=True):
                by_name[name] = by_name[name] + row if name in by_name else row
        self._sums = {}
        names = sorted(by_name)
        sums, counts = self.accelerator.reduce(torch.stack([by_name[name] for name in names])).unbind(1)
        means = (sums / counts).tolist()
        values = {f"train/{name}": mean for name, mean in zip(names, means, strict=True) if math.isfinite(mean)}
        self._write(step, values)
        self._last_means = values
        return values

    def log_alarm(self, step: int, message: str) -> None:
        """Warn in the log and keep the warning in alarms.jsonl."""
        logger.warning(message)
        if self.accelerator.is_main_process:
            _append_line(self.output_dir / ALARMS_NAME, {"step": step, "alarm": message})

    def log_evaluation(self, step: int, metrics: dict[str, float], pictures: dict[str, Image.Image]) -> None:
        """Write held-out metrics and pictures.

        Args:
            step: steps taken.
            metrics: floats, equal on every process.
            pictures: RGB images by name.
        """
        self.last_evaluation = {f"eval/{name}": value for name, value in metrics.items()}
        self.evaluations.append(self.last_evaluation)
        self._write(step, self.last_evaluation)
        if not self.accelerator.is_main_process:
            return
        for name, picture in pictures.items():
            save_picture(picture, self.output_dir / "pictures" / f"{name}_{step:08d}.png")
            for tracker in self.accelerator.trackers:
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **_image_options(tracker.name))

    def is_best(self, name: str, value: float) -> bool:
        """Tell whether a held-out metric is better than at all evaluations so far; losses are to be low, others high.

        Args:
            name: of the metric.
            value: of an evaluation that is not logged yet.
        """
        sign = -1 if name.endswith("loss") else 1
        earlier = [sign * metrics.get(f"eval/{name}", math.nan) for metrics in self.evaluations]
        return math.isfinite(value) and not any(before >= sign * value for before in earlier)

    def closing_line(self, *, model: Path, checkpoint: Path, best: Path | None) -> str:
        """Return what a finished training is summed up by: its last figures, its time, and where everything is.

        Args:
            model: folder of the exported model.
            checkpoint: the last one.
            best: the one that was best by an evaluation, or None.
        """
        # A figure a block is for curves.
        figures = self.last_evaluation or self._last_means
        shown = [f"{name} {value:.4g}" for name, value in figures.items() if "/block_" not in name]
        seconds = self._seconds_before + _seconds_since_process_start()
        parts = [f"finished in {seconds:.0f} s", ", ".join(shown), f"model in {model}"]
        parts += [f"last checkpoint {checkpoint}", "" if best is None else f"best checkpoint {best}"]
        parts += [f"all figures in {self.output_dir / LOG_NAME}"]
        return f"{self.output_dir}: " + "; ".join(filter(None, parts))

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and tell the trackers."""
        values = values | {"time/total": self._seconds_before + _seconds_since_process_start()}
        if self.accelerator.is_main_process:
            _append_line(self.output_dir / LOG_NAME, {"step": step, **values})
        self.accelerator.log(values, step=step)


def _keep_lines_up_to(path: Path, step: int, is_whole: Callable[[dict], bool]) -> list[dict]:
    """Drop the lines that a resumed run will write again, and return the others; a damaged file is kept beside them."""
    lines, damaged = [], []
    try:
        texts = [b""]
        if step and path.exists():
            texts = read_content(path, MAX_TEXT_BYTES).split(b"\n")
    except (OSError, ValueError):
        damaged = ["all"]
    # A crash may have cut the last line short.
    for number, text in enumerate(texts[:-1], start=1):
        try:
            line = json.loads(text)
            is_fit = isinstance(line, dict) and type(line.get("step")) is int and is_whole(line)
        except (ValueError, RecursionError):
            is_fit = False
        if is_fit:
            lines.append((text, line))
        else:
            damaged.append(str(number))
    if damaged:
        listed = ", ".join(damaged[:8]) + " …" * (len(damaged) > 8)
        logger.warning(f"{path} is damaged (lines: {listed}); it is set aside as {set_aside(path)}, the rest goes on")
    kept = [(text, line) for text, line in lines if line["step"] <= step]
    write_whole(path, lambda file: file.writelines(text + b"\n" for text, _ in kept))
    return [line for _, line in kept]


def _has_figures(line: dict) -> bool:
    """Tell whether a line of the log holds nothing but numbers."""
    return all(type(value) in (int, float) for value in line.values())


def _is_alarm(line: dict) -> bool:
    """Tell whether a line is an alarm's."""
    return isinstance(line.get("alarm"), str)


def _evaluation_at(lines: list[dict], step: int) -> dict[str, float] | None:
    """Return the held-out metrics of a step, None if it has none."""
    for line in reversed(lines):
        metrics = _evaluation_of(line)
        if metrics and line["step"] == step:
            return metrics
    return None


def _evaluation_of(line: dict) -> dict[str, float]:
    """Return the held-out metrics of a line, none of a line of training."""
    return {name: value for name, value in line.items() if name.startswith("eval/")}


def _append_line(path: Path, content: dict) -> None:
    """Append an object as one line of JSON."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _image_options(tracker_name: str) -> dict[str, str]:
    """Tell TensorBoard that pictures come as N×H×W×3."""
    return {"dataformats": "NHWC"} if tracker_name == "tensorboard" else {}


def _seconds_since_process_start() -> float:
    """Return the age of this process, imports and data preparation included."""
    # Field 22, in ticks since the machine started; the program's name, field 2, may itself hold spaces and brackets.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
