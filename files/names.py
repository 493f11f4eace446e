"""File names as text that every format can hold: bytes that are no UTF-8 are written `\\xNN`, and read back."""

import os
import re


def escaped_name(name: str) -> str:
    """Write a file's name so that JSON, Parquet and a terminal can hold it.

    Args:
        name: as Python gives it, with a lone surrogate for each byte that is no UTF-8.

    Returns:
        The name; where all of it is UTF-8 it stays as it is, unless it holds something that looks like an escape.
    """
    # A backslash that would be taken for an escape becomes one itself.
    name = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", name)
    return re.sub("[\ud800-\udfff]", lambda match: _escaped(match[0]), name)


def restored_name(text: str) -> str:
    """Read back what `escaped_name` wrote."""
    parts = re.split(r"((?:\\x[0-9a-f]{2})+)", text)
    parts[1::2] = [os.fsdecode(bytes.fromhex(part.replace("\\x", ""))) for part in parts[1::2]]
    return "".join(parts)


def printable(text: str) -> str:
    """Write a message so that any file can hold it, whatever names it mentions."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _escaped(surrogate: str) -> str:
    """Write one lone surrogate as its byte, or as its three where it stands for none."""
    is_byte = "\udc80" <= surrogate <= "\udcff"
    content = surrogate.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in content)
