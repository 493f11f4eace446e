"""The console script: which commands there are, what their helps say, that their examples are true."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nextblock import __main__ as cli
from nextblock import conversion, init_configs, report
from nextblock.command_line import parse_run_config
from nextblock.commands import COMMANDS

ROOT = Path(__file__).parents[2]


class StoppedError(Exception):
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
    assert options
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
    monkeypatch.setattr(init_configs, "look_at", lambda images: write_report(images, None))
    if hasattr(module, "parse_run_config"):
        monkeypatch.setattr(module, "parse_run_config", parse)
    words = shlex.split(COMMANDS[name].example)
    with pytest.raises(StoppedError) as caught:
        cli.main([*name.split(), *words])
    (config,) = caught.value.args
    given = dict(zip(words[::2], words[1::2], strict=True)) if name not in ("report", "init", "convert prior") else {}
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


@pytest.mark.parametrize("start", [["nextblock"], [sys.executable, "-m", "nextblock"]])
@pytest.mark.parametrize("folder", [ROOT, ROOT / "nextblock", ROOT.parent])
def test_the_command_line_starts_from_any_folder(start, folder):
    program = [str(Path(sys.executable).parent / "nextblock")] if start == ["nextblock"] else start
    done = subprocess.run([*program, "verify", "--tokens", "nowhere"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("nowhere has no manifest.json")


def test_version(capsys):
    assert re.fullmatch(r"nextblock \d+\.\d+\.\d+\S*\n", output_of(capsys, "--version"))


def test_an_interrupted_command_says_so_without_a_traceback(capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupt)
    assert output_of(capsys, "report", "run", status=130) == "nextblock report: interrupted\n"
