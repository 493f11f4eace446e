"""What a callback reads and sets on a pipeline, kept for each call by itself: calls at the same time do not meet.

diffusers keeps these on the pipeline, which threads of a server share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class CallState:
    """State of one call."""

    guidance_scale: float = 1.0
    """Scale of the batch at hand."""
    is_interrupted: bool = False
    """Whether to stop after the block at hand."""


# Calls under way in this thread or task, each after the one whose callback made it.
_calls: ContextVar[tuple[tuple[object, CallState], ...]] = ContextVar("nextblock_calls", default=())


class HasCallState:
    """Part of a pipeline: the names by which diffusers' callbacks know a call's state.

    Within a call they are that call's; outside of one, those of the call that ended last.
    """

    _last_call: CallState

    @contextmanager
    def new_call(self) -> Iterator[CallState]:
        """Begin a call with a state of its own, and end it."""
        state = CallState()
        token = _calls.set((*_calls.get(), (self, state)))
        try:
            yield state
        finally:
            _calls.reset(token)
            self._last_call = state

    @property
    def guidance_scale(self) -> float:
        """Scale of the batch at hand; a callback that sets `_guidance_scale` changes that batch's later blocks."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the block at hand; set `_interrupt` in a callback to ask for it."""
        return self._interrupt

    @property
    def _guidance_scale(self) -> float:
        return self._state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._state.guidance_scale = value

    @property
    def _interrupt(self) -> bool:
        return self._state.is_interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._state.is_interrupted = value

    @property
    def _state(self) -> CallState:
        """The state of this thread's innermost call of this pipeline."""
        own = [state for pipe, state in _calls.get() if pipe is self]
        return own[-1] if own else self._last_call
