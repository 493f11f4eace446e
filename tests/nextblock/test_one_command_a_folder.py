"""No command works in a folder in which another one is at work."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextblock.__main__ import main
from nextblock.files.claim import LOCK_NAME, claimed

SHORT = ["--loop.num_steps", "2", "--loop.tracker", "null"]


@pytest.fixture
def commands(
    tokenizer_arguments, prior_arguments, tokenize_arguments, tokens_dir, tokenizer_dir, image_folder, tmp_path
) -> dict[str, list[str]]:
    """Every command that has a folder of its own, without its name."""
    tokenizer, images = str(tokenizer_dir), ["--data.source", "folder", "--data.path", str(image_folder)]
    weights = str(tokenizer_dir / "model.safetensors")
    return {
        "init": [str(image_folder)],
        "train-tokenizer": [*tokenizer_arguments, *SHORT],
        "evaluate-tokenizer": ["--tokenizer", tokenizer, *images],
        "tokenize": tokenize_arguments,
        "detokenize": ["--tokenizer", tokenizer, "--tokens", str(tokens_dir)],
        "train-prior": [*prior_arguments, *SHORT, "--pipeline_dir", str(tmp_path / "pipeline")],
        "export": ["--checkpoint", str(tmp_path)],
        "sample": ["--pipeline", str(tmp_path)],
        "evaluate": ["--pipeline", str(tmp_path), "--samples", str(tmp_path), *images],
        "convert tokenizer": ["--format", "var", "--checkpoint", weights, "--scales", "1,2,4"],
        "convert prior": ["--format", "var", "--checkpoint", weights, "--scales", "1,2,4"],
    }


def hold(folder: Path, ready, done) -> None:
    with claimed(folder):
        ready.set()
        done.wait(60)


@pytest.fixture
def busy(tmp_path):
    """A folder that another process works in, and its number."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "busy", ready, done))
    other.start()
    assert ready.wait(60)
    yield tmp_path / "busy", other.pid
    done.set()
    other.join()


def test_a_command_is_refused_the_folder_of_another(commands, busy, tmp_path, capsys, fresh_accelerate):
    folder, pid = busy
    for name, arguments in commands.items():
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), *arguments, "--output_dir", str(folder)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"output_dir {folder} is in use by process {pid} on " in error, (name, error)
        assert sorted(os.listdir(tmp_path)) == ["busy"] and os.listdir(folder) == [LOCK_NAME], name
    with pytest.raises(SystemExit):
        folders = ["--output_dir", str(tmp_path / "new"), "--pipeline_dir", str(folder)]
        main(["train-prior", *commands["train-prior"][:-2], *folders])
    assert f"pipeline_dir {folder} is in use by process {pid} on " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["busy"]


@pytest.mark.slow
def test_of_two_trainings_that_start_in_one_instant_one_trains(commands, tmp_path):
    arguments = [*commands["train-tokenizer"], "--loop.num_steps", "200"]
    for number in range(2):
        folder = tmp_path / str(number)
        command = [sys.executable, "-m", "nextblock", "train-tokenizer", *arguments, "--output_dir", str(folder)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options) for _ in range(2)]
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert sorted(process.returncode for process in started) == [0, 2], outputs
        first, second = (outputs[index] for index in sorted((0, 1), key=lambda index: started[index].returncode))
        assert "finished in" in first and f"output_dir {folder} is in use by process " in second
        assert "Traceback" not in second and not (folder / LOCK_NAME).exists()
