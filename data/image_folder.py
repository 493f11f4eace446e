"""Image files in folders: which there are, and classes from sub-folders.

Legend: N images.
"""

import os
from itertools import chain
from pathlib import Path

from PIL import Image

from nextblock.files.names import escaped_name
from nextblock.files.regular import is_regular

from .captions import folder_captions
from .reading import is_picture_file, is_picture_name, read_picture
from .unreadable import UnreadableImageError

_SOME_SUFFIXES = ".jpg .png .webp .tif .gif .bmp"


class ImageFolderSource:
    """Image files below one folder.

    Args:
        root: the folder.
        files: N paths relative to it, with forward slashes.
        labels: N positions in `class_names`, or N zeros.
        class_names: empty for unconditional data.
        captions: N tuples of texts; None without.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        labels: list[int],
        class_names: list[str],
        captions: list[tuple[str, ...]] | None = None,
    ):
        self.class_names = class_names
        self.captions = captions
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

    def files(self) -> list[Path]:
        """The paths of all files."""
        return [self.root / file for file in self._files]

    def label(self, index: int) -> int:
        """The position of the file's class folder among the class names."""
        return self._labels[index]

    def identifier(self, index: int) -> str:
        """The file's path relative to the configured folder."""
        return escaped_name(self._files[index])

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
        return ImageFolderSource(self.root, self._files, labels, class_names, self.captions)

    def captioned(self, column: str) -> "ImageFolderSource":
        """The same files with the captions of the metadata beside them."""
        captions = folder_captions(self.root, self._files, column)
        return ImageFolderSource(self.root, self._files, self._labels, self.class_names, captions)


def scan_image_folder(root: Path, split: str) -> ImageFolderSource:
    """Finds the images of one split: `root/split` where that is a folder, else `root`, which is then "train".

    Args:
        root: the folder. A class is a sub-folder, searched to any depth, and classes are sorted by name; images that
            lie in the folder itself are unconditional. Links are followed. Names with a leading dot are passed over.
        split: which split.

    Returns:
        The source; identifiers are relative to `root`.

    Raises:
        ValueError: if the folder or the split does not exist, or what is there is not as described or cannot be looked
            into.
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
    return _scan(folder, root)


def scan_whole_folder(root: Path) -> ImageFolderSource:
    """Finds all images of a folder, whatever its sub-folders are called; see `scan_image_folder`.

    Args:
        root: the folder; each of its sub-folders is a class.

    Returns:
        The source.

    Raises:
        ValueError: if the folder does not exist or is not as described.
    """
    if not root.is_dir():
        raise ValueError(f"path={str(root)!r} is not a folder; expected a folder of images")
    return _scan(root, root)


def _scan(folder: Path, root: Path) -> ImageFolderSource:
    """Finds the images of a folder; files are named from `root` on."""
    loose, class_folders = _list(folder)
    by_class = {entry.name: _images_below(entry, (folder.resolve(),)) for entry in class_folders}
    if loose:
        loose = sorted(loose + _pictures_that_are_folders(folder, by_class))
    expected = f"expected images ({_SOME_SUFFIXES} …), or one sub-folder of them for each class"
    if loose and any(by_class.values()):
        in_class = next(files[0] for files in by_class.values() if files)
        raise ValueError(
            f"{folder} holds images both directly and in sub-folders, such as {loose[0].name} "
            f"and {in_class.relative_to(folder)}; {expected}"
        )
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
    return ImageFolderSource(root, files, labels, [escaped_name(name) for name in by_class])


def _images_below(folder: Path, parents: tuple[Path, ...]) -> list[Path]:
    """All image files below a folder, sorted; `parents` are the true places of the folders it lies in."""
    place = folder.resolve()
    if place in parents:
        raise ValueError(f"{folder} is a link back to {place}, in which it lies; expected no such circle")
    files, folders = _list(folder)
    below = {entry.name: _images_below(entry, (*parents, place)) for entry in folders}
    return sorted([*files, *chain.from_iterable(below.values()), *_pictures_that_are_folders(folder, below)])


def _pictures_that_are_folders(folder: Path, below: dict[str, list[Path]]) -> list[Path]:
    """Folders without images that are called like one: each an image that cannot be read."""
    return [folder / name for name, files in below.items() if not files and is_picture_name(name)]


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images and the sub-folders of a folder, sorted; whatever may be neither is an error."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path):  # which a circle of links is not
                    folders.append(Path(entry.path))
                elif _is_picture(entry):
                    files.append(Path(entry.path))
    except OSError as error:
        raise ValueError(f"{folder} cannot be looked into: {error}; expected folders that can be read") from error
    return sorted(files), sorted(folders)


def _is_picture(entry: os.DirEntry) -> bool:
    """Whether what is no folder is a picture, by its name or else by its first bytes."""
    if is_regular(entry.path):
        return is_picture_file(entry.path)
    # A pipe or a device, or a link that leads nowhere: by its name an image that cannot be read.
    says = is_picture_name(entry.name)
    if says is None and entry.is_symlink() and not os.path.exists(entry.path):
        # It may be a folder.
        raise ValueError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there")
    return bool(says)
