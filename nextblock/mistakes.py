"""Mistakes in what was asked or given, told from faults of the program; what is read from outside, named by its option.

A mistake is a ValueError that a `raise` of this package made, or what a library says of a file: one message, status 2.
"""

import dis
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

_OTHERS_SECONDS = 10.0
# Whose errors mean files or names that are not what they should be.
_FOREIGN_REFUSALS = {"huggingface_hub", "safetensors", "safetensors_rust", "yaml"}


def exit_status(error: Exception) -> int | None:
    """Tell what an error is.

    Args:
        error: as it was caught.

    Returns:
        2 for a mistake in what was asked or given, 1 for work that failed, None for a fault of the program.
    """
    if type(error).__module__.startswith("nextblock."):
        return 2 if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _FOREIGN_REFUSALS:
        return 2
    return 2 if is_refusal(error) else None


def is_refusal(error: Exception) -> bool:
    """Tell whether a `raise` of this package, or of diffusers at a pipeline, made a ValueError: no call that stumbled.

    Args:
        error: as it was caught.
    """
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    is_ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("nextblock", "diffusers")
    has_raised = frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return isinstance(error, ValueError) and is_ours and has_raised


def let_first_process_speak() -> None:
    """Wait a little in all processes of a launch but the first, before a mistake is said that all may have met.

    The launcher ends the others once the first has failed; what only one of them has met is said all the same.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_OTHERS_SECONDS)


@contextmanager
def reading(option: str, value: object, expected: str) -> Iterator[None]:
    """Name an option in whatever goes wrong while the file or folder that it names is read.

    Files from outside make libraries stumble in more ways than can be listed, so that every error inside is theirs:
    keep the context to reading.

    Args:
        option: as on the command line, without its dashes.
        value: given to it.
        expected: what it should be.

    Raises:
        ValueError: naming the option, its value and what was expected or is wrong.
    """
    try:
        yield
    except Exception as error:
        name = option.rpartition(".")[2]
        if is_refusal(error) and str(error).startswith((f"{name} is ", f"{name}=", option)):
            raise
        # The first lines: what follows in a library's message is advice about the library, or C++ frames.
        reason = str(error).strip() if is_refusal(error) else " ".join(str(error).strip().splitlines()[:2])[:300]
        if not isinstance(error, (ValueError, OSError)) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        wanted = "" if is_refusal(error) and "expected" in reason else f"; expected {expected}"
        raise ValueError(f"{option} is {str(value)!r}{wanted}: {reason}") from error
