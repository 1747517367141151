import re
from pathlib import Path

import nbformat
import pytest

from clipad.tools.book import build_book

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9HQAAAABJRU5ErkJggg=="
CHROMIUM = next(
    (p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if p.is_file()), None
)


def notebook(title, *cells):
    nb = nbformat.v4.new_notebook()
    claim = "**By the end you will have shown** that $x^2$ is a formula.\n\nMore text."
    nb.cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\n{claim}"), *cells]
    return nb


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "executed"
    folder.mkdir()
    figure = nbformat.v4.new_output("display_data", {"image/png": PNG, "text/plain": "<Image>"})
    figure.metadata["image/png"] = {"alt": 'a dot & "more"'}
    widget = nbformat.v4.new_output(
        "display_data",
        {
            "application/vnd.jupyter.widget-view+json": {"model_id": "x"},
            "text/plain": "IntSlider()",
        },
    )
    bar = nbformat.v4.new_output("stream", name="stderr", text="50%|#####     |")
    wide = "plot(x)  # " + 40 * "wider than the page "
    code = nbformat.v4.new_code_cell(wide, outputs=[figure, widget, bar], execution_count=1)
    formula = "$$m_n = \\sum_j \\tfrac12 w^j \\cos(f_n, t_1)$$"
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    text = nbformat.v4.new_markdown_cell(
        f"## Next\n\n{formula}\n\n[next](01_second.ipynb)\n\n{table}"
    )
    nbformat.write(notebook("00 · First <one>", text, code), folder / "00_first.ipynb")
    nbformat.write(notebook("01 · Second"), folder / "01_second.ipynb")
    (folder / "runs.json").write_text('{"00_first": {"status": "ok", "seconds": 90, "reason": ""}}')
    return folder


def test_pages(source, tmp_path):
    index = build_book(source, tmp_path / "book")
    contents = index.read_text(encoding="utf-8")
    assert 'href="00_first.html"' in contents
    assert "ok, 1.5 min" in contents
    page = (tmp_path / "book" / "00_first.html").read_text(encoding="utf-8")
    assert "First &lt;one&gt;" in page
    assert re.search(r"<img [^>]*alt=.a dot &amp; ", page)
    assert 'href="01_second.html"' in page
    assert 'rel="next"' in page
    assert "<math" in page
    assert "$$" not in page
    assert "IntSlider" not in page
    assert "50%|" not in page


def test_nothing_is_loaded_from_elsewhere(source, tmp_path):
    build_book(source, tmp_path / "book")
    for path in (tmp_path / "book").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert not re.search(r'(src|<link[^>]*href)="(https?:)?//', text)
        assert "@import" not in text


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="clipad run --all"):
        build_book(tmp_path, tmp_path / "book")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_offline_and_accessible(source, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    index = build_book(source, tmp_path / "book")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_context(offline=True).new_page()
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        for name in (index.name, "00_first.html"):
            page.goto((index.parent / name).as_uri())
            found = axe.Axe().run(page).response["violations"]
            serious = [v for v in found if v["impact"] in ("serious", "critical")]
            assert not serious, [(v["id"], v["nodes"][0]["html"]) for v in serious]
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in requests)
