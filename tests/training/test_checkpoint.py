"""Checkpoints: whole or not there, damage of every kind, rotation."""

import hashlib
import json
import logging
import random
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from nextblock.files.atomic import file_sha256
from nextblock.training.checkpoint import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    damage,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from nextblock.training.loop_config import LoopConfig
from nextblock.training.resume import resume

from .poison import rewrite_manifest

FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "average.safetensors", "config.yaml")

OPTIONS = {"config.yaml": "loop: {}\n"}


class Counter:
    """Something that is saved beside models and optimizers."""

    def __init__(self):
        self.value = 0

    def state_dict(self) -> dict:
        return {"value": torch.tensor(self.value), "half": torch.tensor([self.value / 2])}

    def load_state_dict(self, state: dict) -> None:
        self.value = int(state["value"])


class Training:
    """A model, an optimizer and a counter under an accelerator."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        model = nn.Linear(3, 3)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.counter = Counter()
        self.records = {"average": self.counter}

    def save(self, folder: Path, step: int, num_kept: int) -> None:
        save_checkpoint(self.accelerator, folder, step, num_kept, OPTIONS, self.records)

    def load(self, checkpoint: Path) -> int:
        return load_checkpoint(self.accelerator, checkpoint, self.records)

    def step(self) -> float:
        """Take a step that depends on weights, optimizer, counter and all three generators."""
        self.counter.value += 1
        noise = torch.rand(2, 3) + random.random() + np.random.rand() + self.counter.value
        loss = self.model(noise).square().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


@pytest.fixture
def training(fresh_accelerate) -> Training:
    return Training()


@pytest.fixture
def folder(training, tmp_path) -> Path:
    """Checkpoints at steps 1 and 2."""
    for step in (1, 2):
        training.step()
        training.save(tmp_path, step, num_kept=2)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()



def test_loading_restores_weights_optimizer_generators_and_registered_objects(training, folder):
    expected = [training.step() for _ in range(3)]
    assert training.load(folder / "step_00000002") == 2
    assert training.counter.value == 2
    assert [training.step() for _ in range(3)] == expected
    assert training.load(folder / "step_00000001") == 1
    assert [training.step() for _ in range(4)][1:] == expected


def test_a_manifest_lists_every_file(folder):
    manifest = json.loads((folder / "step_00000002" / MANIFEST_NAME).read_text())
    assert (manifest["step"], manifest["num_processes"], manifest["format_version"]) == (2, 1, FORMAT_VERSION)
    assert manifest["nextblock"] == metadata.version("nextblock")
    assert sorted(manifest["sha256"]) == sorted(FILES)
    for name, checksum in manifest["sha256"].items():
        assert file_sha256(folder / "step_00000002" / name) == checksum
    assert damage(folder / "step_00000002") is None


def test_rotation_keeps_the_newest(training, tmp_path):
    for step in range(1, 6):
        training.save(tmp_path, step, num_kept=3 if step < 5 else 2)
        if step == 4:
            assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_going_on_from_an_earlier_checkpoint_drops_the_later_ones(training, tmp_path):
    for step in (10, 20, 30):
        training.save(tmp_path, step, num_kept=3)
    training.load(tmp_path / "step_00000010")
    training.save(tmp_path, 15, num_kept=1)
    assert names(tmp_path) == ["step_00000015"]


def test_a_crash_while_saving_leaves_the_checkpoints_before(training, folder, monkeypatch):
    save_state = Accelerator.save_state

    def crash(self, output_dir):
        save_state(self, output_dir)
        (Path(output_dir) / "optimizer.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", crash)
        with pytest.raises(KeyboardInterrupt):
            training.save(folder, 3, num_kept=2)
    assert find_checkpoint(folder, "latest") == folder / "step_00000002"
    assert damage(folder / "step_00000001") is None
    training.save(folder, 4, num_kept=2)
    assert names(folder) == ["step_00000002", "step_00000004"]
    assert damage(folder / "step_00000004") is None


def test_saving_a_step_again_replaces_it(training, folder):
    training.step()
    training.save(folder, 2, num_kept=2)
    training.counter.value = 0
    training.load(folder / "step_00000002")
    assert training.counter.value == 3 and names(folder) == ["step_00000001", "step_00000002"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_byte, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(folder, name, harm, caplog):
    harm(folder / "step_00000002" / name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder, "latest") == folder / "step_00000001"
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "step_00000002 is damaged" in message and name in message
    with pytest.raises(ValueError, match=f"resume_from_checkpoint is .*step_00000002, which cannot be used: {name}"):
        find_checkpoint(folder, str(folder / "step_00000002"))
    harm(folder / "step_00000001" / name)
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        find_checkpoint(folder, "latest")


def test_no_byte_of_the_manifest_can_change_unnoticed(folder):
    path = folder / "step_00000002" / MANIFEST_NAME
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        if bytes(changed).split() == content.split():
            continue  # One kind of white space became another.
        path.write_bytes(changed)
        assert damage(path.parent) is not None, changed[max(position - 20, 0) : position + 20]
    for other in ("[]", "null", '"text"', "{}", '{"own_sha256": null}'):
        path.write_text(other)
        assert "unreadable" in damage(path.parent) or "has changed" in damage(path.parent)


@pytest.mark.parametrize(
    "changed",
    [{"step": "2"}, {"step": True}, {"step": None}, {"num_processes": -1}, {"sha256": ["a"]}, {"sha256": None}],
)
def test_a_manifest_that_is_whole_and_none_is_damage(folder, changed):
    rewrite_manifest(folder / "step_00000002", **changed)
    assert find_checkpoint(folder, "latest") == folder / "step_00000001"
    rewrite_manifest(folder / "step_00000001", next(iter(changed)))
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        find_checkpoint(folder, "latest")


REMEDY = r"Finish that training with the version that wrote it, or start another one.*--loop.init_from FOLDER"


def test_a_checkpoint_of_another_format_is_refused_with_its_writer_and_a_way_on(folder):
    newest = folder / "step_00000002"
    for changed, said in (
        ({"format_version": 9, "nextblock": "7.1"}, "was written by nextblock 7.1, in format 9; expected format 3"),
        ({}, "was written by nextblock 0.1.0 or earlier, in format 1; expected format 3"),
    ):
        rewrite_manifest(newest, "format_version", "nextblock", **changed)
        # Not passed over for an older one, as a damaged one is: it is the newest that the user means.
        for wanted in ("latest", str(newest)):
            with pytest.raises(ValueError, match=rf"checkpoint {newest} {said}\. {REMEDY}"):
                find_checkpoint(folder, wanted)
    assert find_checkpoint(folder, str(folder / "step_00000001")) is not None
    # Damage is still told from age.
    flip_a_byte(newest / "optimizer.bin")
    assert find_checkpoint(folder, "latest") == folder / "step_00000001"


def test_an_older_checkpoint_without_its_run_config_is_refused_alike(training, folder):
    newest = folder / "step_00000002"
    (newest / "config.yaml").unlink()
    checksums = json.loads((newest / MANIFEST_NAME).read_text())["sha256"]
    del checksums["config.yaml"]
    rewrite_manifest(newest, "format_version", "nextblock", sha256=checksums)
    with pytest.raises(ValueError, match=f"nextblock 0.1.0 or earlier.*{REMEDY}"):
        resume(training.accelerator, folder, LoopConfig(resume_from_checkpoint="latest"), "loop: {}\n", {})


def test_latest_of_an_empty_folder_is_none_and_a_wrong_path_is_refused(folder, tmp_path):
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None
    assert find_checkpoint(folder, str(folder / "step_00000001")) == folder / "step_00000001"
    for wrong in (folder / "step_00000009", folder, folder / "step_00000001" / "optimizer.bin"):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint is {wrong}, .*{MANIFEST_NAME} is missing"):
            find_checkpoint(folder, str(wrong))


def test_another_number_of_processes_is_refused(training, folder, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="saved by 1 processes; expected the same number to resume it, got 2"):
        training.load(folder / "step_00000002")


def test_a_moved_checkpoint_is_as_good(training, folder, tmp_path):
    moved = shutil.copytree(folder / "step_00000001", tmp_path / "best")
    assert training.load(find_checkpoint(folder, str(moved))) == 1
