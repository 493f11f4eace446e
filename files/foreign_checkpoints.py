"""Checkpoints as other projects write them: containers, foreign classes, joint files, averaged weights.

Nothing in a file is ever executed: where `weights_only=True` refuses it, an unpickler reads it that makes tensors and
plain values, and an inert stand-in of everything else.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from .state_dicts import MAX_LISTED, check_tensors, load_pickled, reading_tensors

# Where trainers put the weights among their own affairs.
_CONTAINERS = ("state_dict", "model", "module")
_WRAPPER = "module."
_AVERAGED = "model_ema."
# What an average keeps beside the weights.
_AVERAGE_COUNTERS = ("decay", "num_updates")


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of another project's checkpoint, out of the container that they may lie in.

    Args:
        path: of a `.safetensors` file, or of a pickle: tensors by name, or a dictionary that holds these as
            `state_dict`, `model` or `module` beside whatever a trainer keeps, objects of foreign classes among it.

    Returns:
        All tensors by the file's names, without a `module.` before all of them, on the CPU.

    Raises:
        ValueError: naming the file, if it is missing, cannot be read, or holds no tensors by name, or several
            containers of them.
    """
    path = Path(path)
    with reading_tensors(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            content = load_pickled(path)
        except pickle.UnpicklingError:
            content = load_pickled(path, weights_only=False, pickle_module=_INERT_PICKLE)
    state = check_tensors(_contained(content, path), path)
    # What training on several GPUs puts before every name.
    wrapper = _WRAPPER if state and all(name.startswith(_WRAPPER) for name in state) else ""
    return {name.removeprefix(wrapper): tensor.detach() for name, tensor in state.items()}


def part_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, by their names without it.

    Args:
        state: tensors by name.
        prefix: with its last dot.
    """
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def without_groups(state: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
    """Drop tensors that have no place in a model, by name.

    Args:
        state: tensors by name.
        patterns: of names, in which `*` stands for anything, such as `loss.*`.

    Returns:
        All others.
    """
    return {
        name: tensor
        for name, tensor in state.items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def has_averaged(names: Sequence[str] | Mapping[str, Tensor]) -> bool:
    """Tell whether there are averaged weights among names."""
    return any(name.startswith(_AVERAGED) for name in names)


def with_averaged(
    state: Mapping[str, Tensor], patterns: Sequence[str] = (), *, are_taken: bool = True
) -> dict[str, Tensor]:
    """Let averaged weights, where a file has them, take the place of the plain ones.

    They are called `model_ema.` and the plain name without its dots; `model_ema.decay` and `.num_updates` are counters.

    Args:
        state: tensors by name, averaged ones among them or not.
        patterns: of plain names that are dropped, and so are their averages; see `without_groups`.
        are_taken: False keeps the plain weights.

    Returns:
        Tensors by their plain names.

    Raises:
        ValueError: naming tensors that have no average, and averages that are of no tensor or of another shape.
    """
    averages = part_under(state, _AVERAGED)
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(_AVERAGED)}
    kept = without_groups(plain, patterns)
    if not averages:
        return kept
    dotless = {}
    for name in plain:
        dotless.setdefault(name.replace(".", ""), []).append(name)
    dropped = [pattern.replace(".", "") for pattern in patterns]
    unknown = sorted(without_groups(averages, dropped).keys() - dotless.keys() - {*_AVERAGE_COUNTERS})
    lost = [name for name in kept if name.replace(".", "") not in averages]
    unclear = [names for names in dotless.values() if len(names) > 1 and kept.keys() & names]
    misshapen = [
        name
        for name in kept
        if name not in lost and averages[name.replace(".", "")].shape != kept[name].shape
    ]
    problems = {
        "without an average": lost,
        "averages of nothing": [_AVERAGED + name for name in unknown],
        "of one name without dots": unclear,
        "averages of another shape": misshapen,
    }
    if any(problems.values()):
        said = "; ".join(f"{kind}: {names[:MAX_LISTED]}" for kind, names in problems.items() if names)
        raise ValueError(f"the checkpoint's averaged weights are not those of its plain ones; {said}")
    return {name: averages[name.replace(".", "")] if are_taken else tensor for name, tensor in kept.items()}


def _contained(content: Any, path: Path) -> Any:
    """Return what a container holds, or what is none as it is."""
    if not isinstance(content, dict):
        return content
    found = [name for name in _CONTAINERS if isinstance(content.get(name), dict)]
    # A trainer may also keep a model's options under such a name.
    found = [name for name in found if any(isinstance(value, Tensor) for value in content[name].values())] or found[:1]
    if not found:
        return content
    # A number, such as the best loss so far, is no weight.
    beside = [name for name, value in content.items() if isinstance(value, Tensor) and value.ndim > 0]
    if len(found) > 1 or beside:
        raise ValueError(
            f"checkpoint {str(path)!r} holds tensors in {found} and beside them {beside[:MAX_LISTED]}; expected them "
            "in one place"
        )
    return content[found[0]]


class StandIn:
    """What stands where a file names a class, a function or what one would have made: a name that does nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<stand-in for {self.name}>"

    def _ignore(self, *args) -> None:
        """Take items that the object would have held."""

    append = extend = add = update = __setitem__ = _ignore


def _made(named: Any, args: Any) -> Any:
    """Return what a name stands for when a file calls it: a tensor, a dictionary, else one more stand-in."""
    if not isinstance(named, StandIn) or not isinstance(args, tuple):
        raise pickle.UnpicklingError(f"a {type(named).__name__} is called; expected a class or function")
    make = _MAKERS.get(named.name)
    return StandIn(named.name) if make is None else make(*args)


def _make_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """Lay a tensor over a storage, which must hold all of it; gradients and hooks are left out."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor lies in a {type(storage).__name__}; expected a storage")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


# All that is ever made, by the names under which `torch.save` writes it.
_MAKERS = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_from_type_v2": lambda function, _type, args, _state: _made(function, args),
}


# The C one calls what it finds and lets no opcode be refused.
class _InertUnpickler(pickle._Unpickler):
    """Makes tensors and plain values, stand-ins of everything else, and calls nothing that a file names."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load(self) -> Any:
        """Read one pickle."""
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"it is no pickle, or a damaged one: it holds {error}") from error

    def find_class(self, module: str, name: str) -> Any:
        """Return the name alone; nothing is imported."""
        is_storage = (module, name) == ("torch.storage", "UntypedStorage")
        return torch.UntypedStorage if is_storage else StandIn(f"{module}.{name}")

    def get_extension(self, code: int) -> NoReturn:
        """Refuse numbers that stand for classes of this process."""
        raise pickle.UnpicklingError(f"the extension code {code} is none of a checkpoint's")

    def _instantiate(self, named: Any, args: list) -> None:
        self.append(_made(named, tuple(args)))

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def _load_newobj_ex(self) -> None:
        self.stack.pop()
        self._load_reduce()

    def _load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], StandIn | OrderedDict):
            raise pickle.UnpicklingError(f"a {type(self.stack[-1]).__name__} is given a state; expected an object")

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = _load_newobj_ex
    dispatch[pickle.BUILD[0]] = _load_build


def _load_inert(file, **options) -> Any:
    """Stand in for `pickle.load`."""
    return _InertUnpickler(file, **options).load()


_INERT_PICKLE = SimpleNamespace(__name__=__name__, Unpickler=_InertUnpickler, load=_load_inert)
