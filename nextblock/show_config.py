"""Find shipped configs: `nextblock config` lists them, `nextblock config NAME` prints where one lies."""

import argparse
from collections.abc import Sequence

from .command_line import shipped_configs
from .commands import example_text


def main(argv: Sequence[str]) -> None:
    """Print the names of the shipped configs, or the path of one."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nextblock config", epilog=example_text("config"), formatter_class=raw)
    parser.description = (
        "Print where a shipped config lies, to copy it or for `accelerate launch --config_file "
        "$(nextblock config NAME)`. Without a name, list the names."
    )
    parser.add_argument("name", nargs="?", help="name of a shipped config (default: list all)")
    name, shipped = parser.parse_args(argv).name, shipped_configs()
    if name is None:
        print("\n".join(sorted(shipped)))
        return
    if name not in shipped:
        parser.error(f"{name!r} is no shipped config; expected one of {', '.join(sorted(shipped))}")
    print(shipped[name])
