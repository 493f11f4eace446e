"""README's promises: its Python runs as pasted, its commands and options exist, its versions are the package's."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from nextblock import __main__ as cli
from nextblock import conversion, init_configs, report
from nextblock.command_line import parse_run_config
from nextblock.commands import COMMANDS
from nextblock.data.digits import CLASS_NAMES
from nextblock.pipelines import ClassToImagePipeline
from nextblock.prior import BlockPrior, BlockPriorConfig
from nextblock.tokenizer import VQVAE, VQVAEConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lines of indented blocks and what is set in backticks, with broken lines joined.
COMMAND_LINES = [
    line.strip().partition("  #")[0]
    for line in re.sub(r" *\\\n *", " ", README).splitlines()
    if re.match(r"    (nextblock|accelerate launch .*-m nextblock) ", line)
]
COMMAND_LINES += [span for span in re.findall(r"`([^`\n]+)`", README) if re.match("nextblock .+--", span)]
# Of accelerate's launcher and of pip.
FOREIGN_OPTIONS = {"--config_file", "--num_processes", "--machine_rank", "--help"}


class StoppedError(BaseException):
    """Ends a command before its work."""


@pytest.fixture
def stopped_commands(monkeypatch):
    """Let every command end once it has read its options."""

    def parse(*args, **kwargs):
        raise StoppedError(parse_run_config(*args, **kwargs))

    def stop(*args):
        raise StoppedError

    monkeypatch.setattr(conversion, "parse_run_config", parse)
    monkeypatch.setattr(report, "write_report", stop)
    monkeypatch.setattr(init_configs, "look_at", stop)
    for command in COMMANDS.values():
        module = import_module(f"nextblock.{command.module}")
        if hasattr(module, "parse_run_config"):
            monkeypatch.setattr(module, "parse_run_config", parse)


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A folder in which the quickstart has been run, with models as small as can be."""
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(image_size=32, hidden_dim=4, embedding_dim=4, layout="scales", scales=[1, 2, 8]))
    sizes = {"embedding_dim": 4, "num_classes": 10, "class_names": list(CLASS_NAMES)}
    sizes |= {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    prior = BlockPrior(BlockPriorConfig(layout=tokenizer.layout.to_dict(), **sizes))
    pipe = ClassToImagePipeline(tokenizer=tokenizer, prior=prior, sampling={"guidance_scale": 1.25})
    pipe.save_pretrained(tmp_path / "out" / "quickstart" / "pipeline")
    monkeypatch.chdir(tmp_path)


def test_python_runs_as_pasted_from_top_to_bottom(quickstart):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 5
    assert len(names["images"]) == 2 and names["idx_Bl"][0].shape == (2, 1)


def test_there_are_commands():
    assert len(COMMAND_LINES) > 10


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_parse(line, stopped_commands, capsys):
    words = shlex.split(line)
    words = words[words.index("nextblock") + 1 :]
    if words[0] == "COMMAND":
        return
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    if "…" in words:
        with pytest.raises(SystemExit) as end:
            cli.main([*name.split(), "--help"])
        assert end.value.code == 0
        options = set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.MULTILINE))
        assert {word for word in words if word.startswith("--")} <= options
        return
    if "--help" in words:
        return
    with pytest.raises(StoppedError):
        cli.main(words)


def test_options_that_are_named_exist(capsys):
    options = set()
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*name.split(), "--help"])
        options |= set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    named = {option for span in re.findall(r"`([^`\n]+)`", README) for option in re.findall(r"--[\w.]+", span)}
    assert {option.rstrip(".") for option in named} - FOREIGN_OPTIONS <= options | {"--data"}
    assert len(named) > 10


def test_modules_and_files_that_are_named_exist():
    for dotted in re.findall(r"`(nextblock(?:\.\w+)+)(?:\(\))?`", README):
        module, _, name = dotted.rpartition(".")
        try:
            import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), name), dotted
    folders = "tokenizer|prior|pipelines|data|training|evaluation|configs|tests|benchmarks|docs|files|nextblock"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+\.\w+)`", README):
        assert list(ROOT.glob(path)), path


def test_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join(README.split())
    for package in ("torch", "transformers"):
        (requirement,) = [line for line in project["dependencies"] if re.match(rf"{package}\W", line)]
        lowest, below = re.search(rf"{package} ([\d.]+) and newer, below (\d+)", text).groups()
        assert requirement == f"{package}>={lowest},<{below}"
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in text
    assert project["license"] == "Apache-2.0" and README.rstrip().endswith("Apache-2.0.")
