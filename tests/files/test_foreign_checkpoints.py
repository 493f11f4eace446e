"""Checkpoints of others: tensors come out of their containers, and nothing that a file names is ever called."""

import argparse
import collections
import copyreg
import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from nextblock.files.foreign_checkpoints import part_under, read_foreign, with_averaged, without_groups

STATE = collections.OrderedDict(
    {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.nn.Parameter(torch.ones(2)), "n": torch.tensor([3])}
)
STATE._metadata = {"": {"version": 1}}
formats = pytest.mark.parametrize("is_zipped", [True, False], ids=["zip", "old"])
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*jit", "ignore:.*TorchScript")


class Calling:
    """Pickled, the call of a function that a test's file must not reach."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def assert_held(state):
    assert {name: tensor.tolist() for name, tensor in state.items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in state.values())


def save(content, path, is_zipped, **options):
    torch.save(content, path, _use_new_zipfile_serialization=is_zipped, **options)


@formats
@pytest.mark.parametrize("container", ["state_dict", "model", "module", None])
def test_tensors_come_out_of_their_container(container, is_zipped, tmp_path):
    beside = {"model": {"width": 3}, "state_dict": {}, "epoch": 3, "optimizer": {"s": {}}, "best": torch.tensor(0.5)}
    content = STATE if container is None else beside | {container: STATE}
    save(content, tmp_path / "x.ckpt", is_zipped)
    assert_held(read_foreign(tmp_path / "x.ckpt"))


def test_a_prefix_of_every_name_is_taken_away(tmp_path):
    torch.save({"model": {f"module.{name}": tensor for name, tensor in STATE.items()}}, tmp_path / "x.pt")
    assert_held(read_foreign(tmp_path / "x.pt"))
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "y.pt")
    assert [*read_foreign(tmp_path / "y.pt")] == ["module.a", "b"]


@formats
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_classes_become_stand_ins(is_zipped, protocol, tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.1, names=["x"]),
        "callbacks": {argparse.ArgumentParser: {"best": tmp_path / "best.ckpt"}},
        "counts": collections.Counter("abc"),
        "lists": collections.defaultdict(list, {1: [2]}),
        "many": [1.5, 2**70, b"bytes", frozenset({1}), (None, True), complex(1, 2), range(3)],
        "held": torch.nn.Linear(2, 2).state_dict(),
    }
    save({"state_dict": STATE, **beside}, tmp_path / "x.ckpt", is_zipped, pickle_protocol=protocol)
    assert_held(read_foreign(tmp_path / "x.ckpt"))


def poisons(mark):
    """Return objects whose unpickling would call something, and leave the mark or change this process."""
    return {
        "system": Calling(os.system, f"touch {mark}"),
        "eval": Calling(eval, f"open({str(mark)!r}, 'w')"),
        "open": Calling(open, str(mark), "w"),
        "getattr chain": Calling(getattr, Calling(__import__, "os"), "system"),
        "torch": Calling(torch.load, str(mark)),
        "save": Calling(torch.save, 1, str(mark)),
        "hub": Calling(torch.hub.load, str(mark), "x"),
    }


@formats
@pytest.mark.parametrize("name", ["system", "eval", "open", "getattr chain", "torch", "save", "hub"])
def test_nothing_in_a_file_is_called(name, is_zipped, tmp_path):
    mark = tmp_path / "mark"
    save({"state_dict": STATE, "callbacks": [poisons(mark)[name]]}, tmp_path / "x.ckpt", is_zipped)
    assert_held(read_foreign(tmp_path / "x.ckpt"))
    save({"a.weight": STATE["a.weight"], "b": poisons(mark)[name]}, tmp_path / "y.ckpt", is_zipped)
    with pytest.raises(ValueError, match=r"holds \['b'\], no tensors"):
        read_foreign(tmp_path / "y.ckpt")
    assert not mark.exists()


def written(program: bytes, tmp_path, is_zipped=True):
    """Return a file whose pickle is a program of opcodes."""
    path = tmp_path / "x.ckpt"
    if not is_zipped:
        path.write_bytes(program)
        return path
    save({"a": torch.zeros(1)}, tmp_path / "whole.ckpt", is_zipped=True)
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(path, "w") as poisoned:
        for entry in whole.infolist():
            poisoned.writestr(entry.filename, program if entry.filename.endswith(".pkl") else whole.read(entry))
    return path


def text(value: str) -> bytes:
    """Return the opcode that puts a text onto the stack."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


