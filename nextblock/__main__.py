"""The command line: `nextblock COMMAND …`, also `python -m nextblock COMMAND …`.

`accelerate launch -m nextblock COMMAND …` runs a command on several processes. Only the command's own module is
imported, so that the list of commands takes no seconds. What a user can mend is one message; tracebacks are
for faults of the program.
"""

import difflib
import dis
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands import COMMANDS

# Whose errors mean files or names that are not what they should be.
_FOREIGN_REFUSALS = {"huggingface_hub", "safetensors", "safetensors_rust", "yaml"}
_USAGE = "usage: nextblock COMMAND [--OPTION VALUE ...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its arguments; None for those of the process.
    """
    _make_printable()
    arguments = sys.argv[1:] if argv is None else list(argv)
    for num_words in (1, 2):
        name = " ".join(arguments[:num_words])
        if name in COMMANDS:
            _run(name, arguments[num_words:])
            return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help_text(list(COMMANDS)))
        return
    if arguments[0] == "--version":
        print(f"nextblock {__version__}")
        return
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group and arguments[1:2] in ([], ["-h"], ["--help"]):
        print(_help_text(group))
        return
    wanted = " ".join(arguments[: 2 if group else 1])
    (nearest,) = difflib.get_close_matches(wanted, COMMANDS, n=1, cutoff=0.0)
    print(f"{_USAGE}\nnextblock: error: {wanted!r} is no command; did you mean {nearest!r}?", file=sys.stderr)
    sys.exit(2)


def _run(name: str, argv: list[str]) -> None:
    """Run a command; end with one message and status 2 where a user can mend what is wrong.

    Ctrl-C before or beside a command's work, which knows itself how to stop, is no error to be traced either.
    """
    try:
        import_module(f"nextblock.{COMMANDS[name].module}").main(argv)
    except KeyboardInterrupt:
        print(f"nextblock {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        status = _exit_status(error)
        if status is None:
            raise
        print(f"nextblock {name}: error: {error}", file=sys.stderr)
        sys.exit(status)


def _exit_status(error: Exception) -> int | None:
    """Tell what an error is: 2 for a mistake in what was asked or given, 1 for work that failed, None for a fault."""
    if type(error).__module__.startswith("nextblock."):
        return 2 if isinstance(error, ValueError) else 1
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _FOREIGN_REFUSALS:
        return 2
    return 2 if isinstance(error, ValueError) and _is_raised_by_us(error) else None


def _is_raised_by_us(error: Exception) -> bool:
    """Tell whether a `raise` of this package, or of diffusers at a pipeline, made an error: no call that stumbled."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    is_refusal = frame.f_globals.get("__name__", "").partition(".")[0] in ("nextblock", "diffusers")
    return is_refusal and frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _make_printable() -> None:
    """Let a terminal that knows ASCII alone show a question mark in place of a sign, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        is_limited = (getattr(stream, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
        if is_limited and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _help_text(names: list[str]) -> str:
    """List commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {COMMANDS[name].summary}" for name in names]
    hint = "`nextblock COMMAND --help` shows a command's options, their defaults and an example."
    return "\n".join([_USAGE, "", *lines, "", hint])


if __name__ == "__main__":
    main()
