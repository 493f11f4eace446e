"""Freed memory is used again: a large block costs its pages once and not every time."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
from nextblock.cpu import keep_freed_memory

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_block()
given_back = faults_of_a_block()
assert keep_freed_memory()
faults_of_a_block()
print(given_back, faults_of_a_block())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_block_is_used_again():
    output = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, output.split())
    # 64 MiB in pages of at most 2 MiB.
    assert given_back >= 32 and kept <= 4


def test_another_c_library_is_left_alone(monkeypatch):
    from nextblock.cpu import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
