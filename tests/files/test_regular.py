"""Only regular files are opened, and no more of them is read than a bound allows, whatever they hold or claim."""

import json
import os
import socket

import pytest

from nextblock.files import regular
from nextblock.files.regular import (
    NotRegularError,
    TooLargeError,
    check_regular,
    is_regular,
    open_regular,
    read_content,
    read_json,
    read_text,
    read_yaml,
)


def make_pipe(path) -> None:
    os.mkfifo(path)


def make_socket(path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


SPECIAL = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("is_linked", [False, True])
def test_what_is_no_regular_file_is_named_and_not_waited_for(kind, is_linked, tmp_path):
    path = tmp_path / "x"
    SPECIAL[kind](path)
    if is_linked:
        os.symlink(path, tmp_path / "link")
        path = tmp_path / "link"
    assert not is_regular(path)
    for use in (check_regular, open_regular, read_text, read_json, read_yaml):
        with pytest.raises(NotRegularError, match=f"{path.name} is {kind}; expected a file"):
            use(path)


def test_links_to_files_are_files_and_circles_are_none(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    os.symlink("file", tmp_path / "link")
    os.symlink("circle", tmp_path / "circle")
    os.symlink("nowhere", tmp_path / "dangling")
    assert is_regular(tmp_path / "link") and read_content(tmp_path / "link", 7) == b"content"
    assert not is_regular(tmp_path / "circle") and not is_regular(tmp_path / "dangling") and not is_regular("a\0b")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "circle")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "dangling")


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(regular, "check_regular", lambda path: None)
    with pytest.raises(NotRegularError):
        open_regular(tmp_path / "x")


def test_a_file_beyond_the_bound_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)
    for read in (read_text, read_json, read_yaml):
        with pytest.raises(TooLargeError, match=f"x.json has {1 << 40} bytes; expected .* at most"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 5000, "9" * 1_000_000, '{"a": ' * 5000, "\0"], ids=lambda text: text[:6]
)
def test_what_is_no_json_is_named(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is damaged"):
        read_json(tmp_path / "x.json")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.txt is no text in UTF-8"):
        read_text(tmp_path / "x.txt")


def bomb() -> str:
    """Nine lists of nine aliases each: half a billion values in a few lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "holds [0-9]{9} values by its aliases; expected 1000000 at most"),
        ("a: &a [*a]", "an alias refers to what it lies in"),
        ("a: &a {b: *a}", "an alias refers to what it lies in"),
        ("&a ? *a\n: 1", "is no YAML"),
        ("[" * 700, "is no YAML that can be read"),
        ("a: [", "is no YAML that can be read"),
        ("a: \x00", "is no YAML that can be read"),
        ("a: *b", "is no YAML that can be read"),
        ("a: " + "9" * 5000, "is no YAML that can be read: Exceeds the limit"),
        ("a: 2024-99-99", "is no YAML that can be read: month must be"),
        ("a: !!python/object/apply:os.system [true]", "is no YAML that can be read: could not determine"),
        ("a: !!int x", "is no YAML that can be read"),
        ("? {a: 1}\n: 1", "is no YAML that can be read: .*unhashable"),
    ],
    ids=range(13),
)
def test_yaml_that_cannot_be_meant_is_named(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "x.yaml")


def test_good_files_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {b: [1, 2]}\nc: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") is None
    (tmp_path / "x.json").write_text(json.dumps({"größe": [1, None]}, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"größe": [1, None]}
