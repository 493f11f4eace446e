"""WebDataset tar files: members with one stem are one sample, such as `0001.jpg` with `0001.cls`.

The headers are scanned once; an image is then one seek and one read.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from .image_folder import IMAGE_SUFFIXES
from .reading import read_picture
from .unreadable import UnreadableImageError


class TarSource:
    """Images in tar files.

    Args:
        root: the folder that `members` are named from.
        members: N places (file, member, offset, size), the file relative to `root`.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
    """

    def __init__(
        self, root: Path, members: list[tuple[str, str, int, int]], labels: np.ndarray, class_names: list[str]
    ):
        self.class_names = class_names
        self.root = root
        self._members = members
        self._labels = labels

    def __len__(self) -> int:
        return len(self._members)

    def image(self, index: int) -> Image.Image:
        """Reads the member; raises an UnreadableImageError that names it where that fails."""
        file, member, offset, size = self._members[index]
        try:
            with open(self.root / file, "rb") as archive:
                archive.seek(offset)
                content = archive.read(size)
            return read_picture(io.BytesIO(content))
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise whatever a broken file makes them trip over
            where = f"the image {member} of {self.root / file}"
            raise UnreadableImageError(where, str(self.root / file), error) from error

    def label(self, index: int) -> int:
        """The number in the sample's `.cls` member."""
        return int(self._labels[index])

    def identifier(self, index: int) -> str:
        """The tar file and the member, as "<file>/<member>"."""
        file, member, _, _ = self._members[index]
        return f"{file}/{member}"


def scan_tars(root: Path, split: str) -> TarSource:
    """Finds the samples of one split: the tar files `root/split/*.tar`, or `root/split*.tar`.

    Args:
        root: the folder.
        split: which split.

    Returns:
        The source, whose classes are named by number up to the largest; it has none where no sample has a `.cls`.

    Raises:
        ValueError: if there are no tar files, no images in them, or labels for a part of the images only.
    """
    files = sorted(root.glob(f"{split}/*.tar")) or sorted(root.glob(f"{split}*.tar"))
    if not files:
        raise ValueError(f"split={split!r}: {root} has neither {split}/*.tar nor {split}*.tar; expected tar files")
    members, labels = [], []
    for file in files:
        found, found_labels = _scan_tar(file, file.relative_to(root).as_posix())
        members += found
        labels += found_labels
    if not members:
        raise ValueError(f"split={split!r}: the {len(files)} tar files of {root} hold no images")
    unlabelled = [member for (_, member, _, _), label in zip(members, labels, strict=True) if label is None]
    if unlabelled and len(unlabelled) < len(members):
        raise ValueError(f"split={split!r}: {unlabelled[0]} and {len(unlabelled) - 1} more have no .cls; expected all")
    if unlabelled:
        return TarSource(root, members, np.zeros(len(members), np.int64), [])
    return TarSource(root, members, np.array(labels), [str(label) for label in range(max(labels) + 1)])


def _scan_tar(file: Path, name: str) -> tuple[list[tuple[str, str, int, int]], list[int | None]]:
    """The images of one tar file in its order, and their labels."""
    images, labels = {}, {}
    try:
        with tarfile.open(file, "r:") as archive:
            for entry in archive:
                # WebDataset's key ends at the first dot of the file's name.
                folder, _, base = entry.name.rpartition("/")
                key = (folder, base.partition(".")[0])
                if not entry.isfile() or base.startswith("."):
                    continue
                if base.lower().endswith(IMAGE_SUFFIXES):
                    if key in images:
                        raise ValueError(f"{file}: {entry.name} is a second image of its sample; expected one each")
                    images[key] = (name, entry.name, entry.offset_data, entry.size)
                elif base.endswith(".cls"):
                    labels[key] = _read_label(archive.extractfile(entry).read(), f"{entry.name} of {file}")
    except tarfile.TarError as error:
        raise ValueError(f"{file} is no tar file that can be read: {error}") from error
    return list(images.values()), [labels.get(key) for key in images]


def _read_label(content: bytes, where: str) -> int:
    """A class number written in decimal digits."""
    text = content.decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{where} holds {text[:40]!r}; expected a class number, 0 or more")
    return int(text)
