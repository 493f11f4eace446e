"""The console script: which commands there are, what their helps say, that their examples are true."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from nextblock import __main__ as cli
from nextblock import conversion, init_configs, report, show_config
from nextblock.command_line import parse_run_config
from nextblock.commands import COMMANDS
from nextblock.training.guards import NonFiniteError

ROOT = Path(__file__).parents[2]


class StoppedError(BaseException):
    """Ends an entry point before its work, and carries the options that it has read."""


def output_of(capsys, *argv: str, status: int = 0) -> str:
    """What a command line prints, to the one stream or the other."""
    try:
        cli.main(list(argv))
        ended = 0
    except SystemExit as end:
        ended = end.code
    assert ended == status
    out, err = capsys.readouterr()
    assert bool(out) != bool(err)
    return out or err


def test_every_command_is_a_module_and_every_module_with_a_main_a_command():
    modules = {path.stem for path in (ROOT / "nextblock").glob("*.py") if "def main(" in path.read_text()}
    assert {command.module for command in COMMANDS.values()} == modules - {"__main__"}


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_passed_on(name, monkeypatch):
    received = []
    monkeypatch.setattr(import_module(f"nextblock.{COMMANDS[name].module}"), "main", received.append)
    cli.main([*name.split(), "--first", "tokenize", "--help"])
    assert received == [["--first", "tokenize", "--help"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_default_and_ends_with_the_example(name, capsys):
    text = output_of(capsys, *name.split(), "--help")
    assert text.startswith(f"usage: nextblock {name} [")
    assert text.endswith(f"\n\nexample:\n  nextblock {name} {COMMANDS[name].example}\n")
    options = re.split(r"\n  --", text.split("\n\nexample:")[0])[1:]
    assert options or name == "config"
    # A group of options also takes a file, for which there is no default, or has a help of its own.
    others = "config ", "print_config ", "Path to a configuration file", "Show the help for "
    for option in (" ".join(option.split()) for option in options):
        assert "(required" in option or "default: " in option or any(other in option for other in others), option


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_true(name, monkeypatch):
    def parse(*args, **kwargs):
        raise StoppedError(parse_run_config(*args, **kwargs))

    def write_report(run_dir, output):
        raise StoppedError(f"{run_dir} {output}")

    if name == "demo":
        pytest.importorskip("gradio")
    module = import_module(f"nextblock.{COMMANDS[name].module}")
    monkeypatch.setattr(conversion, "parse_run_config", parse)
    monkeypatch.setattr(report, "write_report", write_report)
    monkeypatch.setattr(show_config, "shipped_configs", lambda: write_report(None, None))
    monkeypatch.setattr(init_configs, "look_at", lambda images: write_report(images, None))
    if hasattr(module, "parse_run_config"):
        monkeypatch.setattr(module, "parse_run_config", parse)
    words = shlex.split(COMMANDS[name].example)
    with pytest.raises(StoppedError) as caught:
        cli.main([*name.split(), *words])
    (config,) = caught.value.args
    is_paired = words[0].startswith("--") and name != "convert prior"
    given = dict(zip(words[::2], words[1::2], strict=True)) if is_paired else {}
    for option, value in given.items():
        if option not in ("--config", "--scales"):
            assert getattr(config, option.removeprefix("--")) == value


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments, capsys):
    text = output_of(capsys, *arguments)
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_of_a_group_lists_its_commands(arguments, capsys):
    text = output_of(capsys, "convert", *arguments)
    assert re.findall(r"^  (\w+ \w+) ", text, re.MULTILINE) == ["convert tokenizer", "convert prior"]


@pytest.mark.parametrize(
    ("typed", "named", "nearest"),
    [
        ("trian-prior --config x", "trian-prior", "train-prior"),
        ("Tokenise", "Tokenise", "tokenize"),
        ("sampel", "sampel", "sample"),
        ("convert tokeniser --format var", "convert tokeniser", "convert tokenizer"),
        ("--cpu", "--cpu", None),
    ],
)
def test_an_unknown_command_names_the_nearest(typed, named, nearest, capsys):
    text = output_of(capsys, *typed.split(), status=2)
    assert f"error: {named!r} is no command; did you mean " in text
    assert nearest is None or f"did you mean {nearest!r}?" in text


def test_errors_of_a_command_name_it(capsys):
    text = output_of(capsys, "sample", "--sede", "1", status=2)
    assert text.startswith("usage: nextblock sample [") and "--sede" in text


def test_the_list_of_commands_loads_none_of_them(tmp_path):
    code = "import sys, nextblock.__main__ as cli; cli.main([]); print({'torch', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("start", "folder"),
    [
        (["nextblock"], ROOT.parent),
        ([sys.executable, "-m", "nextblock"], ROOT),
        ([sys.executable, "-m", "nextblock"], ROOT / "nextblock"),
    ],
)
def test_the_command_line_starts_from_any_folder(start, folder):
    program = [str(Path(sys.executable).parent / "nextblock")] if start == ["nextblock"] else start
    done = subprocess.run([*program, "verify", "--tokens", "nowhere"], cwd=folder, capture_output=True, text=True)
    message = "nextblock verify: error: tokens is 'nowhere'; expected a folder of tokens\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_version(capsys):
    assert re.fullmatch(r"nextblock \d+\.\d+\.\d+\S*\n", output_of(capsys, "--version"))


def test_an_interrupted_command_says_so_without_a_traceback(capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupt)
    assert output_of(capsys, "report", "run", status=130) == "nextblock report: interrupted\n"
def fail_with(error, monkeypatch):
    def main(argv):
        raise error

    monkeypatch.setattr(import_module("nextblock.verify"), "main", main)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train-tokenizer --output_dir {new} --data.source folder --data.path nowhere", "path='nowhere' is not a"),
        ("train-tokenizer --output_dir {new}", "no images are given: data.source is missing"),
        ("sample --pipeline {pipeline} --output_dir {new} --class_labels eleven", "'eleven', which names no class"),
        ("sample --pipeline {pipeline} --output_dir {new} --sampling.top_k 999", "top_k is 999; expected"),
        ("detokenize --tokens nowhere --tokenizer {pipeline}/tokenizer --output_dir {new}", "nowhere"),
        ("convert tokenizer --format var --checkpoint nowhere.pth --output_dir {new} --scales 1,2", "nowhere.pth"),
        ("init nowhere --output_dir {new}", "path='nowhere' is not a folder"),
        ("config tokenizer/nothing", "'tokenizer/nothing' is no shipped config"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(typed, message, ten_class_pipeline_dir, tmp_path, capsys):
    new = tmp_path / "new"
    text = output_of(capsys, *typed.format(new=new, pipeline=ten_class_pipeline_dir).split(), status=2)
    name = next(name for name in COMMANDS if typed.startswith(name))
    assert f"nextblock {name}: error: " in text and message in text and "Traceback" not in text
    assert not new.exists()


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    for stumble in (lambda: int("x"), lambda: [1][2], lambda: dict(zip([1], [], strict=True))):
        with pytest.raises((ValueError, IndexError)) as error:
            stumble()
        fail_with(error.value, monkeypatch)
        with pytest.raises(type(error.value)):
            cli.main(["verify"])


def test_work_that_fails_says_so_with_status_1(monkeypatch, capsys):
    fail_with(NonFiniteError("ten steps in a row"), monkeypatch)
    assert output_of(capsys, "verify", status=1) == "nextblock verify: error: ten steps in a row\n"
    fail_with(PermissionError(13, "Permission denied", "out"), monkeypatch)
    assert "Permission denied: 'out'" in output_of(capsys, "verify", status=2)


def test_a_start_that_fails_leaves_no_folder(tokenizer_arguments, tmp_path, capsys, fresh_accelerate):
    def start(*options):
        with pytest.raises(SystemExit) as end:
            cli.main(["train-tokenizer", *tokenizer_arguments, "--output_dir", str(tmp_path / "new"), *options])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "init_from is 'nowhere'" in start("--loop.init_from", "nowhere")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    assert "batch_size is 8; expected a multiple" in start("--loop.gradient_accumulation_steps", "3")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


def test_one_class_needs_no_list(ten_class_pipeline_dir, tmp_path, capsys):
    for typed, labels in (("seven", [7]), ("3", [3]), ("[seven, 3]", [7, 3])):
        folder = tmp_path / "-".join(map(str, labels))
        arguments = ["--pipeline", str(ten_class_pipeline_dir), "--output_dir", str(folder), "--cpu", "true"]
        cli.main(["sample", *arguments, "--num_images_per_label", "1", "--class_labels", typed])
        with np.load(folder / "images.npz") as arrays:
            assert arrays["arr_1"][np.argsort(arrays["index"])].tolist() == labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variables"),
    [("sample", {"PYTHONIOENCODING": "ascii"}), ("train-tokenizer", {"LC_ALL": "C"}), ("train-prior", {"LC_ALL": "C"})],
)
def test_a_terminal_that_knows_ascii_alone_shows_help(variables, name, tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | variables
    command = [sys.executable, "-m", "nextblock", name, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"usage: nextblock" in done.stdout
    assert done.stdout.isascii()


def test_shipped_configs_are_found_by_name(capsys):
    names = output_of(capsys, "config").split()
    assert "accelerate/cpu-2-processes" in names and "tokenizer/digits-scales" in names
    path = Path(output_of(capsys, "config", "accelerate/cpu-2-processes").strip())
    assert path.read_bytes() == (ROOT / "configs" / "accelerate" / "cpu-2-processes.yaml").read_bytes()
