"""Names of the classes of published models, as data beside this file."""

import json
from importlib import resources


def imagenet_class_names() -> list[str]:
    """Return the 1000 names of ILSVRC 2012 in the order of its labels: a class's first name, none twice."""
    path = resources.files(__package__) / "imagenet_classes.json"
    return json.loads(path.read_text(encoding="utf-8"))
