"""The explorer in headless Chromium, as a page without a kernel and in a real JupyterLab: what a user does and sees.

Skipped where chromium or playwright is missing (``pip install -e '.[dev]'``, and the system's package ``chromium``).
Screenshots are kept in outputs/browser/.
"""

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

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageDraw

import clipad
from clipad.studies.experiments import Experiment
from clipad.studies.explorer.model import Explorer
from clipad.studies.explorer.widget import Viewer
from clipad.tools import notebooks

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
    notebook = notebooks.read_notebook(notebooks.find_notebook("06"))
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
    nbformat.write(notebook, served / "06_explorer.ipynb")
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
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync",
            ],
        )  # fmt: skip
        yield browser
        browser.close()


class Visit:
    """A page with what it asks of other hosts and what goes wrong in it."""

    def __init__(self, browser, width=1280, height=1500, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.page, self.elsewhere, self.faults = context.new_page(), [], []
        self.page.set_default_timeout(PATIENCE)
        near = re.compile(r"(https?|wss?)://127\.0\.0\.1|data:|blob:|file:")
        self.page.on(
            "request", lambda r: None if near.match(r.url) else self.elsewhere.append(r.url)
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def pixels(self, name="picture", side=0) -> str:
        """What a canvas shows."""
        canvas = self.page.locator(f"[data-is={name}]").nth(side)
        return canvas.evaluate("c => c.toDataURL()")

    def text(self, name, side=0) -> str:
        return self.page.locator(f"[data-is={name}]").nth(side).inner_text()

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def serious(self, selector) -> list[str]:
        """What axe calls serious or worse."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        found = axe.run(self.page, context=selector).response["violations"]
        return [f"{v['id']}: {v['help']}" for v in found if v["impact"] in ("serious", "critical")]


CLICKS = """async () => {
  const canvas = document.querySelector("[data-is=picture]"), box = canvas.getBoundingClientRect(), taken = [];
  for (let i = 0; i < 50; i++) {
    const clientX = box.left + ((i * 37) % 100) / 100 * box.width;
    const clientY = box.top + ((i * 61) % 100) / 100 * box.height;
    const start = performance.now();
    canvas.dispatchEvent(new MouseEvent("click", { clientX, clientY, bubbles: true }));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    taken.push(performance.now() - start);
  }
  return taken.sort((a, b) => a - b)[25];
}"""


@pytest.fixture(scope="module")
def still_page(tmp_path_factory):
    """The image widget as it stands in a stored notebook or in the book: one HTML file."""
    folder = tmp_path_factory.mktemp("page")
    dataset = clipad.load_dataset("demo", categories=["screw"])
    run = Experiment(
        "06_explorer", {}, clipad.load_backbone("demo"), dataset, clipad.protocol("demo"),
        clipad.load_prompts(), folder, seed=0,
    )  # fmt: skip
    explorer = Explorer(run)
    first = explorer.settings()
    text = Viewer(explorer, [first, explorer.beside(first)]).html()
    path = folder / "explorer.html"
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Explorer</title>"
        "<style>:root { color-scheme: light dark } body { font-family: sans-serif }</style>"
        f"<main><h1>Explorer</h1>{text}</main></html>",
        encoding="utf-8",
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_without_a_kernel_it_fits_and_can_be_read(still_page, browser, width, scheme):
    visit = Visit(browser, width, 1000, scheme)
    visit.page.goto(still_page.as_uri())
    visit.page.locator(".clipad-explorer").wait_for()
    visit.page.wait_for_timeout(300)
    visit.shot(f"still-{scheme}-{width}")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.serious(".clipad-explorer") == []
    assert visit.faults == visit.elsewhere == []


@pytest.mark.slow
def test_without_a_kernel_clicks_keys_and_sliders_are_answered(
    still_page, browser, record_property
):
    visit = Visit(browser)
    page = visit.page
    page.goto(still_page.as_uri())
    canvas = page.locator("[data-is=picture]").first
    canvas.wait_for()
    page.wait_for_timeout(300)

    before = {name: visit.pixels(name, side) for side in (0, 1) for name in ("qk", "vv")}
    words = visit.text("cosines")
    canvas.click(position={"x": 20, "y": 20})
    assert visit.text("value").startswith("patch (1, 1)")
    assert visit.text("value", 1).startswith("patch (1, 1)")  # the cursor is linked
    assert visit.text("cosines") != words
    assert {n: visit.pixels(n, side) for side in (0, 1) for n in ("qk", "vv")} != before

    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        canvas.press(key)
    page.mouse.move(0, 0)
    assert visit.text("value").startswith("patch (3, 1)")
    assert "row 3, column 1" in page.locator("[data-is=status]").inner_text()

    for name, key in (("opacity", "Home"), ("falseAlarms", "End"), ("smoothing", "End")):
        seen = visit.pixels()
        page.locator(f"[data-is={name}]").first.press(key)
        assert visit.pixels() != seen, name
    for name in ("truth", "contour"):
        seen = visit.pixels()
        page.locator(f"[data-is={name}]").press("Space")
        assert visit.pixels() != seen, name
    page.locator("[data-is=opacity]").press("End")
    for box in ("[data-stage='3']", "[data-is=surgery]"):
        seen, other = visit.pixels(), visit.pixels(side=1)
        page.locator(box).first.press("Space")
        assert visit.pixels() != seen, box
        assert visit.pixels(side=1) == other  # B has settings of its own
    page.locator("[data-is=shows]").nth(1).select_option("0")
    page.locator("[data-stage='3']").nth(1).press("Space")
    page.locator("[data-is=surgery]").nth(1).press("Space")
    page.locator("[data-is=smoothing]").nth(1).press("End")
    assert visit.pixels(side=1) == visit.pixels()  # A's image with A's settings

    with page.expect_download() as download:
        page.get_by_role("button", name="map (.npy)").first.click()
    assert np.load(download.value.path()).shape == (96, 96)

    taken = page.evaluate(CLICKS)
    record_property("milliseconds_click_to_drawn", taken)
    print(f"from click to drawn panel, median of 50: {taken:.0f} ms")
    assert visit.faults == visit.elsewhere == []


def photograph() -> bytes:
    """An image of the user's own: larger than the model's, not square, JPEG."""
    image = Image.new("RGB", (640, 480), (90, 100, 110))
    draw = ImageDraw.Draw(image)
    draw.ellipse((170, 90, 470, 390), fill=(40, 90, 200), outline="black", width=6)
    draw.line((250, 150, 420, 330), fill="white", width=8)
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg")
    return buffer.getvalue()


@pytest.mark.slow
def test_in_jupyterlab_a_user_asks_uploads_and_errs(lab, browser, record_property):
    visit = Visit(browser)
    page = visit.page
    page.goto(lab)
    page.get_by_role("heading", name="06 · Explorer").wait_for()
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first
    idle.wait_for(state="attached")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jupyter-widgets .clipad-explorer").wait_for()
    page.get_by_role("cell", name="weights", exact=False).last.wait_for()  # the record of the run
    stderr = "[data-mime-type='application/vnd.jupyter.stderr']"
    assert page.locator(f".jp-OutputArea-output{stderr}").count() == 0
    page.set_default_timeout(60_000)

    panel = ".jp-OutputArea-output:has(.clipad-explorer)"
    page.locator(panel).scroll_into_view_if_needed()
    page.locator(panel).screenshot(path=SHOTS / "lab-panel.png")
    cut_off = """() => [...document.querySelectorAll('.jupyter-widgets .widget-label, .jupyter-widgets button')]
        .filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"""
    assert page.evaluate(cut_off) == []
    assert visit.serious(panel) == []

    def changed(act) -> float:
        """Milliseconds until image A is drawn anew."""
        page.evaluate("""() => { const c = document.querySelector("[data-is=picture]");
          window.before = c.toDataURL(); window.seen = new Promise((done) => { const look = () =>
            c.toDataURL() === window.before ? requestAnimationFrame(look) : done(performance.now());
            window.begun = performance.now(); look(); }); }""")
        act()
        return page.evaluate("() => window.seen.then((end) => end - window.begun)")

    field = page.get_by_label("normal", exact=True)
    times = []
    for words in ("perfect", "unblemished", "flawless", "{} without scratch", "{} without crack"):
        field.fill(words)
        times.append(changed(lambda: field.press("Enter")))
    record_property("milliseconds_words_to_map", sorted(times))
    print(f"from words to new map, median of 5: {sorted(times)[2]:.0f} ms")
    page.locator(".jupyter-widgets pre").filter(has_text="without crack").wait_for()

    # A click changes the command, too: the kernel hears of it.
    page.locator("[data-is=picture]").first.click(position={"x": 15, "y": 15})
    page.wait_for_function(
        "() => document.querySelector('.jupyter-widgets pre').innerText.includes('look\": [1, 1, 12]')"
    )

    # Forty changes in a row end in the last one.
    name = page.get_by_label("object", exact=True)
    for number in range(40):
        name.fill("screw" if number == 39 else f"nut{'' if number % 2 else ' bolt'}")
        name.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('[data-is=title]').innerText.endsWith('screw')"
        " && !document.querySelector('.jupyter-widgets pre').innerText.includes('object_name')"
    )

    # Mistakes are told beside their control, and what was shown stays.
    seen = visit.pixels()
    name.fill("")
    name.press("Tab")
    page.get_by_role("alert").filter(has_text="no name").wait_for()
    field.fill("{")
    field.press("Tab")
    page.get_by_role("alert").filter(has_text="braces").wait_for()
    assert visit.pixels() == seen
    name.fill("screw")
    name.press("Tab")
    field.fill("flawless")
    field.press("Tab")
    page.wait_for_function("() => !document.querySelector('[role=alert]')")

    button = page.get_by_role("button", name=re.compile("Upload an image"))
    for file, content, told in (
        ("my photo.jpg", photograph(), "asked about as"),
        ("broken.png", photograph()[:300], "broken.png"),
    ):
        with page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files({"name": file, "mimeType": "image/*", "buffer": content})
        page.get_by_role("alert").filter(has_text=told).wait_for()
    assert "my_photo.jpg" in page.locator(".jupyter-widgets pre").inner_text()
    page.locator(panel).screenshot(path=SHOTS / "lab-upload.png")
    assert visit.faults == visit.elsewhere == []
