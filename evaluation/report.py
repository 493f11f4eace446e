"""Reports: figures beside their aims, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nextblock.files.atomic import write_text_whole

_AIM_PATTERN = re.compile(r"(>=|<=) *(-?\d+(?:\.\d+)?)")
_PACKAGES = ("nextblock", "torch", "transformers", "diffusers", "accelerate", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Aim:
    """A bound that a figure should keep.

    Args:
        bound: the number.
        is_floor: whether the figure should be at least the bound; else at most.
    """

    bound: float
    is_floor: bool

    @classmethod
    def parse(cls, text: str) -> Aim:
        """Read ">= 28.5" or "<= 2.8".

        Raises:
            ValueError: if the text is neither.
        """
        match = _AIM_PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"aim is {text!r}; expected a bound such as '>= 28.5' or '<= 2.8'")
        return cls(float(match[2]), match[1] == ">=")

    def is_met(self, value: float) -> bool:
        """Tell whether a value keeps the bound."""
        return value >= self.bound if self.is_floor else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.is_floor else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        figure: the figure's name.
        label: what it is, for people.
        value: the figure.
        aim: its bound, if it has one.
        beside: figures to read it against, in words.
    """

    figure: str
    label: str
    value: float
    aim: Aim | None = None
    beside: str = ""


def format_table(rows: Sequence[Row]) -> str:
    """Lay out figures beside their aims in plain ASCII columns."""
    cells = [("figure", "value", "aim", "verdict", "beside")]
    for row in rows:
        verdict = "" if row.aim is None else ("met" if row.aim.is_met(row.value) else "MISSED")
        cells.append((row.label, format_number(row.value), str(row.aim or ""), verdict, row.beside))
    return format_columns(cells)


def format_columns(cells: Sequence[Sequence[str]]) -> str:
    """Lay out lines of as many cells each, the first of them headings, in columns."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def format_number(value: float) -> str:
    """Write a figure with four significant digits, whole numbers whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}".rstrip(".")


def write_json(content: dict, path: str | Path) -> None:
    """Write a report; figures that are not finite, which JSON has no number for, become text such as "inf".

    Args:
        content: dicts, lists, text, numbers.
        path: the file to write; it appears whole or not at all.
    """
    write_text_whole(Path(path), json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def environment() -> dict[str, str]:
    """Name the versions of Python and of the packages whose numbers a report holds."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _finite(content):
    """Replace infinite numbers and NaN by their names, at any depth."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
