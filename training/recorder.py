"""What a run leaves for people: metrics.jsonl, tracker entries, pictures."""

import json
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from .checkpoint import write_atomically


class Recorder:
    """Average training metrics between log lines and write them, on the main process alone.

    Args:
        accelerator: sums over processes and holds the trackers.
        output_dir: gets `metrics.jsonl` and `pictures/`.
        first_step: steps already taken; later lines of an earlier run are dropped.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.first_step = first_step
        self.last_evaluation: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_added = 0
        if accelerator.is_main_process:
            (output_dir / "pictures").mkdir(parents=True, exist_ok=True)
            self._keep_lines_up_to(first_step)
        accelerator.init_trackers("nextblock")

    def _keep_lines_up_to(self, step: int) -> None:
        """Drop the lines that a resumed run will write again."""
        path = self.output_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and step else []
        # A crash may have cut the last line short.
        whole = [line for line in lines if line.endswith("\n")]
        write_atomically(path, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Add one step's metrics to the running sums, without waiting for the device."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device).detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_added += 1

    def log_training(self, step: int) -> float:
        """Write the means since the last call, over steps and processes; return the loss."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        means = (self.accelerator.reduce(sums, reduction="mean") / self._num_added).tolist()
        self._sums, self._num_added = {}, 0
        values = {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}
        self._write(step, values)
        return values["train/loss"]

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
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _image_options(tracker_name: str) -> dict[str, str]:
    """Tell TensorBoard that pictures come as N×H×W×3."""
    return {"dataformats": "NHWC"} if tracker_name == "tensorboard" else {}


def _seconds_since_process_start() -> float:
    """Return the age of this process, imports and data preparation included."""
    return time.time() - psutil.Process().create_time()