GLOBALS = {
    # builtins.getattr(builtins.__import__("os"), "system")("touch mark")
    "reduce on reduce": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR"
    + text("system") + b"tR(MARKtR",
    "inst": b"(" + b"MARKios\nsystem\n",
    "obj": b"(cos\nsystem\nMARKo",
    "newobj": b"cos\nsystem\n(MARKt\x81",
    "newobj_ex": b"cos\nsystem\n(MARKt}\x92",
    "build": b"cos\nsystem\n(MARKtR}" + text("__class__") + b"cbuiltins\nlist\nsb",
    "stack global": text("os") + text("system") + b"\x93(MARKtR",
    "dotted": text("os") + text("path.join.__globals__") + b"\x93(MARKtR",
    "module only": b"cnowhere\nat.all\n(MARKtR",
}


@pytest.mark.parametrize("name", GLOBALS)
def test_every_way_of_calling_leads_to_a_stand_in(name, tmp_path):
    mark = tmp_path / "mark"
    program = GLOBALS[name].replace(b"MARK", text(f"touch {mark}"))
    path = written(b"\x80\x04}" + text("evil") + program + b"s.", tmp_path)
    with pytest.raises(ValueError, match=r"holds \['evil'\], no tensors"):
        read_foreign(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        # A state for a function or class of ours, which would change this process.
        b"ctorch.storage\nUntypedStorage\n}" + text("nbytes") + text("x") + b"sb",
        b"ctorch\nFloatStorage\n}" + text("dtype") + text("x") + b"sb",
        b"ctorch.storage\nUntypedStorage\nI1099511627776\n\x85R",
        b"ctorch\nFloatStorage\n(I1\ntR",
        # A tensor over what is no storage, and a call of a number.
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("x") + b"I0\n(I2\nt(I1\nt\x89}tR",
        b"I1\n(I2\ntR",
        b"cos\nsystem\nI1\nR",
        # Numbers for classes that this process knows, and claims of more than is there.
        b"\x82\xf0",
        b"\x83\xf0\x00",
        b"\x84\xf0\x00\x00\x00",
        b"\x8d" + (1 << 60).to_bytes(8, "little"),
        b"\x96" + (1 << 60).to_bytes(8, "little"),
        b"\x8b" + (1 << 30).to_bytes(4, "little"),
        b"\x95" + (1 << 60).to_bytes(8, "little"),
        b"P1\n",
        b"\xff",
    ],
)
@formats
def test_other_programs_are_refused(program, is_zipped, tmp_path):
    copyreg.add_extension("os", "system", 0xF0)
    before = dict(vars(torch.storage.UntypedStorage))
    try:
        path = written(b"\x80\x04}" + text("evil") + program + b"s.", tmp_path, is_zipped)
        with pytest.raises(ValueError, match="cannot be read"):
            read_foreign(path)
        assert not copyreg._extension_cache
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert dict(vars(torch.storage.UntypedStorage)) == before


def test_an_extension_that_was_met_before_is_refused(tmp_path):
    copyreg.add_extension("builtins", "print", 0xF1)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf1.") is print
        path = written(b"\x80\x02}" + text("evil") + b"\x82\xf1(" + text("called") + b"tRs.", tmp_path)
        with pytest.raises(ValueError, match="extension code 241 is none of a checkpoint's"):
            read_foreign(path)
    finally:
        copyreg.remove_extension("builtins", "print", 0xF1)
        copyreg._extension_cache.clear()


