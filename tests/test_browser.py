"""The explorer in a real JupyterLab, in headless Chromium: what a user does, and what a user sees.

Skipped where chromium or playwright is missing (``pip install -e '.[dev]'``, and the system's package ``chromium``).
Screenshots are kept in outputs/browser/.
"""

import base64
import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from clipad.tools import runner

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "outputs" / "browser"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PATIENCE = 180_000  # milliseconds; the notebook runs in half a minute, but machines are shared

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


def quiet_settings(folder: Path) -> None:
    """All cells in the document, also those far below; no questions about news."""
    for name, text in {
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab of our own, on this machine only, that serves a copy of the notebook."""
    pytest.importorskip("jupyterlab")
    notebook = runner.read_notebook(runner.find_notebook("06"))
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
        if "parameters" in cell.metadata.get("tags", []):
            source = cell.source.replace(
                'output_dir: str = ""', f"output_dir: str = {str(tmp_path / 'out')!r}"
            )
            assert source != cell.source
            cell.source = source
    notebook.metadata.pop("widgets", None)
    served = tmp_path / "served"
    served.mkdir()
    runner.write_notebook(notebook, served / "06_explorer.ipynb")
    quiet_settings(tmp_path / "settings")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {
        f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower())
        for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    environment = os.environ | folders | {
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }  # fmt: skip
    environment.pop("MPLBACKEND", None)
    log = open(tmp_path / "lab.log", "w")  # noqa: SIM115  (open as long as the server)
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0", f"--ServerApp.root_dir={served}", "--ServerApp.allow_root=True",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "lab.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab does not answer: {(tmp_path / 'lab.log').read_text()[-3000:]}")
        yield f"{address}/lab/tree/06_explorer.ipynb?reset&token={token}"
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@pytest.fixture
def page():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync",
            ],
        )  # fmt: skip
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def photograph() -> bytes:
    """An image of the user's own: larger than the model's, not square, JPEG."""
    image = Image.new("RGB", (640, 480), (90, 100, 110))
    draw = ImageDraw.Draw(image)
    draw.ellipse((170, 90, 470, 390), fill=(40, 90, 200), outline="black", width=6)
    draw.line((250, 150, 420, 330), fill="white", width=8)
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg")
    return buffer.getvalue()


def test_a_user_moves_a_slider_uploads_an_image_and_makes_a_mistake(lab, page, record_property):
    SHOTS.mkdir(parents=True, exist_ok=True)
    elsewhere, faults = [], []
    page.on(
        "request",
        lambda r: (
            None
            if re.match(r"(https?|wss?)://127\.0\.0\.1|data:|blob:", r.url)
            else elsewhere.append(r.url)
        ),
    )
    page.on("pageerror", lambda error: faults.append(str(error)))

    page.goto(lab)
    page.get_by_role("heading", name="06 · Explorer").wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
        state="attached"
    )
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    figure = page.locator(".jupyter-widgets img[alt^='A:']")
    figure.wait_for()
    # the last cell has run: the record of the run is shown
    page.get_by_role("cell", name="weights", exact=False).last.wait_for()
    assert (
        page.locator(
            ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
        ).count()
        == 0
    )

    def source() -> str:
        return figure.get_attribute("src")

    def png() -> bytes:
        return base64.b64decode(source().split(",", 1)[1])

    def changed_from(before: str, name: str) -> float:
        """Seconds until the figure is another one; a screenshot of it is kept."""
        start = time.perf_counter()
        page.wait_for_function(
            "before => document.querySelector(\".jupyter-widgets img[alt^='A:']\").src !== before",
            arg=before, polling=5,
        )  # fmt: skip
        taken = time.perf_counter() - start
        figure.scroll_into_view_if_needed()
        page.screenshot(path=SHOTS / f"{name}.png")
        return taken

    def pixels(content: bytes):
        return Image.open(io.BytesIO(content)).convert("RGB").tobytes()

    assert (
        page.locator(".jp-RenderedImage img").count() == 1
    )  # the static figure, above the controls
    figure.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "1-controls.png")
    cut_off = """() => [...document.querySelectorAll('.jupyter-widgets .widget-label, .jupyter-widgets button')]
        .filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"""
    assert page.evaluate(cut_off) == []
    room = figure.evaluate("e => e.closest('.jp-OutputArea-output').getBoundingClientRect().right")
    assert figure.bounding_box()["x"] + figure.bounding_box()["width"] <= room

    page.set_default_timeout(60_000)

    # a slider, by keyboard
    first = png()
    before = source()
    handle = page.locator(".widget-slider", has_text="threshold").get_by_role("slider")
    for _ in range(10):
        handle.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.jupyter-widgets pre').innerText.includes('threshold 0.6')"
    )
    changed_from(before, "2-threshold")
    assert pixels(png()) != pixels(first)

    # another slider, timed from one key press to the new figure in the page
    before = source()
    start = time.perf_counter()
    page.locator(".widget-slider", has_text="smoothing").first.get_by_role("slider").press(
        "ArrowRight"
    )
    changed_from(before, "3-smoothing")
    record_property("seconds_slider_to_figure", time.perf_counter() - start)
    print(f"from key press to figure and screenshot: {time.perf_counter() - start:.2f} s")

    # an upload
    before, second = source(), png()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=re.compile("Upload an image")).click()
    chooser.value.set_files(
        {"name": "my photo.jpg", "mimeType": "image/jpeg", "buffer": photograph()}
    )
    changed_from(before, "4-upload")
    assert pixels(png()) != pixels(second)
    assert "my_photo.jpg" in page.locator(".jupyter-widgets pre").inner_text()

    # mistakes are told, and leave the figure
    before = source()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=re.compile("Upload an image")).click()
    chooser.value.set_files(
        {"name": "broken.png", "mimeType": "image/png", "buffer": photograph()[:300]}
    )
    page.get_by_role("alert").filter(has_text="broken.png").wait_for()
    name = page.locator(".widget-text", has_text="object").first.locator("input")
    name.fill("")
    name.press("Tab")
    page.get_by_role("alert").filter(has_text="no name").wait_for()
    page.screenshot(path=SHOTS / "5-mistake.png")
    assert source() == before

    assert faults == []
    assert elsewhere == []
