"""Image files: classes from sub-folders, and whatever a file holds turned into upright RGB.

Legend: N images.
"""

import os
from pathlib import Path

from PIL import Image

from .reading import read_picture
from .unreadable import UnreadableImageError

IMAGE_SUFFIXES = tuple(".avif .bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())


class ImageFolderSource:
    """Image files below one folder.

    Args:
        root: the folder.
        files: N paths relative to it, with forward slashes.
        labels: N positions in `class_names`, or N zeros.
        class_names: empty for unconditional data.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int], class_names: list[str]):
        self.class_names = class_names
        self.root = root
        self._files = files
        self._labels = labels

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Image.Image:
        """Reads the file; raises a ValueError that names it where that fails."""
        file = self.root / self._files[index]
        try:
            return read_picture(file)
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
            raise UnreadableImageError(f"the image file {file}", str(file), error) from error

    def label(self, index: int) -> int:
        """The position of the file's class folder among the class names."""
        return self._labels[index]

    def identifier(self, index: int) -> str:
        """The file's path relative to the configured folder."""
        return self._files[index]

    def relabelled(self, class_names: list[str]) -> "ImageFolderSource":
        """The same files, labelled by their positions in another list of class names."""
        unknown = sorted(set(self.class_names) - set(class_names))
        if unknown or bool(class_names) != bool(self.class_names):
            raise ValueError(
                f"path={str(self.root)!r}: this split has the classes {self.class_names}, the split that is "
                f"trained on has {class_names}; expected the same or some of them"
            )
        labels = [0] * len(self)
        if class_names:
            positions = [class_names.index(name) for name in self.class_names]
            labels = [positions[label] for label in self._labels]
        return ImageFolderSource(self.root, self._files, labels, class_names)


def scan_image_folder(root: Path, split: str) -> ImageFolderSource:
    """Finds the images of one split: `root/split` where that is a folder, else `root`, which is then "train".

    Args:
        root: the folder. A class is a sub-folder, searched to any depth, and classes are sorted by name;
            images that lie in the folder itself are unconditional. Names with a leading dot are passed over.
        split: which split.

    Returns:
        The source; identifiers are relative to `root`.

    Raises:
        ValueError: if the folder or the split does not exist, or what is there is not as described.
    """
    if not root.is_dir():
        raise ValueError(f"path={str(root)!r} is not a folder; expected a folder of images")
    folder = root / split
    if not folder.is_dir():
        if split != "train":
            found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            raise ValueError(
                f"split={split!r} is not a sub-folder of path={str(root)!r}, which has {found}; "
                "a folder without splits is the split 'train'"
            )
        folder = root
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    loose = [entry for entry in visible if not entry.is_dir() and entry.suffix.lower() in IMAGE_SUFFIXES]
    by_class = {entry.name: _images_below(entry) for entry in visible if entry.is_dir()}
    expected = f"expected images ({' '.join(IMAGE_SUFFIXES)}), or one sub-folder of them for each class"
    if loose and any(by_class.values()):
        raise ValueError(f"{folder} holds images both directly and in sub-folders; {expected}")
    if not loose and not by_class:
        raise ValueError(f"{folder} holds no images; {expected}")
    if loose:
        files = [file.relative_to(root).as_posix() for file in loose]
        return ImageFolderSource(root, files, [0] * len(files), [])
    for name, files in by_class.items():
        if not files:
            raise ValueError(f"{folder / name} holds no images; {expected}")
    files = [file.relative_to(root).as_posix() for files in by_class.values() for file in files]
    labels = [label for label, members in enumerate(by_class.values()) for _ in members]
    return ImageFolderSource(root, files, labels, list(by_class))


def _images_below(folder: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(files)
