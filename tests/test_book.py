"""The book: pages that need nothing from elsewhere and that everybody can read."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg=="
CHROMIUM = next(
    (p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if p.is_file()), None
)
ALIVE = """<div id="here"></div><script>{
  const button = document.createElement("button");
  button.textContent = "1 click";
  button.onclick = () => { button.textContent = "2 clicks"; };
  document.getElementById("here").append(button);
}</script>"""
CLAIMS = """id,sentence,source,metric,verdict,estimate,low,high,low_wide,high_wide,level,scope,p,measured,notebook
a,four beat one,paper 3.2,pixel_pro,higher,0.015,0.01,0.02,0.007,0.043,0.0,images,0.01,"PRO +1.5 [+0.7, +4.3]",00_first
b,the loop is the module's,ours,,holds,,,,,,0.0,exact,,,01_second
"""


def output(data, **metadata):
    return nbformat.v4.new_output("display_data", data, metadata=metadata)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Two small notebooks, built."""
    folder = tmp_path_factory.mktemp("executed")
    code = nbformat.v4.new_code_cell
    figure = output({"image/png": PNG}, **{"image/png": {"alt": 'a dot & "more"', "width": 300}})
    wide = output({"text/html": f"<table><tr>{'<td>0.123456</td>' * 60}</tr></table>"})
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "gone"}}
    views = [output(view | {"text/html": ALIVE}), output(view | {"text/plain": "[controls]"})]
    bar = nbformat.v4.new_output("stream", name="stderr", text="50%|#####     |")
    cells = [
        nbformat.v4.new_markdown_cell("# 00 · First <one>\n\nSee [the map](../clipad/METHOD.md)."),
        code("seed: int = 0", metadata={"tags": ["parameters"]}, execution_count=1),
        code("# Parameters\nseed = 1", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_markdown_cell(
            "## Next\n\n$$m_n = \\tfrac12 w^j$$\n\n[next](01_second.ipynb)"
        ),
        code("plot(x)  # " + 40 * "wider than the page ", outputs=[figure, wide, *views, bar]),
    ]
    first = nbformat.v4.new_notebook(cells=cells)
    first.metadata.language_info = {"name": "python", "pygments_lexer": "python"}
    state = {"version_major": 2, "version_minor": 0, "state": {}}
    first.metadata.widgets = {"application/vnd.jupyter.widget-state+json": state}
    nbformat.write(first, folder / "00_first.ipynb")
    second = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 01 · Second")])
    nbformat.write(second, folder / "01_second.ipynb")
    (folder / "runs.json").write_text('{"00_first": {"status": "ok", "seconds": 90, "reason": ""}}')
    (folder / "claims.csv").write_text(CLAIMS)
    command = [sys.executable, ROOT / "docs" / "build.py", folder, folder / "book"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder / "book"


def pages(book):
    return {path: path.read_text(encoding="utf-8") for path in book.rglob("*.html")
            if "_static" not in path.parts}  # fmt: skip


@pytest.mark.slow
def test_a_notebook_becomes_a_page(book):
    page = (book / "notebooks" / "00_first.html").read_text(encoding="utf-8")
    assert 'alt="a dot &amp; &quot;more&quot;"' in page
    folded = page.split("<details", 1)[1].split("</details>")[0]
    assert "seed" in folded
    assert "# Parameters" not in page
    assert "50%|" not in page
    assert "../_sources/notebooks/00_first.ipynb" in page  # to download


@pytest.mark.slow
def test_the_first_page_has_notebooks_and_claims(book):
    page = (book / "index.html").read_text(encoding="utf-8")
    assert 'href="notebooks/00_first.html"' in page
    assert "ok, 1.5 min" in page
    text = re.sub(r"<[^>]+>", "", page)
    assert "four beat one" in text
    assert "PRO +1.5 [+0.7, +4.3]" in text


@pytest.mark.slow
def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(book):
    for path, text in pages(book).items():
        assert len(text) < 3e6
        for kind, target in re.findall(r'\b(href|src)="([^"#?]+)', text):
            if re.match(r"(https?:)?//", target):
                assert kind == "href", target
                assert (
                    "<link"
                    not in text[text.index(target) - 200 : text.index(target)].split(">")[-1]
                )
            elif not re.match(r"data:|mailto:", target):
                assert (path.parent / unescape(target)).exists(), f"{path.name}: {target}"


@pytest.mark.slow
def test_what_is_no_book_is_left_alone(book, tmp_path):
    (tmp_path / "mine.txt").touch()
    for source, output in ((tmp_path, book), (book.parent, tmp_path)):
        command = [sys.executable, ROOT / "docs" / "build.py", source, output]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert (tmp_path / "mine.txt").exists()
    assert (book / "index.html").exists()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_without_network_or_server(book, scheme, width):
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(
            offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        page = context.new_page()
        requests, faults = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((book / "notebooks" / "00_first.html").as_uri())
        page.locator("mjx-container").wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.get_by_role("button", name="1 click").click()
        page.get_by_role("button", name="2 clicks").wait_for()
        page.get_by_text("[controls]").wait_for()
        page.goto((book / "search.html").as_uri() + "?q=first")
        page.locator("#search-results a").first.wait_for()
        for name in ("index.html", "notebooks/00_first.html", "clipad/METHOD.html"):
            page.goto((book / name).as_uri())
            found = axe.Axe().run(page).response["violations"]
            serious = [v for v in found if v["impact"] in ("serious", "critical")]
            assert not serious, [(v["id"], v["nodes"][0]["html"]) for v in serious]
        browser.close()
    assert faults == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
