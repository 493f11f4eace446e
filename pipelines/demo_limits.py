"""What strangers may ask of the demo page: images, pixels, bytes and places in the queue.

Legend: H×W pixels.
"""

from dataclasses import dataclass, fields
from typing import Any, BinaryIO

from PIL import Image

from nextblock.data.reading import picture_size

# Of one request without files: labels, numbers and names.
MAX_FORM_BYTES = 1 << 18
# A drawing of the page has one; programmes send what they like.
MAX_LAYERS = 8
# Of a message.
MAX_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class DemoLimits:
    """What one request to the page may ask for."""

    max_images: int = 64
    """Images of one request: classes times images of each, or steps between two images."""
    max_decoded: int = 4096
    """Images decoded for one request that shows them after each block: images times blocks."""
    max_upload_bytes: int = 32 << 20
    """Bytes of an uploaded file."""
    max_pixels: int = 1 << 25
    """Pixels of an uploaded picture, height times width."""
    max_waiting: int = 32
    """Requests that wait; more are turned away."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 1 <= value <= 1 << 40:
                raise ValueError(f"limits.{field.name} is {value!r}; expected an integer from 1 to {1 << 40}")

    def check_count(self, class_labels: Any, num_images_per_label: Any) -> None:
        """Refuse more images than one request may ask for; what is no number is the pipeline's to refuse.

        Raises:
            ValueError: naming both numbers and the bound.
        """
        num_labels = len(class_labels) if isinstance(class_labels, list) else 1
        count = num_images_per_label if type(num_images_per_label) is int else 1
        if num_labels > self.max_images or count > self.max_images or num_labels * count > self.max_images:
            raise ValueError(
                f"{num_labels} × {count} images are asked for at once; expected {self.max_images} at most"
            )

    def check_picture(self, file: BinaryIO) -> None:
        """Refuse a picture of too many pixels, before it is unpacked, and what is no picture.

        Raises:
            ValueError: naming its size.
        """
        try:
            width, height = picture_size(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"the upload is no picture that can be read: {error}") from error
        self.check_pixels(width, height)

    def check_pixels(self, width: int, height: int) -> None:
        """Refuse the size of a picture that has too many pixels."""
        if width * height > self.max_pixels:
            raise ValueError(f"the picture has {height}×{width} pixels; expected {self.max_pixels} at most")


def one_line(message: object) -> str:
    """Return a message as one line of no more than `MAX_CHARACTERS`."""
    line = " ".join(str(message).split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 1]}…"


class BodyLimit:
    """ASGI middleware that ends a request whose body is longer than a page of this kind sends.

    Args:
        app: what answers.
        max_upload_bytes: of a file.
    """

    def __init__(self, app, max_upload_bytes: int):
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope, receive, send) -> None:
        """Answer a request, as one too large (413) where its body is."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_upload = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        num_left = MAX_FORM_BYTES + (self.max_upload_bytes if is_upload else 0)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > num_left:
            await _turn_away(send)
            return

        async def bounded():
            # Without a length, or with a false one, bytes are counted as they come.
            nonlocal num_left
            message = await receive()
            num_left -= len(message.get("body", b""))
            return message if num_left >= 0 else {"type": "http.disconnect"}

        await self.app(scope, bounded, send)


async def _turn_away(send) -> None:
    """Say that a body is too large."""
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"the request is too large"})
