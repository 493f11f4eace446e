"""WebDataset tar files: members with one stem are one sample, such as `0001.jpg` with `0001.cls` and `0001.txt`.

The headers are scanned once; an image is then one seek and one read.
"""

import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from nextblock.files.names import escaped_name
from nextblock.files.regular import check_size, open_regular

from .captions import MAX_CAPTION_LENGTH, check_captions
from .class_numbers import numbered_classes
from .reading import MAX_PICTURE_BYTES, NUM_FIRST_BYTES, is_picture_name, read_picture, starts_as_picture
from .tar_members import Member, scan_members
from .unreadable import UnreadableImageError

# Of a class number, spaces and line ends around it.
MAX_LABEL_BYTES = 64


class TarSource:
    """Images in tar files.

    Args:
        root: the folder that `members` are named from.
        members: N places (file, member, offset, size), the file relative to `root`.
        labels: (N,) positions in `class_names`, or zeros.
        class_names: empty for unconditional data.
        captions: N tuples of texts; None without.
    """

    def __init__(
        self,
        root: Path,
        members: list[tuple[str, str, int, int]],
        labels: np.ndarray,
        class_names: list[str],
        captions: list[tuple[str, ...]] | None = None,
    ):
        self.class_names = class_names
        self.captions = captions
        self.root = root
        self._members = members
        self._labels = labels

    def __len__(self) -> int:
        return len(self._members)

    def image(self, index: int) -> Image.Image:
        """Reads the member; raises an UnreadableImageError that names it where that fails."""
        file, member, offset, size = self._members[index]
        try:
            if offset < 0:
                raise FileNotFoundError("a link to what is not in the archive")
            check_size(size, MAX_PICTURE_BYTES, "the member")
            with open_regular(self.root / file) as archive:
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
        return escaped_name(f"{file}/{member}")


def scan_tars(root: Path, split: str, caption_ending: str | None = None) -> TarSource:
    """Finds the samples of one split: the tar files `root/split/*.tar`, or `root/split*.tar`.

    Args:
        root: the folder.
        split: which split.
        caption_ending: ending of the members that hold an image's caption, such as "txt"; None for no captions.

    Returns:
        The source, whose classes are named by number up to the largest; it has none where no sample has a `.cls`.

    Raises:
        ValueError: if there are no tar files, they are damaged, there are no images in them, or labels or captions for
            a part of the images only.
    """
    members, labels, texts = [], [], []
    files = tar_files(root, split)
    for file in files:
        found, found_labels, found_texts = _scan_tar(file, file.relative_to(root).as_posix(), caption_ending)
        members += found
        labels += found_labels
        texts += found_texts
    if not members:
        raise ValueError(f"split={split!r}: the {len(files)} tar files of {root} hold no images")
    names = [f"{file}/{member}" for file, member, _, _ in members]
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    if unlabelled and len(unlabelled) < len(members):
        raise ValueError(
            f"split={split!r}: {len(unlabelled)} of {len(members)} images have no .cls, such as "
            f"{', '.join(unlabelled[:3])}; expected one for every image, or for none"
        )
    captions = None if caption_ending is None else check_captions(texts, names, f"caption_column={caption_ending!r}")
    if unlabelled:
        return TarSource(root, members, np.zeros(len(members), np.int64), [], captions)
    class_names = numbered_classes(max(labels) + 1, len(labels), ".cls")
    return TarSource(root, members, np.array(labels), class_names, captions)


def tar_files(root: Path, split: str) -> list[Path]:
    """Finds the tar files of a split.

    Args:
        root: the folder.
        split: which split.

    Returns:
        Their paths, sorted.

    Raises:
        ValueError: if there are none, they lie in two places, or archives are no tar files.
    """
    in_folder = [(root / split / name) for name in _names_in(root / split)]
    beside = [root / name for name in _names_in(root) if name.startswith(split)]
    found = [[path for path in paths if path.name.lower().endswith(".tar")] for paths in (in_folder, beside)]
    if all(found):
        raise ValueError(f"split={split!r}: {root} has both {found[0][0]} and {found[1][0]}; expected one layout")
    packed = [path for path in in_folder + beside if re.search(r"\.(tar\.\w+|t[gbx]z2?|tzst)$", path.name.lower())]
    if packed:
        raise ValueError(f"split={split!r}: {packed[0]} is compressed; expected .tar files, in which one can seek")
    if not any(found):
        raise ValueError(f"split={split!r}: {root} has neither {split}/*.tar nor {split}*.tar; expected tar files")
    return found[0] or found[1]


def _names_in(folder: Path) -> list[str]:
    """Sorted names in a folder without those with a leading dot; none where there is no folder."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


def _scan_tar(
    file: Path, name: str, caption_ending: str | None
) -> tuple[list[tuple[str, str, int, int]], list[int | None], list[str | None]]:
    """The images of one tar file in its order, their labels and captions; names with a leading dot are passed over."""
    images, labels, texts = {}, {}, {}
    members = scan_members(file)
    with open_regular(file) as archive:
        for member in members:
            # WebDataset's key ends at the first dot of the file's name.
            folder, _, base = member.name.rpartition("/")
            key = (folder, base.partition(".")[0])
            if base.startswith("."):
                continue
            if caption_ending is not None and base.lower().endswith(f".{caption_ending.lower()}"):
                _put(texts, key, _read_caption(archive, member, f"{member.name} of {file}"), file, member, "caption")
            elif _is_picture(archive, member, base):
                _put(images, key, (name, member.name, member.offset, member.size), file, member, "image")
            elif base.lower().endswith(".cls"):
                _put(labels, key, _read_label(archive, member, f"{member.name} of {file}"), file, member, "label")
    for found, ending in ((labels, "cls"), (texts, caption_ending)):
        lost = ["/".join(filter(None, key)) for key in found if key not in images]
        if lost:
            raise ValueError(
                f"{file}: {len(lost)} of {len(found)} .{ending} are of no image, such as {lost[0]}.{ending}; expected "
                "one of the same name, up to its first dot, for each"
            )
    return list(images.values()), [labels.get(key) for key in images], [texts.get(key) for key in images]


def _put(found: dict, key: tuple[str, str], value: Any, file: Path, member: Member, what: str) -> None:
    """Note what a sample has, once."""
    if key in found:
        raise ValueError(f"{file}: {member.name} is a second {what} of its sample; expected one each")
    found[key] = value


def _is_picture(archive: BinaryIO, member: Member, base: str) -> bool:
    """Whether a member is a picture by its name, or where that does not say by its first bytes."""
    says = is_picture_name(base)
    return starts_as_picture(_content(archive, member, NUM_FIRST_BYTES)) if says is None else says


def _content(archive: BinaryIO, member: Member, max_size: int) -> bytes:
    """The first bytes of a member; none of a link that leads nowhere."""
    if member.offset < 0:
        return b""
    archive.seek(member.offset)
    return archive.read(min(member.size, max_size))


def _read_label(archive: BinaryIO, member: Member, where: str) -> int:
    """A class number written in decimal digits."""
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{where} has {member.size} bytes; expected a class number, in {MAX_LABEL_BYTES} at most")
    text = _content(archive, member, MAX_LABEL_BYTES).decode("ascii", errors="replace").strip()
    if not text.isdecimal() or len(text) > 18:
        raise ValueError(f"{where} holds {text[:40]!r}; expected a class number, 0 or more")
    return int(text)


def _read_caption(archive: BinaryIO, member: Member, where: str) -> str:
    """A text in UTF-8."""
    check_size(member.size, 4 * MAX_CAPTION_LENGTH, where)
    try:
        return _content(archive, member, member.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: {error}") from error