def test_archives_that_torch_would_run_or_unpack_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps({"state_dict": {}, "evil": Calling(print, "called")})
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for name in ("script.pt", "old.tar"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            read_foreign(tmp_path / name)


def test_a_file_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as whole, zipfile.ZipFile(tmp_path / "y.pth", "w", 8) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, bytes(1 << 20) if entry.filename.endswith("pkl") else whole.read(entry))
    with pytest.raises(ValueError, match="y.pth' cannot be read.*its parts claim .* bytes, of which"):
        read_foreign(tmp_path / "y.pth")


@formats
def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(is_zipped, tmp_path):
    lying = {"a": torch.zeros(1).expand(1 << 40)}
    for n, content in enumerate([lying, {"state_dict": lying, "args": argparse.Namespace()}]):
        save(content, tmp_path / f"{n}.ckpt", is_zipped)
        with pytest.raises(ValueError, match=r"a claims to be \(1099511627776,\), of which 4 bytes are there"):
            read_foreign(tmp_path / f"{n}.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": STATE, "model": STATE}, r"holds tensors in \['state_dict', 'model'\]"),
        ({"model": {"a": torch.zeros(1)}, "b": torch.ones(1)}, r"holds tensors in \['model'\] and beside them \['b'\]"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, r"holds \['b'\], no tensors"),
        ({"state_dict": {"a": argparse.Namespace()}}, r"holds \['a'\], no tensors"),
        ({"state_dict": {1: torch.zeros(1)}}, r"holds \[1\], no tensors"),
        ({"weights": {"a": torch.zeros(1)}}, r"holds \['weights'\], no tensors"),
        ([torch.zeros(1)], "holds a list; expected tensors by name"),
        (torch.nn.Linear(1, 1), "holds a StandIn; expected tensors by name"),
    ],
)
def test_what_is_no_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        read_foreign(tmp_path / "x.ckpt")


def test_parts_and_groups_go_by_name():
    state = {"loss.a": 1, "lossy": 2, "first.loss.b": 3, "first.c": 4, "blocks.0.attn.mask": 5}
    assert without_groups(state, ["loss.*", "blocks.*.attn.mask"]) == {"lossy": 2, "first.loss.b": 3, "first.c": 4}
    assert part_under(state, "first.") == {"loss.b": 3, "c": 4}


def averaged_state(**changes):
    state = {"a.b": torch.zeros(2), "c": torch.zeros(1), "loss.d": torch.zeros(3)}
    state |= {"model_ema.ab": torch.ones(2), "model_ema.c": torch.ones(1), "model_ema.lossd": torch.ones(3)}
    return state | {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(3)} | changes


def test_averages_take_the_place_of_plain_weights():
    taken = with_averaged(averaged_state(), ["loss.*"])
    assert {name: tensor.tolist() for name, tensor in taken.items()} == {"a.b": [1, 1], "c": [1]}
    plain = with_averaged(averaged_state(), ["loss.*"], are_taken=False)
    assert {name: tensor.tolist() for name, tensor in plain.items()} == {"a.b": [0, 0], "c": [0]}
    assert with_averaged({"a": 1, "loss.b": 2}, ["loss.*"]) == {"a": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"e": torch.zeros(1)}, r"without an average: \['e'\]"),
        ({"model_ema.e": torch.zeros(1)}, r"averages of nothing: \['model_ema.e'\]"),
        ({"model_ema.ab": torch.zeros(3)}, r"averages of another shape: \['a.b'\]"),
        ({"ab": torch.zeros(2)}, r"of one name without dots: \[\['a.b', 'ab'\]\]"),
    ],
)
def test_averages_that_are_not_those_of_the_weights_are_refused(changes, message):
    for are_taken in (True, False):
        with pytest.raises(ValueError, match=message):
            with_averaged(averaged_state(**changes), ["loss.*"], are_taken=are_taken)
