"""State dicts of other projects: reading them, telling sizes from shapes, and taking them over exactly.

A converter infers a configuration from shapes, states which names and shapes that configuration has, and
loads only a state dict that has these and no others.
"""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .atomic import write_whole

ModelT = TypeVar("ModelT", bound=nn.Module)
Shapes = dict[str, tuple[int, ...]]
# More names than this of what is wrong say nothing new.
MAX_LISTED = 20


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name from a `.safetensors` file, or from a pickle that may hold nothing but tensors.

    Args:
        path: file to read.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: if the file is missing, cannot be read, or holds anything but tensors by name.
    """
    path = Path(path)
    with reading_tensors(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = load_pickled(path)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} is not a pickle of tensors alone; others may run code and are refused"
            ) from error
    return check_tensors(state, path)


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """Name a file of tensors in whatever goes wrong while it is read.

    Args:
        path: of it.

    Raises:
        ValueError: naming it, if it is missing or the reading stumbles.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint is {str(path)!r}; expected a .pth, .pt or .safetensors file")
    try:
        yield
    except ValueError as error:
        if str(error).startswith("checkpoint"):
            raise
        raise _unreadable(path, error) from error
    except Exception as error:  # A file that is none makes unpickling stumble in ways of its own.
        raise _unreadable(path, error) from error


def load_pickled(path: Path, **options) -> Any:
    """Call `torch.load` on the CPU, by default for tensors and plain values alone.

    Args:
        path: of a file.
        options: of `torch.load`.

    Raises:
        ValueError: if the file claims to hold more bytes than it has.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        # torch packs nothing, so that only a bomb unpacks to more than its file.
        with zipfile.ZipFile(path) as archive:
            claimed, held = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if claimed > held:
            raise ValueError(f"its parts claim {claimed} bytes, of which {held} are there")
    # Mapping the file keeps one copy of the weights in memory; the older format cannot be mapped.
    return torch.load(path, **{"map_location": "cpu", "weights_only": True, "mmap": is_zip} | options)


def check_tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """Refuse what is no dictionary of tensors by name, and tensors that claim more than is there.

    Args:
        state: what a file holds.
        path: of the file, for the message.

    Returns:
        The same.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(state).__name__}; expected tensors by name")
    others = [name for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others:
        listed = others if len(others) <= MAX_LISTED else [*others[:MAX_LISTED], "…"]
        raise ValueError(f"checkpoint {str(path)!r} holds {listed}, no tensors; expected tensors by name")
    for name, tensor in state.items():
        # A view of a few bytes may claim to be of any size, which copying would make true.
        held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
        if tensor.numel() * tensor.element_size() > held:
            raise ValueError(
                f"checkpoint {str(path)!r}: {name} claims to be {tuple(tensor.shape)}, of which {held} bytes are "
                "there; expected tensors that are stored whole"
            )
    return state


def read_like(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors that are to take the place of others.

    Args:
        path: of a safetensors file.
        own: the others by name.

    Raises:
        ValueError: naming the file, if it is missing or cannot be read; and the tensors that are missing, unexpected,
            of another shape or kind of number, or not finite.
    """
    given = read_state_dict(path)
    problems = [f"missing: {name}" for name in own.keys() - given.keys()]
    problems += [f"unexpected: {name}" for name in given.keys() - own.keys()]
    for name in own.keys() & given.keys():
        got, expected = ((tuple(tensor.shape), tensor.dtype) for tensor in (given[name], own[name]))
        if got != expected:
            problems.append(f"other: {name} {got}, expected {expected}")
        elif not given[name].isfinite().all():
            problems.append(f"not finite: {name}")
    if problems:
        raise ValueError(f"{path} does not hold the tensors expected:\n  " + "\n  ".join(sorted(problems)))
    return given


def write_state_dict(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors by name with `torch.save`, so that the file is whole or not there."""
    write_whole(path, lambda file: torch.save(state, file))


def infer_size(state: dict[str, Tensor], *places: tuple[str, int], default: int | None = None) -> int:
    """Tell a size from the dimensions that carry it.

    Args:
        state: tensors by name.
        places: (name, dimension) pairs; the majority wins, and `check_state_dict` names those that disagree.
        default: stands in where none of the names is there, for `check_state_dict` to name them.

    Returns:
        The size.

    Raises:
        ValueError: if none of the names is there and there is no default.
    """
    sizes = [state[name].shape[dim] for name, dim in places if name in state and state[name].ndim > dim]
    if sizes:
        return Counter(sizes).most_common(1)[0][0]
    if default is None:
        names = ", ".join(dict.fromkeys(name for name, _ in places))
        found = ", ".join(list(state)[:8]) or "nothing"
        raise ValueError(f"the checkpoint lacks the tensors {names}; it holds {len(state)} others: {found} …")
    return default


def count_numbered(state: dict[str, Tensor], prefix: str) -> int:
    """Return one more than the highest number i in names `{prefix}{i}.…`, 0 where there are none.

    Args:
        state: tensors by name.
        prefix: with its last dot.

    Raises:
        ValueError: if it is more than there are tensors: one name alone would make a model of any size.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,18})\.")
    numbers = {int(match[1]): name for name in state if (match := pattern.match(name))}
    count = max(numbers, default=-1) + 1
    if count > len(state):
        raise ValueError(
            f"the checkpoint holds {len(state)} tensors, {numbers[count - 1]} among them; expected numbers after "
            f"{prefix!r} that count from 0 without a gap"
        )
    return count


def check_state_dict(state: dict[str, Tensor], expected: Shapes, derived: Shapes) -> None:
    """Refuse a state dict unless its names and shapes are the expected ones.

    Args:
        state: tensors by name.
        expected: shapes of the floating-point tensors that must be there.
        derived: shapes of the tensors that may be there.

    Raises:
        ValueError: listing by name all that is missing, unexpected, misshapen or no floating point.
    """
    allowed = expected | derived
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"unexpected: {name} {shape}" for name, shape in shapes.items() if name not in allowed]
    problems += [
        f"misshapen: {name} {shape}, expected {allowed[name]}"
        for name, shape in shapes.items()
        if name in allowed and shape != allowed[name]
    ]
    problems += [
        f"no floating point: {name} {state[name].dtype}"
        for name in expected
        if name in state and not state[name].is_floating_point()
    ]
    if problems:
        raise ValueError(
            "the checkpoint is not the model that its shapes tell of:\n  " + "\n  ".join(problems)
        )


def build_without_weights(model_class: type[ModelT], config) -> ModelT:
    """Build a model whose tensors have shapes and no memory yet."""
    with torch.device("meta"):
        return model_class(config)


def take_over(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Make a state dict's tensors, in float32, those of a model built without weights.

    Args:
        model: what `build_without_weights` returned.
        state: all of the model's tensors by the model's own names.
    """
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
    model.eval()


def float32_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name, on the CPU in float32; where they are so already, without a copy."""
    return {name: tensor.to("cpu", torch.float32) for name, tensor in model.state_dict().items()}


def _unreadable(path: Path, error: Exception) -> ValueError:
    """Say that a file cannot be read, and why."""
    reason = " ".join(str(error).splitlines()[:2])[:300]
    return ValueError(
        f"checkpoint {str(path)!r} cannot be read; expected a .pth, .pt or .safetensors file of tensors: "
        f"{type(error).__name__}: {reason}"
    )
