"""The benchmark for GPUs runs, tried out on a CPU with the smallest part of it, and says where there is no GPU."""

import json
import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(monkeypatch, *options: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["gpu.py", *options])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")


def test_it_writes_what_it_measured(monkeypatch, tmp_path):
    output = tmp_path / "gpu.json"
    options = "--device cpu --only search --num_runs 1".split()
    run(monkeypatch, *options, "--output", str(output))
    results = json.loads(output.read_text())
    assert [row["num_channels"] for row in results["search"]] == [8, 32] and "sampling" not in results
    assert results["peak_operations_a_second"].keys() == {"bfloat16", "float32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--output", str(tmp_path / "gpu.json"))
    assert "skipped: torch sees no CUDA GPU here" in capsys.readouterr().out and not list(tmp_path.iterdir())
