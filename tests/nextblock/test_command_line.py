"""Run configs: where values come from, what is refused and with which message, and the way back to YAML."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import PreTrainedConfig

from nextblock import command_line as config_module
from nextblock.command_line import parse_run_config
from nextblock.training.run_config import options_dataclass, save_run_config

COMMAND = "toy"


class ToyConfig(PreTrainedConfig):
    """Configuration of a toy.

    Args:
        image_size: Height and width in pixels,
            or one number for both.
        hidden_dim (`int`, *optional*): Channels of the hidden layers.
    """

    model_type = "toy"

    def __init__(
        self,
        image_size: int | list[int] = 32,
        hidden_dim: int = 16,
        kind: Literal["simple", "vqgan"] = "simple",
        scales: list[int] = [1, 2],  # noqa: B006
        tile: list[int] | None = None,
        beta: float = 0.25,
        is_shared: bool = False,
        num_classes: int = 0,
        **kwargs,
    ):
        self.image_size = image_size
        self.hidden_dim = hidden_dim
        self.kind = kind
        self.scales = scales
        self.tile = tile
        self.beta = beta
        self.is_shared = is_shared
        self.num_classes = num_classes
        super().__init__(**kwargs)


ToyOptions = options_dataclass(ToyConfig, exclude=["num_classes"])


@dataclass(kw_only=True)
class ToyOptimizer:
    """Optimizer of a toy."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(kw_only=True)
