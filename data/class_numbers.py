"""Classes that have no names go by number; columns of identifiers and of texts are not taken for ones of classes."""

from collections.abc import Sequence

# The largest published set of classes, ImageNet-21k, has fewer.
_MANY_CLASSES = 25_000
# No name of a class is longer; a text of megabytes is none.
MAX_NAME_LENGTH = 1000


def numbered_classes(num_classes: int, num_images: int, where: str) -> list[str]:
    """Names classes by their numbers.

    Args:
        num_classes: one more than the largest label.
        num_images: that have these labels, in all splits.
        where: the labels come from, for a message.

    Returns:
        The names.

    Raises:
        ValueError: if there are more classes than any set has, and not even two images for each.
    """
    if num_classes > max(_MANY_CLASSES, num_images // 2):
        raise ValueError(
            f"{where} holds labels up to {num_classes - 1} for {num_images} images, which would make {num_classes} "
            "classes; expected labels from 0 without gaps. Identifiers are no classes: leave the labels out "
            "(label_column null), or number the classes that occur"
        )
    return [str(label) for label in range(num_classes)]


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses texts that are no names of classes, by their length.

    Args:
        names: of the classes.
        where: they come from, for a message.

    Raises:
        ValueError: naming the beginning of such a text.
    """
    longest = max(names, key=len, default="")
    if len(longest) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{where} holds a name of {len(longest)} characters, {longest[:40]!r}…; expected {MAX_NAME_LENGTH} at most"
        )
