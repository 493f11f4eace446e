"""The center crop of ADM's data loader, by which images of ImageNet are brought to size in most published figures.

Dhariwal and Nichol 2021, arXiv:2105.05233. Legend: S the side wanted.
"""

from PIL import Image

from .images import ImageSource


def adm_crop(image: Image.Image, side: int) -> Image.Image:
    """Halve a picture while it is at least twice as large as wanted, resize it (bicubic) and cut out the center.

    Args:
        image: RGB, any size.
        side: S ≥ 1 of the result in pixels.

    Returns:
        RGB picture of S x S pixels.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = side / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class AdmCropped:
    """The images of a source, each cropped by `adm_crop`.

    Args:
        source: the images.
        side: in pixels.
    """

    def __init__(self, source: ImageSource, side: int):
        self.class_names, self.captions = source.class_names, source.captions
        self._source, self._side = source, side

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> Image.Image:
        """Read an image and crop it; raises what the source raises."""
        return adm_crop(self._source.image(index), self._side)

    def label(self, index: int) -> int:
        """Return the image's class."""
        return self._source.label(index)

    def identifier(self, index: int) -> str:
        """Return the image's name."""
        return self._source.identifier(index)
