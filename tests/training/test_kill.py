"""Trainings that are killed or signalled, and go on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nextblock.files.atomic import file_sha256

NUM_STEPS = 12
# Two micro-batches a step, dropout; the tokenizer's codebook is a moving average with revival.
HARD = ["--loop.gradient_accumulation_steps", "2", "--loop.num_steps", str(NUM_STEPS), "--loop.tracker", "null"]
TOKENIZER = ["--model.num_res_blocks", "1", "--model.dropout", "0.1", "--model.hidden_dim", "16"]
ADVERSARIAL = "--discriminator.weight 0.5 --discriminator.num_layers 1 --discriminator.base_width 8".split()
ADVERSARIAL += "--discriminator.norm spectral --discriminator.lecam_weight 0.1 --discriminator.start_step 2".split()
STAGES = {
    "tokenizer": TOKENIZER,
    "tokenizer against a discriminator": [*TOKENIZER, *ADVERSARIAL],
    "prior": ["--model.dropout", "0.1", "--model.drop_path", "0.1"],
}
# Three processes share twelve images in micro-batches of two.
THREE = ["--loop.batch_size", "12"]
LATEST = ["--loop.resume_from_checkpoint", "latest"]
KILLED = -signal.SIGKILL


@pytest.fixture
def attempts(tokenizer_arguments, request):
    """Make attempts at a stage's training: `make(stage, num_processes, output_dir, ends, *options)`."""

    def make(stage: str, num_processes: int, output_dir: Path, ends: dict, *options: str) -> dict:
        arguments = list(request.getfixturevalue("prior_arguments") if stage == "prior" else tokenizer_arguments)
        folders = ["--output_dir", str(output_dir)]
        if stage == "prior":
            folders += ["--pipeline_dir", str(output_dir / "pipeline")]
        arguments += [*HARD, *STAGES[stage], *folders, *options]
        return {
            "module": f"nextblock.train_{stage.split()[0]}",
            "arguments": [str(argument) for argument in arguments],
            "output_dir": str(output_dir),
            "num_processes": num_processes,
            "ends": ends,
        }

    return make


def run(*attempts: dict, cwd: Path) -> tuple[list[list[int]], list[list[str]], str]:
    """Make the attempts one after another; return exit codes by attempt and rank, files by attempt, and the log."""
    script = Path(__file__).with_name("killed_training.py")
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(attempts)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = process.communicate(timeout=900)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log
    codes, files = zip(*json.loads(output.splitlines()[-1]), strict=True)
    return list(codes), list(files), log


def state_hashes(run_dir: Path) -> dict[str, str]:
    """Return the hashes of all that the last checkpoint and the export hold, less the options, which name folders."""
    manifest = json.loads((run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}" / "checkpoint.json").read_text())
    del manifest["sha256"]["config.yaml"]
    exported = {str(path.relative_to(run_dir)): file_sha256(path) for path in run_dir.glob("**/model.safetensors")}
    return manifest["sha256"] | {name: value for name, value in exported.items() if "checkpoints" not in name}


def outcomes(run_dir: Path) -> list[str | None]:
    return [start["outcome"] for start in json.loads((run_dir / "run.json").read_text())["starts"]]


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(attempts, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    codes, files, log = run(
        attempts("tokenizer", 1, whole, {}),
        attempts("tokenizer", 1, killed, {"0": ["SIGKILL", 8, 0.0]}),
        attempts("tokenizer", 1, killed, {}, *LATEST),
        cwd=tmp_path,
    )
    assert codes == [[0], [KILLED], [0]], log
    assert "checkpoints/step_00000006" in files[1] and "model.safetensors" not in files[1]
    assert "resuming from" in log and "at step 6" in log
    assert state_hashes(killed) == state_hashes(whole)
    assert outcomes(killed) == [None, "finished"]


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(attempts, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    codes, files, log = run(
        attempts("tokenizer", 2, whole, {}),
        attempts("tokenizer", 2, stopped, {"1": ["SIGTERM", 4, 0.0]}),
        attempts("tokenizer", 2, stopped, {"0": ["SIGINT", 7, 0.0], "1": ["SIGINT", 7, 0.0]}, *LATEST),
        attempts("tokenizer", 2, stopped, {}, *LATEST),
        cwd=tmp_path,
    )
    assert codes == [[0, 0]] * 4, log
    for name, step in (("SIGTERM", 5), ("SIGINT", 8)):
        assert f"stopped by {name} after step {step} of {NUM_STEPS}, which is saved" in log
    assert [name for name in files[2] if "step_" in name] == [f"checkpoints/step_0000000{step}" for step in (6, 8)]
    assert ["model.safetensors" in names for names in files] == [True, False, False, True]
    assert state_hashes(stopped) == state_hashes(whole)
    assert outcomes(stopped) == ["stopped by SIGTERM", "stopped by SIGINT", "finished"]


@pytest.mark.slow
def test_three_processes_go_on_summing_in_the_same_order(attempts, tmp_path):
    stage, whole, killed = "tokenizer against a discriminator", tmp_path / "whole", tmp_path / "killed"
    codes, _, log = run(
        attempts(stage, 3, whole, {}, *THREE),
        attempts(stage, 3, killed, {"1": ["SIGKILL", 7, 0.0]}, *THREE),
        attempts(stage, 3, killed, {}, *THREE, *LATEST),
        cwd=tmp_path,
    )
    assert codes[0] == codes[2] == [0, 0, 0] and KILLED in codes[1], log
    assert "at step 6" in log
    assert state_hashes(killed) == state_hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_processes_killed_five_times_end_with_the_weights_of_undisturbed_ones(
    stage, num_processes, attempts, tmp_path
):
    seed = random.SystemRandom().randrange(2**32)
    print(f"random.Random({seed})")  # noqa: T201 - shown when the test fails
    draw = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = THREE if num_processes == 3 else []
    todo, saved = [attempts(stage, num_processes, whole, {}, *options)], 0
    for number in range(5):
        # Not beyond the last step but one, so that every attempt is killed before it has finished.
        step = draw.randrange(saved, NUM_STEPS - 2)
        ends = {str(draw.randrange(num_processes)): ["SIGKILL", step, draw.choice([0.0, draw.uniform(0, 0.03)])]}
        todo.append(attempts(stage, num_processes, killed, ends, *options, *(LATEST if number else [])))
        # What is saved after such an attempt at the latest.
        saved = max(saved, step // 3 * 3)
    todo.append(attempts(stage, num_processes, killed, {}, *options, *LATEST))
    codes, _, log = run(*todo, cwd=tmp_path)
    assert codes[0] == codes[-1] == [0] * num_processes, log
    assert all(KILLED in ranks for ranks in codes[1:-1]), (seed, codes, log)
    assert state_hashes(killed) == state_hashes(whole), seed
