"""Why an image cannot be used, in words that are the same on every machine and in every run."""

import errno
import re

from PIL import Image, UnidentifiedImageError

from nextblock.files.names import printable
from nextblock.files.regular import NotRegularError, TooLargeError

REASONS = ("corrupt", "truncated", "too small", "too large", "unreadable mode", "decompression bomb", "missing")
# Names that lead nowhere: a circle of links, what is longer than a name can be, a socket.
_NOWHERE = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
_TRUNCATED = re.compile(r"truncated|unexpected end|not enough (image )?data|end of file", re.IGNORECASE)
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


class UnreadableModeError(ValueError):
    """Pixels whose range is unknown, so that they cannot become 8-bit RGB."""


class UnreadableImageError(ValueError):
    """An image that cannot be used.

    Args:
        where: the image in words for a person, its path among them.
        path: what is cut out of the detail, so that it says the same wherever the images lie.
        error: what reading it raised.
    """

    def __init__(self, where: str, path: str, error: Exception):
        super().__init__(printable(f"cannot read {where}: {type(error).__name__}: {error}"))
        self.reason = rejection_reason(error)
        message = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
        if isinstance(error, UnidentifiedImageError):
            message = "cannot identify image file"
        self.detail = printable(f"{type(error).__name__}: {_ADDRESS.sub('', message.replace(path, '…'))}")

    def __reduce__(self):
        return _restored, (str(self), self.reason, self.detail)


def _restored(message: str, reason: str, detail: str) -> UnreadableImageError:
    """Rebuild an error that comes from another process."""
    error = UnreadableImageError.__new__(UnreadableImageError, message)
    error.args, error.reason, error.detail = (message,), reason, detail
    return error


def rejection_reason(error: Exception) -> str | None:
    """Sort what reading an image raised into one of `REASONS`.

    Args:
        error: from PIL or from `to_rgb`.

    Returns:
        The reason, or None where the machine is at fault and not the image, such as for too many open files.
    """
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb"
    if isinstance(error, UnreadableModeError):
        return "unreadable mode"
    if isinstance(error, TooLargeError):
        return "too large"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return "missing"
    if isinstance(error, NotRegularError) or isinstance(error, OSError) and error.errno in _NOWHERE:
        return "missing"
    # A broken file can ask for a seek to nowhere, which is EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return None
    if isinstance(error, EOFError) or _TRUNCATED.search(str(error)):
        return "truncated"
    return "corrupt"
