"""Draw a run directory as one page: `nextblock report RUN_DIR --output report.html` (or .png)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nextblock.evaluation.run_page import write_report

from .commands import example_text


def main(argv: Sequence[str]) -> None:
    """Read the command line and write the report."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="nextblock report", epilog=example_text("report"), formatter_class=raw)
    parser.description = "Draw a run directory as one HTML page or PNG picture."
    parser.add_argument("run_dir", type=Path, help="output_dir of a training")
    parser.add_argument("--output", type=Path, help=".html or .png file (default: report.html in the run directory)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dir / "report.html"
    try:
        write_report(arguments.run_dir, output)
    except ValueError as error:
        parser.error(str(error))
    print(output)  # noqa: T201
