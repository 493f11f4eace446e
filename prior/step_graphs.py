"""CUDA graphs of a block's step: captured once a request, and replayed for its later blocks of the same length.

A short block's kernels are done before the next ones are launched; a graph launches all of them at once.
Legend: R rows, l positions, D width.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# By then, what is compiled, tuned or allocated at first calls is there.
NUM_PLAIN_CALLS = 2
_one_at_a_time = threading.Lock()


class StepGraphs:
    """The graphs of one request, which its cache holds and frees.

    A step may read numbers only as far as its key tells them; what else differs between calls must be tensors. Those
    that are the same objects from call to call are read where they lie; others are copied to where the graph reads.
    """

    def __init__(self):
        self._graphs: dict[Any, _Graph] = {}
        self._calls: dict[Any, tuple[int, list[Tensor]]] = {}

    def run(self, step: Callable[..., Tensor], arguments: tuple, key: Any) -> Tensor:
        """Run a step as it is, and from its third call on as a graph.

        Args:
            step: a function of the arguments; running it twice must do what running it once does.
            arguments: tensors, None, or tuples of such.
            key: equal for calls that may share a graph.

        Returns:
            What the step returns, in memory of its own.
        """
        tensors = _tensors(arguments)
        graph = self._graphs.get(key)
        if graph is not None and not graph.fits(tensors):
            del self._graphs[key], self._calls[key]
            graph = None
        if graph is None:
            num_calls, before = self._calls.get(key, (0, []))
            self._calls[key] = num_calls + 1, tensors
            if num_calls < NUM_PLAIN_CALLS or len(before) != len(tensors):
                return step(*arguments)
            graph = self._graphs[key] = _Graph(step, arguments, tensors, before)
        return graph.replay(tensors)


class _Graph:
    """A captured step."""

    def __init__(self, step: Callable[..., Tensor], arguments: tuple, tensors: list[Tensor], before: list[Tensor]):
        self._is_kept = [tensor is other for tensor, other in zip(tensors, before, strict=True)]
        self._read = [t if is_kept else t.clone() for t, is_kept in zip(tensors, self._is_kept, strict=True)]
        arguments = _with_tensors(arguments, iter(self._read))
        # Clones may lie otherwise than what they are of, for which a compiled step is compiled anew: not in a capture.
        step(*arguments)
        self._launch, self._result = _captured(lambda: step(*arguments), tensors[0].device)

    def fits(self, tensors: list[Tensor]) -> bool:
        """Tell whether the graph reads these tensors, or can take copies of them."""
        return len(tensors) == len(self._read) and all(
            tensor is read if is_kept else tensor.shape == read.shape and tensor.dtype == read.dtype
            for tensor, read, is_kept in zip(tensors, self._read, self._is_kept, strict=True)
        )

    def replay(self, tensors: list[Tensor]) -> Tensor:
        """Launch the graph on these tensors; the result is copied, as the next launch writes to the same place."""
        for tensor, read, is_kept in zip(tensors, self._read, self._is_kept, strict=True):
            if not is_kept:
                read.copy_(tensor)
        self._launch()
        return self._result.clone()


class StepStack(nn.ModuleList):
    """Layers whose call is a block's step; where `captures_graphs` is set, it runs as a CUDA graph.

    A subclass's `forward` takes what `__call__` takes. Compiled or captured, it reads the `positions` and of the span
    no more than the first position that is seen.
    """

    captures_graphs = False

    def __call__(
        self,
        x: Tensor,
        of_layers: Any,
        cache: Any,
        span: tuple[int, int, int],
        positions: Tensor | None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Run new positions through all layers.

        Args:
            x: (R, l, D).
            of_layers: what the layers take besides: tensors, tuples of them, or None.
            cache: with `step_graphs`; its tensors lie where they are for as long as it lives.
            span: first position that is seen, first new one, the position after the last.
            positions: (l,) int64, the new ones; None where steps differ in length, which are not captured.
            prefix_mask: (R, n) whether a row sees the n positions from the first seen on; None sees all.

        Returns:
            (R, l, D).
        """
        run = super().__call__
        if not self.captures_graphs or positions is None or not self._can_capture(x):
            return run(x, of_layers, cache, span, positions, prefix_mask)

        def step(x: Tensor, of_layers: Any, positions: Tensor, prefix_mask: Tensor | None) -> Tensor:
            return run(x, of_layers, cache, span, positions, prefix_mask)

        key = tuple(x.shape), x.dtype, span[0]
        return cache.step_graphs.run(step, (x, of_layers, positions, prefix_mask), key)

    def _can_capture(self, x: Tensor) -> bool:
        """Tell whether a step's kernels are the same at every call, and none of its weights come from elsewhere."""
        return (
            x.is_cuda
            and not torch.is_grad_enabled()
            and not self.training
            # Autocast keeps casts of weights beyond the graph that would have made them.
            and not torch.is_autocast_enabled("cuda")
            and not any(hasattr(module, "_hf_hook") for module in self.modules())
        )


def is_whole_cache_read(x: Tensor) -> bool:
    """Tell whether a step must not depend on numbers that differ from block to block: it is compiled, or captured."""
    return torch.compiler.is_compiling() or x.is_cuda and torch.cuda.is_current_stream_capturing()


def _captured(launch: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture what a function launches; return how to launch it again, and where its result lies then."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate memory meanwhile.
    mode = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
    with _one_at_a_time, torch.cuda.device(device), torch.cuda.graph(graph, **mode):
        result = launch()
    return graph.replay, result


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors of nested tuples in order."""
    if isinstance(value, tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return [] if value is None else [value]


def _with_tensors(value: Any, tensors) -> Any:
    """Put other tensors in the places of those of nested tuples."""
    if isinstance(value, tuple):
        return tuple(_with_tensors(each, tensors) for each in value)
    return None if value is None else next(tensors)
