"""What a checkpoint's files hold is data: poison in any of them is refused by name and runs nothing."""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import nn

from nextblock.training.average import WeightAverage, saved_average
from nextblock.training.checkpoint import damage, load_checkpoint, save_checkpoint
from nextblock.training.saved_state import _Planner, _Reader

from .poison import Poison, poisons, replace_file

CODE = "is not a pickle of tensors and numbers alone; others may run code and are refused"


class Training:
    """A model with its average, and an optimizer, under an accelerator."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        model = nn.Linear(3, 3)
        self.average = WeightAverage(model, 0.9)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        for _ in range(2):
            self.model(torch.rand(2, 3)).sum().backward()
            self.optimizer.step()
            self.average.update(model, torch.tensor(True))

    def save(self, folder: Path) -> Path:
        save_checkpoint(self.accelerator, folder, 2, 1, {"config.yaml": "{}"}, {"average": self.average})
        return folder / "step_00000002"

    def load(self, checkpoint: Path) -> int:
        assert damage(checkpoint) is None, "the poison must get past the checksums"
        return load_checkpoint(self.accelerator, checkpoint, {"average": self.average})


@pytest.fixture
def training(fresh_accelerate) -> Training:
    return Training()


@pytest.fixture
def checkpoint(training, tmp_path) -> Path:
    return training.save(tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", ["pickle", "zip", "older"])
def test_the_poison_works(tmp_path, kind):
    content, read = poisons(tmp_path / "trace")[kind], pickle.load if kind == "pickle" else torch.load
    read(io.BytesIO(content), **{} if kind == "pickle" else {"weights_only": False})
    assert (tmp_path / "trace").read_text() == "ran"


@pytest.mark.parametrize("kind", ["pickle", "zip", "older"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "average.safetensors"])
def test_poison_is_refused_by_name_and_runs_nothing(training, checkpoint, tmp_path, name, kind):
    replace_file(checkpoint, name, poisons(tmp_path / "trace")[kind])
    with pytest.raises(ValueError, match=rf"{name}.*({CODE}|cannot be (read|loaded))"):
        training.load(checkpoint)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "average.safetensors"])
def test_what_the_manifest_does_not_miss_is_missed(training, checkpoint, tmp_path, name):
    # Names that accelerate would take instead.
    for other in ("pytorch_model.bin", "random_states_1.pkl"):
        (checkpoint / other).write_bytes(poisons(tmp_path / "trace")["zip"])
    replace_file(checkpoint, name, None)
    with pytest.raises(ValueError, match=rf"{checkpoint}.*{name}"):
        training.load(checkpoint)
    assert not (tmp_path / "trace").exists()


def test_files_that_are_not_ours_are_not_opened(training, checkpoint, tmp_path):
    for name in ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "scaler.pt", "scheduler.bin", "sampler.bin",
                 "dl_state_dict.bin", "pytorch_model.bin", "optimizer_1.bin", "average.pkl"):  # fmt: skip
        (checkpoint / name).write_bytes(poisons(tmp_path / "trace")["pickle"])
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(poisons(tmp_path / "trace")["pickle"])
    assert training.load(checkpoint) == 2
    assert not (tmp_path / "trace").exists()


def without(states: dict, name: str) -> dict:
    return {key: value for key, value in states.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda states: without(states, "random_state"),
        lambda states: without(states, "torch_manual_seed"),
        lambda states: states | {"numpy_random_seed": ("MT19937", 3)},
        lambda states: states | {"torch_manual_seed": states["torch_manual_seed"][:100]},
        lambda states: [states],
    ],
)
def test_random_states_that_cannot_be_loaded_are_an_error(training, checkpoint, change):
    states = torch.load(checkpoint / "random_states_0.pkl", weights_only=False)
    content = io.BytesIO()
    torch.save(change(states), content)
    replace_file(checkpoint, "random_states_0.pkl", content.getvalue())
    with pytest.raises(ValueError, match="random_states_0.pkl cannot be loaded"):
        training.load(checkpoint)


def test_all_generators_go_on_where_they_were(training, checkpoint):
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    expected = draw()
    draw()
    training.load(checkpoint)
    assert draw() == expected


def test_an_average_comes_back_bit_for_bit(training, checkpoint):
    before = {name: tensor.clone() for name, tensor in training.average.state_dict().items()}
    training.average.update(nn.Linear(3, 3), torch.tensor(True))
    training.load(checkpoint)
    after = training.average.state_dict()
    assert training.average.num_updates == 2 and after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert saved_average(checkpoint).keys() == {"weight", "bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "module.bias"), "missing: module.bias"),
        (lambda state: without(state, "num_updates"), "missing: num_updates"),
        (lambda state: state | {"module.more": torch.zeros(1)}, "unexpected: module.more"),
        (lambda state: state | {"module.bias": torch.zeros(4)}, r"other: module.bias \(\(4,\), torch.float32\), expec"),
        (lambda state: state | {"module.bias": torch.zeros(3, dtype=torch.int64)}, "other: module.bias"),
        (lambda state: state | {"module.bias": torch.tensor([0, torch.nan, 0])}, "not finite: module.bias"),
        (lambda state: state | {"module.bias": torch.tensor([0, torch.inf, 0])}, "not finite: module.bias"),
    ],
)
def test_an_average_of_something_else_is_refused(training, checkpoint, change, message):
    replace_file(checkpoint, "average.safetensors", save(change(load_file(checkpoint / "average.safetensors"))))
    with pytest.raises(ValueError, match=rf"average.safetensors does not hold the tensors expected:\n  {message}"):
        training.load(checkpoint)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """What a sharded training saves, written by one process."""
    state = {"model": {"weight": torch.arange(4.0)}, "groups": {"lr": 0.5, "betas": (0.9, 0.95), "names": ["a"]}}
    dist_cp.save(state, storage_writer=dist_cp.FileSystemWriter(tmp_path / "sharded"), no_dist=True)
    return tmp_path / "sharded"


def load_sharded(folder: Path) -> dict:
    state = {"model": {"weight": torch.zeros(4)}, "groups": {"lr": 0.0, "betas": None, "names": None}}
    dist_cp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    return state


def test_a_sharded_state_is_read_as_data(sharded):
    state = load_sharded(sharded)
    assert state["model"]["weight"].tolist() == [0, 1, 2, 3]
    assert state["groups"] == {"lr": 0.5, "betas": (0.9, 0.95), "names": ["a"]}


def test_poison_in_a_sharded_state_runs_nothing(sharded, tmp_path):
    trace = tmp_path / "trace"
    description = (sharded / ".metadata").read_bytes()
    (sharded / ".metadata").write_bytes(pickle.dumps(Poison(trace)))
    with pytest.raises(BaseException, match="it names pathlib.Path.write_text"):
        load_sharded(sharded)
    (sharded / ".metadata").write_bytes(description)
    metadata = pickle.loads(description)
    (place,) = [info for index, info in metadata.storage_data.items() if index.fqn == "groups.lr"]
    content = io.BytesIO()
    torch.save(Poison(trace), content)
    (sharded / "poison").write_bytes(content.getvalue())
    place.relative_path, place.offset, place.length = "poison", 0, len(content.getvalue())
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match="Weights only load failed"):
        load_sharded(sharded)
    assert not trace.exists()
