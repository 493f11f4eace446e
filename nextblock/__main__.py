"""The command line: `nextblock COMMAND …`, also `python -m nextblock COMMAND …`.

`accelerate launch -m nextblock COMMAND …` runs a command on several processes. Only the command's own module is
imported, so that the list of commands takes no seconds.
"""

import difflib
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands import COMMANDS

_USAGE = "usage: nextblock COMMAND [--OPTION VALUE ...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its arguments; None for those of the process.
    """
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


def _run(name: str, arguments: Sequence[str]) -> None:
    """Run a command; Ctrl-C before or beside its work, which knows itself how to stop, is no error to be traced."""
    try:
        import_module(f"nextblock.{COMMANDS[name].module}").main(arguments)
    except KeyboardInterrupt:
        print(f"nextblock {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _help_text(names: list[str]) -> str:
    """List commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {COMMANDS[name].summary}" for name in names]
    hint = "`nextblock COMMAND --help` shows a command's options, their defaults and an example."
    return "\n".join([_USAGE, "", *lines, "", hint])


if __name__ == "__main__":
    main()