class ToyRun:
    """Trains a toy."""

    output_dir: str
    """Folder to write to."""
    model: ToyOptions = field(default_factory=ToyOptions)
    """The model."""
    optimizer: ToyOptimizer = field(default_factory=ToyOptimizer)
    """The optimizer."""
    seed: int | None = 0
    """Seed of the run."""
    num_steps: int = 10
    """Number of steps."""

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package of configs with one file, toy/small."""
    folder = tmp_path / "shipped" / "toy"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text("output_dir: out\nmodel:\n  hidden_dim: 4\n")
    (folder / "notes.txt").write_text("no config\n")
    monkeypatch.setattr(config_module.resources, "files", lambda package: folder.parent)


def parse(*argv):
    return parse_run_config(ToyRun, command=COMMAND, argv=argv)


def refusal(capsys, *argv):
    """The message with which argv is refused."""
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err.split("error: ", 1)[1]


def write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_and_nested_options():
    assert parse("--output_dir", "out") == ToyRun(output_dir="out")
    run = parse(
        *("--output_dir", "out", "--model.hidden_dim", "64", "--model.image_size", "[32, 16]"),
        *("--model.tile", "[2, 4]", "--model.kind", "vqgan", "--model.is_shared", "true"),
        *("--optimizer.lr", "1e-4", "--optimizer.betas", "[0.5, 0.9]", "--seed", "null"),
    )
    model = ToyOptions(hidden_dim=64, image_size=[32, 16], tile=[2, 4], kind="vqgan", is_shared=True)
    optimizer = ToyOptimizer(lr=1e-4, betas=(0.5, 0.9))
    assert run == ToyRun(output_dir="out", model=model, optimizer=optimizer, seed=None)


def test_later_values_win(tmp_path):
    first = write(tmp_path / "a.yaml", "output_dir: a\nnum_steps: 3\nmodel: {tile: [2, 2], beta: 1}\n")
    second = write(tmp_path / "b.yaml", "num_steps: 4\nmodel: {tile: null}\noptimizer: {lr: 1e-4}\n")
    run = parse("--config", first, "--config", second, "--optimizer.lr", "2e-4")
    assert (run.output_dir, run.num_steps, run.optimizer.lr) == ("a", 4, 2e-4)
    assert run.model == ToyOptions(tile=None, beta=1.0)
    assert parse("--num_steps", "5", "--config", first).num_steps == 3


def test_shipped_name(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = parse("--config", "toy/small", "--num_steps", "2")
    assert (run.output_dir, run.model.hidden_dim, run.num_steps) == ("out", 4, 2)


def test_file_wins_over_shipped_name(shipped, tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    write(tmp_path / "toy" / "small", "output_dir: mine\n")
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "toy/small").output_dir == "mine"


def test_what_a_command_writes_is_a_config_and_a_pipe_of_any_other_name_is_none(shipped, tmp_path, capsys):
    reader, writer = os.pipe()
    os.write(writer, b"output_dir: piped\nnum_steps: 7\n")
    os.close(writer)
    run = parse("--config", f"/dev/fd/{reader}", "--num_steps", "8")
    os.close(reader)
    assert (run.output_dir, run.num_steps) == ("piped", 8)
    os.mkfifo(tmp_path / "pipe.yaml")
    for words in (["--model", str(tmp_path / "pipe.yaml")], [f"--optimizer={tmp_path / 'pipe.yaml'}"]):
        assert "pipe.yaml is a pipe; expected a file" in refusal(capsys, "--output_dir", "out", *words)
    for name in (str(tmp_path / "pipe.yaml"), "/dev/zero", str(tmp_path)):
        assert "is neither a file nor a shipped config" in refusal(capsys, "--config", name)


def test_a_config_of_a_few_lines_that_means_millions_of_values_is_refused(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "values by its aliases" in refusal(capsys, "--config", write(tmp_path / "a.yaml", "\n".join(lines)))
    assert "what it lies in" in refusal(capsys, "--config", write(tmp_path / "b.yaml", "model: &a {beta: *a}"))
    with open(tmp_path / "c.yaml", "wb") as file:
        file.truncate(1 << 40)
    assert "has 1099511627776 bytes" in refusal(capsys, "--config", str(tmp_path / "c.yaml"))
    (tmp_path / "d.yaml").write_bytes(b"\x80\x00\xff")
    assert "no text in UTF-8" in refusal(capsys, "--config", str(tmp_path / "d.yaml"))


@pytest.mark.parametrize("name", ["toy/large", "toy", "toy/notes", "../toy/small", "{num_steps: 3}"])
def test_unknown_config_lists_shipped_names(name, shipped, capsys):
    message = refusal(capsys, "--config", name)
    assert message == f"--config: {name!r} is neither a file nor a shipped config (toy/small)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: output_dir"),
        (["--output_dir", "out", "--modle.beta", "1"], "unrecognized arguments: --modle.beta 1; did you mean --model"),
        (["--output_dir", "out", "--num_step", "1"], "unrecognized arguments: --num_step 1; did you mean --num_steps?"),
        (["--output_dir", "out", "--lr", "1"], "unrecognized arguments: --lr 1; did you mean --optimizer.lr?"),
        (["--output_dir", "out", "--model.dtype", "float16"], "unrecognized arguments: --model.dtype"),
        (["--output_dir", "out", "--model.num_classes", "3"], "unrecognized arguments: --model.num_classes"),
        (["--output_dir", "out", "--model.hidden_dim", "1.5"], 'Parser key "model.hidden_dim":'),
        (["--output_dir", "out", "--model.kind", "gan"], 'Parser key "model.kind":'),
        (["--output_dir", "out", "--model.tile", "[a]"], 'Parser key "model.tile":'),
        (["--output_dir", "out", "--num_steps", "null"], 'Parser key "num_steps":'),
        (["--output_dir", "out", "--num_steps", "0"], "num_steps must be at least 1, got 0"),
        (["--output_dir", "out", "--optimizer.lr", "-1"], "lr must be positive, got -1.0"),
    ],
)
def test_bad_options_are_refused(argv, message, capsys):
    assert refusal(capsys, *argv).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: out\nstpes: 1\n", "Option 'stpes' is not accepted"),
        ("output_dir: out\nmodel: {foo: 1}\n", "Group 'model' does not accept option 'foo'"),
        ("output_dir: out\nnum_steps: true\n", 'Parser key "num_steps":'),
        ("output_dir: out\nnum_steps:\n", 'Parser key "num_steps":\n  Expected a value, got null'),
        ("output_dir: out\nmodel: {beta: }\n", 'Parser key "model.beta":\n  Expected a value, got null'),
        ("output_dir: out\nmodel:\n", 'Parser key "model":\n  Expected a value, got null'),
        ("output_dir: out\noptimizer: {lr: 0}\n", "lr must be positive, got 0.0"),
        ("- 1\n", "expected names with values"),
        ("output_dir: [1\n", "expected ',' or ']'"),
    ],
)
def test_bad_files_are_refused(text, message, tmp_path, capsys):
    path = write(tmp_path / "bad.yaml", text)
    assert message in refusal(capsys, "--config", path)


def test_help_shows_descriptions_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: nextblock {COMMAND} [--config FILE_OR_NAME]")
    assert "Trains a toy." in text
    assert "Folder to write to. (required, type: str)" in text
    assert "Peak learning rate. (type: float, default: 0.001)" in text
    assert "Height and width in pixels, or one number for both. (type: int | list[int], default: 32)" in text
    assert "Channels of the hidden layers. (type: int, default: 16)" in text
    assert "--model.dtype" not in text and "--model.kwargs" not in text
    # Only commands of the console script have one.
    assert "example:" not in text


def test_print_config_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--output_dir", "out", "--model.hidden_dim", "64", "--print_config")
    assert exit_info.value.code == 0
    printed = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert parse("--config", printed) == ToyRun(output_dir="out", model=ToyOptions(hidden_dim=64))


@pytest.mark.parametrize("output_dir", ["out", "1e3", "1.5e3", "12", "null", "on", "2024-01-01", "näh: #x"])
def test_saved_config_reads_back(output_dir, tmp_path):
    model = ToyOptions(image_size=[32, 16], tile=[1, 2], scales=[1, 4])
    run = ToyRun(output_dir=output_dir, model=model, optimizer=ToyOptimizer(lr=1e-5), seed=None)
    save_run_config(run, tmp_path / "run.yaml")
    assert parse("--config", str(tmp_path / "run.yaml")) == run
    assert "\nmodel:\n  image_size:\n  - 32\n  - 16\n" in (tmp_path / "run.yaml").read_text()


def test_options_build_the_model_config():
    assert [f.name for f in dataclasses.fields(ToyOptions)] == [
        *("image_size", "hidden_dim", "kind", "scales", "tile", "beta", "is_shared")
    ]
    options = ToyOptions(hidden_dim=64, tile=[2, 2])
    model_config = ToyConfig(**dataclasses.asdict(options), num_classes=10)
    assert (model_config.hidden_dim, model_config.tile, model_config.num_classes) == (64, [2, 2], 10)
    with pytest.raises(TypeError):
        ToyOptions(64)


def test_mutable_defaults_are_not_shared():
    ToyOptions().scales.append(4)
    assert ToyOptions().scales == [1, 2] and ToyConfig().scales == [1, 2]


def test_options_need_known_names_types_and_defaults():
    class Untyped:
        def __init__(self, width=3, **kwargs): ...

    class Required:
        def __init__(self, width: int, **kwargs): ...

    with pytest.raises(ValueError, match=r"\['depth'\] not among \['width'\] of Untyped"):
        options_dataclass(Untyped, exclude=["depth"])
    for toy in (Untyped, Required):
        with pytest.raises(ValueError, match=f"{toy.__name__}: option 'width' needs a type and a default"):
            options_dataclass(toy)
