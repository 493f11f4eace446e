"""What a run leaves for people: metrics.jsonl, alarms.jsonl, tracker entries, pictures."""

import json
import math
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor

from .checkpoint import write_atomically
from .sharding import whole_tensor

logger = get_logger(__name__)

ALARMS_NAME = "alarms.jsonl"


class Recorder:
    """Average training metrics between log lines and write them, on the main process alone.

    Values that are not finite count for no mean, and a figure that never was finite is left out of its line.

    Args:
        accelerator: sums over processes and holds the trackers.
        output_dir: gets `metrics.jsonl`, `alarms.jsonl` and `pictures/`.
        first_step: steps already taken; later lines of an earlier run are dropped.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.first_step = first_step
        self.last_evaluation: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        if accelerator.is_main_process:
            (output_dir / "pictures").mkdir(parents=True, exist_ok=True)
            _keep_lines_up_to(output_dir / "metrics.jsonl", first_step)
            if (output_dir / ALARMS_NAME).exists():
                _keep_lines_up_to(output_dir / ALARMS_NAME, first_step)
        accelerator.init_trackers("nextblock")

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one step's metrics to the running sums, without waiting for the device."""
        device = self.accelerator.device
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                value = whole_tensor(value.detach()).to(device, torch.float64)
            else:
                # Filled, not copied: copying a number of the host's would wait for the device.
                value = torch.full((), value, dtype=torch.float64, device=device)
            is_finite = value.isfinite()
            counted = torch.stack([torch.where(is_finite, value, 0.0), is_finite.double()])
            self._sums[name] = self._sums[name] + counted if name in self._sums else counted

    def log_training(self, step: int) -> dict[str, float]:
        """Write the means since the last call, over steps and processes; return them, "train/loss" say."""
        names = sorted(self._sums)
        sums, counts = self.accelerator.reduce(torch.stack([self._sums[name] for name in names])).unbind(1)
        means = (sums / counts).tolist()
        self._sums = {}
        values = {f"train/{name}": mean for name, mean in zip(names, means, strict=True) if math.isfinite(mean)}
        self._write(step, values)
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
        self._write(step, self.last_evaluation | {"time/total": _seconds_since_process_start()})
        if not self.accelerator.is_main_process:
            return
        for name, picture in pictures.items():
            picture.save(self.output_dir / "pictures" / f"{name}_{step:08d}.png")
            for tracker in self.accelerator.trackers:
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **_image_options(tracker.name))

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and tell the trackers."""
        if self.accelerator.is_main_process:
            _append_line(self.output_dir / "metrics.jsonl", {"step": step, **values})
        self.accelerator.log(values, step=step)


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines that a resumed run will write again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and step else []
    # A crash may have cut the last line short.
    whole = [line for line in lines if line.endswith("\n")]
    write_atomically(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def _append_line(path: Path, content: dict) -> None:
    """Append an object as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _image_options(tracker_name: str) -> dict[str, str]:
    """Tell TensorBoard that pictures come as N×H×W×3."""
    return {"dataformats": "NHWC"} if tracker_name == "tensorboard" else {}


def _seconds_since_process_start() -> float:
    """Return the age of this process, imports and data preparation included."""
    return time.time() - psutil.Process().create_time()
