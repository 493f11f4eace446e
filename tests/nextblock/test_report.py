"""Reports of run directories, and the record of what a run ran on."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from nextblock import __main__ as cli
from nextblock.evaluation.run_page import chosen_pictures, draw_curves, html_page, panels_of
from nextblock.report import main
from nextblock.training.run_record import RunRecord, describe_start, git_state


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of three log lines, two evaluations, four pictures, an alarm and two starts."""
    folder = tmp_path / "digits <1>"
    (folder / "pictures").mkdir(parents=True)
    lines = [
        {"step": step, "train/loss": 1 / step, "train/learning_rate": 1e-3, "train/block_0/loss": 1.0, "train/vq": 0.5}
        for step in (10, 20, 30)
    ]
    lines += [{"step": step, "eval/loss": 0.75, "eval/codebook/usage": 0.5, "time/total": 1.0} for step in (20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, red in ((10, 1), (20, 2), (30, 3), (40, 4)):
        Image.new("RGB", (5, 4), (red, 0, 0)).save(folder / "pictures" / f"samples_of_{step:08d}.png")
    (folder / "config.yaml").write_text("output_dir: a <b>\n")
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 20, "alarm": "step 20: 3 < 4"}) + "\n")
    starts = [{"outcome": "stopped by SIGTERM", "versions": {"torch": "2.13"}}, {"outcome": None, "versions": {}}]
    (folder / "run.json").write_text(json.dumps({"starts": starts}))
    return folder


def test_figures_are_sorted_into_panels():
    blocks = {f"train/block_{k}/loss": 0.0 for k in (0, 2, 10)}
    records = [{"step": 1, "train/vq": 0.0, **blocks, "train/loss": 0.0, "train/discriminator/grad_norm": 0.0}]
    records += [{"step": 1, "eval/loss": 0.0, "eval/vq": 0.0, "time/total": 9.0}]
    assert panels_of(records) == {
        "loss": ["train/loss", "eval/loss"],
        "loss by block": [f"train/block_{k}/loss" for k in (0, 2, 10)],
        "gradient norm": ["train/discriminator/grad_norm"],
        "vq": ["train/vq", "eval/vq"],
    }


def test_curves_show_the_logged_values():
    records = [{"step": step, "train/loss": float(step)} for step in (1, 2)] + [{"step": 2, "eval/loss": 5.0}]
    axes = [ax for ax in draw_curves(records).axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["loss"]
    assert [(line.get_label(), *map(list, line.get_data())) for line in axes[0].lines] == [
        ("train/loss", [1, 2], [1.0, 2.0]),
        ("eval/loss", [2], [5.0]),
    ]


def test_first_middle_and_last_pictures_are_chosen(run_dir):
    chosen = {kind: [path.name[-6:-4] for path in paths] for kind, paths in chosen_pictures(run_dir).items()}
    assert chosen == {"samples_of": ["10", "30", "40"]}
    for step in (20, 30, 40):
        (run_dir / "pictures" / f"samples_of_{step:08d}.png").unlink()
    assert [path.name for path in chosen_pictures(run_dir)["samples_of"]] == ["samples_of_00000010.png"]


def test_the_page_needs_no_other_file(run_dir):
    page = html_page(run_dir)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    assert [picture.getpixel((0, 0))[0] for picture in pictures[1:]] == [1, 3, 4]
    assert "href" not in page and "<script" not in page
    for text in (
        "digits &lt;1&gt;",
        "output_dir: a &lt;b&gt;",
        "step 20: 3 &lt; 4",
        "stopped by SIGTERM",
        "torch 2.13",
        "<td>eval/codebook/usage</td><td>30</td><td>0.5</td>",
        "<figcaption>step 40</figcaption>",
    ):
        assert text in page, text


def test_a_log_alone_is_enough(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "<li>none</li>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_picture_shows_curves_and_last_pictures(run_dir, tmp_path):
    main([str(run_dir), "--output", str(tmp_path / "report.png")])
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1320 and picture.getpixel((0, picture.height - 1)) == (4, 0, 0)


def test_what_cannot_be_reported_is_refused(run_dir, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], "does not exist; expected the output folder of a training"),
        ([str(run_dir), "--output", "report.pdf"], "expected a name that ends in .html or .png"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["report", *arguments])
        assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_a_start_says_what_it_runs_on(fresh_accelerate, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train", "--name", "a b"])
    start = describe_start(Accelerator(cpu=True, mixed_precision="bf16"), first_step=7)
    assert start["command"] == "python -m train --name 'a b'"
    assert (start["first_step"], start["num_processes"], start["mixed_precision"]) == (7, 1, "bf16")
    assert start["num_threads"] == torch.get_num_threads() and start["device"].startswith("cpu")
    assert start["versions"]["torch"] == torch.__version__ and start["ended"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", start["started"])
    json.dumps(start)


def test_git_state_tells_commit_and_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)["is_dirty"]
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_the_record_keeps_every_start(fresh_accelerate, tmp_path):
    accelerator, folder = Accelerator(cpu=True), tmp_path / "run"

    def starts() -> list[tuple]:
        content = json.loads((folder / "run.json").read_text())["starts"]
        return [(s["first_step"], s["last_step"], s["outcome"], s["ended"] is None) for s in content]

    with RunRecord(accelerator, folder, 0) as record:
        assert starts() == [(0, None, None, True)]
        record.last_step = 5
        record.outcome = "stopped by SIGTERM"
    with pytest.raises(KeyError), RunRecord(accelerator, folder, 5) as record:
        record.last_step = 6
        raise KeyError("x")
    assert starts() == [(0, 5, "stopped by SIGTERM", False), (5, 6, "KeyError: 'x'", False)]
    with RunRecord(accelerator, folder, 0):
        pass
    assert starts() == [(0, 0, "finished", False)]
