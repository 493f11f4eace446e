"""The command line: `nextblock COMMAND …`, also `python -m nextblock COMMAND …`.

`accelerate launch -m nextblock COMMAND …` runs a command on several processes. Only the command's own module is
imported, so that the list of commands takes no seconds. What a user can mend is one message; tracebacks are
for faults of the program.
"""

import difflib
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands import COMMANDS
from .mistakes import exit_status, let_first_process_speak
from .output_streams import keep_streams, lost_output

# All that these do is to print.
_PRINTERS = ("config", "-h", "--help", "--version")
_USAGE = "usage: nextblock COMMAND [--OPTION VALUE ...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its arguments; None for those of the process.
    """
    keep_streams()
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _dispatch(arguments)
    finally:
        reason = lost_output()
        if reason is not None:
            print(f"nextblock: what was printed could not be written: {reason}", file=sys.stderr)
            # There was nothing but that to do.
            if not arguments or arguments[0] in _PRINTERS or {"-h", "--help"} & set(arguments):
                sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    """Run the command that is asked for, or say which there are."""
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
        status = exit_status(error)
        if status is None:
            raise
        let_first_process_speak()
        print(f"nextblock {name}: error: {error}", file=sys.stderr)
        sys.exit(status)


def _help_text(names: list[str]) -> str:
    """List commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {COMMANDS[name].summary}" for name in names]
    hint = "`nextblock COMMAND --help` shows a command's options, their defaults and an example."
    return "\n".join([_USAGE, "", *lines, "", hint])


if __name__ == "__main__":
    main()
