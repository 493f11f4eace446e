"""The demo page as a user meets it: started by its command, opened in headless Chromium."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image

pytest.importorskip("gradio")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]
# The page is its own: nothing else is looked up, and no window system or sandbox is needed.
BROWSER_OPTIONS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --hide-scrollbars
    --window-size=1300,1000 --virtual-time-budget=20000
""".split()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen, log) -> None:
    for _ in range(600):
        try:
            urlopen(address, timeout=10).close()
            return
        except URLError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(f"no answer:\n{log.read_text()}")


@pytest.fixture(scope="module")
def address(build_pipeline, tmp_path_factory):
    """The address of a page that a process of its own serves."""
    folder = tmp_path_factory.mktemp("demo")
    build_pipeline().save_pretrained(folder / "pipeline")
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "nextblock", "demo", "--pipeline", str(folder / "pipeline")]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--cpu", "true"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert "Traceback" not in log.read_text()


def browse(address: str, folder, *options: str) -> str:
    """Open a page with a fresh profile and return what Chromium prints."""
    command = [BROWSER, *BROWSER_OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dom(address, tmp_path_factory) -> str:
    """What the page's scripts have made of it, without the scripts."""
    text = browse(address, tmp_path_factory.mktemp("dom"), "--dump-dom")
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def picture_addresses(dom: str) -> list[str]:
    return re.findall(r'<img[^>]*src="([^"]*/file=[^"]*\.png)"', dom)


def test_the_page_shows_its_tabs_classes_and_samples(dom):
    tabs = re.findall(r'<button[^>]*role="tab"[^>]*>\s*([\w-]+)', dom)
    assert set(tabs) == {"Sample", "Reconstruct", "In-paint", "Interpolate"}
    for text in ("blue tit", "great tit", "wren", "Generate", "16×16 pixels", "block 3 of 3: 4×4 tokens"):
        assert text in dom
    # Four samples of each class, and a picture of them after each of three blocks.
    assert len(picture_addresses(dom)) == 3 * 4 + 3


def test_the_samples_are_painted_pixel_by_pixel(address, dom, tmp_path):
    browse(address, tmp_path, f"--screenshot={tmp_path / 'page.png'}")
    page = Image.open(tmp_path / "page.png").convert("RGB")
    assert page.size == (1300, 1000)
    painted = {color for _, color in page.getcolors(1300 * 1000)}
    for sample in picture_addresses(dom)[:12]:
        with urlopen(sample, timeout=60) as file:
            colors = {color for _, color in Image.open(file).convert("RGB").getcolors()}
        assert len(colors) > 100 and len(colors & painted) > 0.9 * len(colors)
