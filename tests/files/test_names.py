"""Names that are no UTF-8 become text and come back."""

import json
import os

import pytest

from nextblock.files.names import escaped_name, printable, restored_name

NAMES = [b"plain.png", "Größe 日本.png".encode(), b"caf\xe9.png", b"\xff\xfe", b"\\xe9", b"\\x\xe9", b"\\\xe9"]
NAMES += [b"\\\\xe9", b"\\x5cxe9", b"a\\b.png", b"\xe6\x97", b"\xed\xb3\xa9", b"\\x4", b"x\n\t"]


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back(name):
    text = escaped_name(os.fsdecode(name))
    assert os.fsencode(restored_name(text)) == name
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text


def test_no_two_names_become_one():
    assert len({escaped_name(os.fsdecode(name)) for name in NAMES}) == len(NAMES)


def test_ordinary_names_stay_as_they_are():
    for name in ("plain.png", "Größe/日本.png", "a\\b.png", "x\n"):
        assert escaped_name(name) == name
    assert escaped_name("caf\udce9.png") == "caf\\xe9.png"


def test_messages_can_be_written():
    assert printable("no caf\udce9") == "no caf\\udce9"
