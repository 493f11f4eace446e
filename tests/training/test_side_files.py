"""Files that a run keeps for people: damaged ones are named and set aside, and its whole checkpoints are resumed."""

import os
from pathlib import Path

import pytest

from nextblock.data.images import ImageDataConfig
from nextblock.evaluation.training_log import read_starts
from nextblock.training.accelerator import build_accelerator
from nextblock.training.checkpoint import damage
from nextblock.training.loop_config import LoopConfig
from nextblock.training.usable_images import open_training_images

from .test_loop import read_lines, train


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate):
    """Every training chooses its precision anew."""


GARBAGE = (b"", b"\xff\xfe\x00\n", b"null\n", b'{"step": "x", "starts": [3]}\n', b"[" * 100_000 + b"\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "alarms.jsonl", "config.yaml"])
def test_a_damaged_file_beside_the_checkpoints_keeps_none_from_being_resumed(tmp_path, caplog, name):
    options = {"num_steps": 4, "save_every": 2, "eval_every": 2, "num_checkpoints": 2}
    whole = train(tmp_path / "whole", **options)
    wanted = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoints" / "step_00000002")}
    for number, content in enumerate(GARBAGE):
        run = tmp_path / str(number)
        run.mkdir()
        (run / name).write_bytes(content)
        caplog.clear()
        resumed = train(run, **options | wanted)
        assert resumed.losses == whole.losses[2:] and resumed.exported[0][1] == whole.exported[0][1]
        # A line that a crash cut short is none.
        is_damage = name != "config.yaml" and (name == "run.json" or content.endswith(b"\n"))
        assert (run / f"{name}.damaged").exists() == is_damage
        assert (f"{run / name} is damaged" in caplog.text) == is_damage
        if is_damage:
            assert (run / f"{name}.damaged").read_bytes() == content and f"aside as {run / name}.damaged" in caplog.text
        assert [line["step"] for line in read_lines(run) if "eval/bias" in line] == [2, 4]


def test_the_whole_lines_of_a_damaged_log_go_on(tmp_path, caplog):
    options = {"num_steps": 4, "save_every": 2, "eval_every": 1, "log_every": 1}
    train(tmp_path, **options)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" + lines[1] + b"".join(lines[2:]))
    train(tmp_path, resume_from_checkpoint="latest", **options)
    assert "metrics.jsonl is damaged (lines: 2); it is set aside" in caplog.text
    assert path.read_bytes().splitlines(keepends=True) == [lines[0], *lines[2:]]


def test_what_lies_where_folders_belong_makes_room(tmp_path, caplog):
    for name in ("pictures", "pictures.damaged", "logs"):
        (tmp_path / name).write_text("no folder")
    train(tmp_path, num_steps=2, save_every=1, num_checkpoints=2)
    for name in ("metrics.jsonl", "run.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    named = str(tmp_path / "checkpoints" / "step_00000001")
    train(tmp_path, num_steps=2, save_every=1, num_checkpoints=2, resume_from_checkpoint=named)
    assert (tmp_path / "pictures.damaged-2").read_text() == "no folder" and (tmp_path / "pictures").is_dir()
    assert f"{tmp_path / 'logs'} is no folder; it is now {tmp_path / 'logs.damaged'}" in caplog.text
    assert [line["step"] for line in read_lines(tmp_path)] == [2, 2]
    assert all((tmp_path / f"{name}.damaged").is_dir() for name in ("metrics.jsonl", "run.json"))


def test_what_reads_a_damaged_record_names_it(tmp_path):
    for content in (b"{", b"[]", b'{"starts": {}}', b'{"starts": [1]}', b"\xff"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/run.json is damaged"):
            read_starts(tmp_path)


def test_a_damaged_list_of_unreadable_images_is_made_anew(tmp_path, caplog):
    data, run = ImageDataConfig(source="digits", on_error="skip"), tmp_path / "run"
    accelerator = build_accelerator(LoopConfig(cpu=True, tracker=None), run)
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    open_training_images(accelerator, data, "test", output_dir=run, num_workers=1)
    whole = (run / "unreadable.json").read_bytes()
    for number, content in enumerate((b"{", b"[]", b'{"test": {"num_images": 3}}', b'{"test": 3}', b"\xff")):
        (run / "unreadable.json").write_bytes(content)
        open_training_images(accelerator, data, "test", output_dir=run, num_workers=1)
        assert (run / "unreadable.json").read_bytes() == whole
        aside = run / ("unreadable.json.damaged" + f"-{number + 1}" * (number > 0))
        assert aside.read_bytes() == content and f"set aside as {aside}, and all" in caplog.text


@pytest.mark.parametrize("kind", ["file", "pipe", "link"])
def test_what_only_has_the_name_of_a_checkpoint_costs_no_step(tmp_path, kind):
    """Neither what lies where one is to be written, nor where a newer one or a killed save's leftover would."""
    options = {"num_steps": 4, "save_every": 2, "num_checkpoints": 2}
    train(tmp_path, **options | {"num_steps": 2})
    checkpoints, kept = tmp_path / "checkpoints", tmp_path / "kept"
    kept.mkdir()
    for name in ("step_00000004", "step_00000009", ".step_00000004.tmp", ".step_00000008.tmp"):
        make = {"file": Path.touch, "pipe": os.mkfifo, "link": lambda path: path.symlink_to(kept)}[kind]
        make(checkpoints / name)
    (kept / "mine").touch()
    for name in ("step_00000002_mine", "step_best", "step_00000002.zip"):
        (checkpoints / name).mkdir()
    train(tmp_path, resume_from_checkpoint="latest", accepts_changed_options=True, **options)
    names = {"step_00000002", "step_00000004", "step_00000002_mine", "step_best", "step_00000002.zip"}
    assert {path.name for path in checkpoints.iterdir()} == names and damage(checkpoints / "step_00000004") is None
    assert (kept / "mine").exists()


@pytest.mark.parametrize("name", ["checkpoints", "best"])
def test_a_run_that_could_not_save_does_not_begin(tmp_path, name):
    for number, make in enumerate((Path.touch, os.mkfifo, lambda path: path.symlink_to("nowhere"))):
        run = tmp_path / str(number)
        run.mkdir()
        make(run / name)
        with pytest.raises(ValueError, match=f"{name} is no folder; expected one for checkpoints, or nothing"):
            train(run, num_steps=2, save_every=1)


def test_a_log_larger_than_any_is_set_aside_unread(tmp_path):
    train(tmp_path, num_steps=2, save_every=1)
    os.truncate(tmp_path / "metrics.jsonl", 1 << 40)
    train(tmp_path, num_steps=3, save_every=1, resume_from_checkpoint="latest", accepts_changed_options=True)
    assert (tmp_path / "metrics.jsonl.damaged").stat().st_size == 1 << 40
