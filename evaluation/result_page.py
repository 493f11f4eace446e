"""An evaluation's result drawn as one page: figures, why some are missing, settings, pictures."""

import html
from collections.abc import Mapping
from pathlib import Path

from nextblock.data.reading import MAX_PICTURE_BYTES
from nextblock.files.atomic import write_text_whole
from nextblock.files.regular import read_content

from .report import format_number
from .run_page import STYLE, embedded, table

_REASON = "_reason"


def write_result_page(
    output_dir: Path,
    result: Mapping,
    figures: Mapping[str, str],
    pictures: Mapping[str, str],
    name: str = "report.html",
) -> None:
    """Write a page that needs no other file.

    Args:
        output_dir: where it goes, and where the pictures are.
        result: figures and settings by name; a figure that could not be had is None, and NAME_reason says why.
        figures: what the figures among them are, by name, in the order of the page.
        pictures: files and what they show, in the order of the page; those that are not there are left out.
        name: of the page's file.
    """
    title = html.escape(output_dir.resolve().name)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{title}</h1>")
    parts.append("<h2>Figures</h2>" + table([_figure_row(name, words, result) for name, words in figures.items()]))
    for file, words in pictures.items():
        if (output_dir / file).is_file():
            picture = embedded(read_content(output_dir / file, MAX_PICTURE_BYTES), file)
            parts.append(f"<figure>{picture}<figcaption>{html.escape(words)}</figcaption></figure>")
    shown = {*figures, *(name + _REASON for name in figures)}
    settings = [[name, "–" if value is None else str(value)] for name, value in result.items() if name not in shown]
    parts.append("<h2>How they were measured</h2>" + table(settings))
    write_text_whole(output_dir / name, "\n".join(parts) + "\n</html>\n")


def _figure_row(name: str, words: str, result: Mapping) -> list[str]:
    """Return a figure's name, what it is, and its value or why there is none."""
    value = result.get(name)
    if isinstance(value, int | float):
        return [name, words, format_number(value)]
    return [name, words, str(value or f"none: {result.get(name + _REASON, 'not measured')}")]
