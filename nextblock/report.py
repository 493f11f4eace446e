"""Draw a run directory as one page: `nextblock report RUN_DIR --output report.html` (or .png)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nextblock.evaluation.run_page import SUFFIXES, write_report

from .commands import example_text
from .mistakes import reading


def main(argv: Sequence[str]) -> None:
    """Read the command line and write the report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nextblock report", epilog=example_text("report"), formatter_class=raw)
    parser.description = "Draw a run directory as one HTML page or PNG picture."
    parser.add_argument("run_dir", type=Path, help="output_dir of a training")
    parser.add_argument("--output", type=Path, help=".html or .png file (default: report.html in the run directory)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dir / "report.html"
    if output.suffix not in SUFFIXES:
        parser.error(f"output is {str(output)!r}; expected a name that ends in {' or '.join(SUFFIXES)}")
    if arguments.output is not None and (output.is_dir() or not output.parent.is_dir()):
        parser.error(f"output is {str(output)!r}; expected a file in a folder that is there")
    with reading("run_dir", arguments.run_dir, "the output folder of a training"):
        write_report(arguments.run_dir, output)
    print(output)  # noqa: T201
