"""Pickles that write a file when they are loaded freely, and checkpoints that hold them with checksums that fit."""

import io
import json
import pickle
from pathlib import Path

import torch

from nextblock.files.atomic import file_sha256
from nextblock.training.checkpoint import MANIFEST_NAME, _manifest_sha256


class Poison:
    """What writes a file where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.write_text, (self.trace, "ran"))


def poisons(trace: Path) -> dict[str, bytes]:
    """Return pickles by the way in which they are written."""
    zipped, older = io.BytesIO(), io.BytesIO()
    torch.save({"state": Poison(trace)}, zipped)
    torch.save({"state": Poison(trace)}, older, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Poison(trace)), "zip": zipped.getvalue(), "older": older.getvalue()}


def rewrite_manifest(checkpoint: Path, *dropped: str, **changed) -> None:
    """Make a checkpoint's manifest another one, whole again."""
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest = {name: value for name, value in manifest.items() if name not in dropped} | changed
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest | {"own_sha256": _manifest_sha256(manifest)}))


def replace_file(checkpoint: Path, name: str, content: bytes | None) -> None:
    """Put another content, or none, in the place of a checkpoint's file, so that the checkpoint counts as whole."""
    path = checkpoint / name
    checksums = json.loads((checkpoint / MANIFEST_NAME).read_text())["sha256"]
    if content is None:
        path.unlink()
        del checksums[name]
    else:
        path.write_bytes(content)
        checksums[name] = file_sha256(path)
    rewrite_manifest(checkpoint, sha256=checksums)
