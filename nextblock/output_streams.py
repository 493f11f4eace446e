"""Standard output and error for which no work is lost: a reader goes away, a disk is full, a stream was closed.

Progress bars, prints and logs write there in the middle of trainings; none of them may end one.
"""

import errno
import io
import os
import sys

_ENDINGS = {errno.EPIPE, errno.EIO}


class _LastingFile(io.FileIO):
    """A file to which every write succeeds; what it could not take is lost, and the first reason is kept."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def keep_streams() -> None:
    """Let writing to this process's standard streams never fail, and let a terminal show what it can.

    Streams that a program has put in place of them are left alone, but for signs that they cannot write.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file opened, which gets the lowest free number, would be standard output to whatever prints.
            os.open(os.devnull, os.O_RDONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lasting(number, stream))
        _show_unknown_signs(getattr(sys, name))


def lost_output() -> str | None:
    """Tell why standard output could not be written; None where it was, or where its reader had enough."""
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    sys.stdout.flush()
    failure = file.failure if isinstance(file, _LastingFile) else None
    return None if failure is None or failure.errno in _ENDINGS else failure.strerror


def _lasting(number: int, stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Open a standard stream anew, as it was; None stands for one that was closed when the process began."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(number, "w", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="replace" if stream is None else stream.errors,
        line_buffering=number == 2 or os.isatty(number),
    )


def _show_unknown_signs(stream) -> None:
    """Let a terminal that knows ASCII alone show a question mark in place of a sign, and no traceback."""
    is_limited = (getattr(stream, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
    if is_limited and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
