"""Text from outside (names of splits, classes and files) written into Markdown so that it stays text, on its line."""

import html
import re

from .names import printable

# An underscore between letters is no mark, and paths are full of them.
_MARKS = re.compile(r"([\\`*|\[\]~$]|(?<![^\W_])_|_(?![^\W_]))")


def markdown_text(text: str) -> str:
    """Quote a text for a cell or a line of Markdown.

    Args:
        text: anything.

    Returns:
        One line that is read as the text, in which whatever breaks lines or cannot be printed is a space.
    """
    line = "".join(letter if letter.isprintable() else " " for letter in printable(text))
    return html.escape(_MARKS.sub(r"\\\1", line), quote=False)
