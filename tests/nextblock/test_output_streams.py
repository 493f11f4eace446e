"""Standard streams whose reader has gone, whose disk is full, or that were closed: no work lost, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(script: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of bash in which `nextblock` is this python's."""
    define = f"nextblock() {{ '{sys.executable}' -m nextblock \"$@\"; }}\n"
    return subprocess.run(["bash", "-c", define + script], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    done = run(
        """
        nextblock --version 2>errors | true; echo "version ${PIPESTATUS[0]}"
        nextblock --help 2>errors | head -1 >first; echo "help ${PIPESTATUS[0]}"
        nextblock nothing 2>&1 | true; echo "nothing ${PIPESTATUS[0]}"
        """,
        tmp_path,
    )
    assert (done.stdout, done.stderr) == ("version 0\nhelp 0\nnothing 2\n", "")
    assert (tmp_path / "errors").read_text() == ""
    assert (tmp_path / "first").read_text().startswith("usage: nextblock")


def test_what_exists_to_be_printed_and_cannot_be_is_an_error(tmp_path):
    done = run(
        """
        nextblock config >/dev/full; echo "full $?"
        nextblock --help >/dev/full; echo "help $?"
        nextblock --help >&-; echo "closed $?"
        nextblock --help >&- 2>&-; echo "both $?"
        nextblock nothing 2>/dev/full; echo "errors $?"
        """,
        tmp_path,
    )
    assert done.stdout == "full 1\nhelp 1\nclosed 1\nboth 1\nerrors 2\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all("nextblock: what was printed could not be written: " in line for line in lines)
    assert "No space left" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>&1 | head -c1", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_training_outlives_its_output(streams, tokenizer_arguments, tmp_path):
    arguments = " ".join(f"'{argument}'" for argument in tokenizer_arguments)
    done = run(f'nextblock train-tokenizer {arguments} --output_dir run {streams}; echo "${{PIPESTATUS[0]}}"', tmp_path)
    assert done.stdout.endswith("0\n") and "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert '"outcome": "finished"' in (tmp_path / "run" / "run.json").read_text()
