"""Images depend on neither batch, nor position in it, nor process: indices at the digits' sizes, files drawn."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nextblock.cpu import fixed_threads
from nextblock.pipelines import ClassToImagePipeline
from nextblock.sample import image_seed, main

ARGUMENTS = "--num_images_per_label 3 --batch_size 7 --seed 5 --cpu true".split()


@pytest.fixture(scope="module")
def draw_indices(digits_pipeline_dir):
    """Draw eight images of each of eight classes in requests of some size; return their indices (64, L)."""
    pipe = ClassToImagePipeline.from_pretrained(digits_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 1.25, "guidance_schedule": "linear"}

    def draw(request_size: int) -> torch.Tensor:
        indices = []
        for start in range(0, 64, request_size):
            request = range(start, start + request_size)
            generator = [torch.Generator().manual_seed(image_seed(0, index)) for index in request]
            labels = [index // 8 for index in request]
            indices += [torch.cat(pipe(labels, generator=generator, output_type="latent", **guidance).images, dim=1)]
        return torch.cat(indices)

    with fixed_threads(1):
        yield draw


@pytest.fixture(scope="module")
def indices(draw_indices):
    """The indices of one request for all images."""
    return draw_indices(64)


def test_the_images_differ_and_use_many_codes(indices):
    assert indices.shape == (64, 1 + 4 + 16 + 64) and len(indices.unique(dim=0)) == 64
    assert len(indices.unique()) > 100


@pytest.mark.parametrize("request_size", [1, 8])
def test_the_indices_do_not_depend_on_the_request(draw_indices, indices, request_size):
    assert torch.equal(draw_indices(request_size), indices)


def test_two_processes_draw_what_one_draws(digits_pipeline_dir, ten_class_pipeline_dir, indices, tmp_path, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    arguments = ["--pipeline", str(ten_class_pipeline_dir), "--output_dir", "out", *ARGUMENTS]
    script = str(Path(__file__).with_name("sample_on_two.py"))
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [sys.executable, script, port, str(digits_pipeline_dir), str(tmp_path), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path / "two",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 images, 30 of them drawn now by 2 processes\n") == 1
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"indices-{rank}.npy"), indices[rank::2])

    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    main(arguments)
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["config.yaml", "images.npz", "job.json", "samples.png"]
    for name in names:
        assert (Path("out") / name).read_bytes() == (tmp_path / "two" / "out" / name).read_bytes(), name
