"""Where the host would wait for a GPU, found without one: what computes on the device "meta" has no values to look at.

Asking for a value (`item`, `bool`, `nonzero`, a mask as index, `bincount`) raises there by itself. Copies from the host
do not, which a GPU waits for unless they are non-blocking; these are recorded.
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
# A number of the host's is passed to these as it is made, on the host, and copied.
_COPYING = ("tensor", "as_tensor", "asarray", "new_tensor")


class HostWaits(TorchDispatchMode):
    """Record operations that wait for the device; use it as a context.

    Attributes:
        found: a line for each, the operation and the line of code that asked for it.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._made = _MadeFromNumbers(self.found)

    def __enter__(self):
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._made.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_host = [tensor for tensor in given if tensor.device.type == "cpu"]
        is_on_device = any(leaf.device == META for leaf in tree_leaves((result, given)) if hasattr(leaf, "device"))
        name = function.overloadpacket.__name__
        is_copy = name in ("_to_copy", "copy_") and not kwargs.get("non_blocking", args[2:] == (True,))
        # Kernels take numbers as arguments; these look for them in the device's memory.
        is_indexed = name in ("where", "index", "index_put_", "index_select", "gather", "scatter_", "embedding")
        if is_on_device and from_host and (is_copy or is_indexed or any(tensor.ndim for tensor in from_host)):
            if is_copy or name not in ("_to_copy", "copy_"):
                self.found.append(_line(str(function)))
        return result


class _MadeFromNumbers(TorchFunctionMode):
    """Record tensors on the device that are made of the host's numbers."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = getattr(function, "__name__", "")
        is_made = name in _COPYING and (name == "new_tensor" or not isinstance(args[0], torch.Tensor))
        if is_made and result.device == META:
            self._found.append(_line(name))
        return result


def _line(operation: str) -> str:
    """Say which line of the library's own asked for an operation."""
    frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    return f"{operation} at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
