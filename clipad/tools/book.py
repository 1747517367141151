"""The executed notebooks as one HTML site that needs no network: ``clipad book``.

nbconvert renders the cells; formulas become MathML, which browsers draw themselves, so that no script is loaded from
anywhere. Figures keep their alt text.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as latex_to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from clipad.files import write_atomically

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class _Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML."""

    def block_math(self, body: str) -> str:
        return f'<div class="formula" tabindex="0">{_mathml(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def _mathml(latex: str, display: str) -> str:
    return latex_to_mathml(" ".join(latex.split()), display=display)


def _markdown(source: str) -> str:
    return MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True)).render(
        source
    )


@dataclass(frozen=True)
class Page:
    """One notebook: its file, its title and claim, how its run ended."""

    path: Path
    title: str
    claim: str
    status: str

    @property
    def name(self) -> str:
        return f"{self.path.stem}.html"


def build_book(source: str | Path, output_dir: str | Path) -> Path:
    """The notebooks of a folder as HTML pages with contents, previous and next; returns the first page.

    ``source``: a folder of executed notebooks; the ``runs.json`` of ``clipad run`` in it gives status and duration.
    Raises FileNotFoundError if the folder has no notebooks.
    """
    source, output_dir = Path(source), Path(output_dir)
    paths = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"{source} holds no notebooks: run `clipad run --all` first, or name another folder"
        )
    runs = (
        json.loads((source / "runs.json").read_text()) if (source / "runs.json").is_file() else {}
    )
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    pages = [_page(path, notebooks[path], runs.get(path.stem)) for path in paths]

    output_dir.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(template_name="basic")
    exporter.register_filter("markdown2html", _markdown)
    for number, page in enumerate(pages):
        body, _ = exporter.from_notebook_node(_static(notebooks[page.path]))
        body = re.sub(r'href="([0-9]{2}_\w+)\.ipynb"', r'href="\1.html"', body)
        # What is too wide scrolls, by keyboard, too.
        body = re.sub(r"<(table|pre)\b(?![^>]*tabindex)", r'<\1 tabindex="0"', body)
        before = pages[number - 1] if number else None
        after = pages[number + 1] if number + 1 < len(pages) else None
        links = [
            f'<a href="{before.name}" rel="prev">← {html.escape(before.title)}</a>'
            if before
            else "<span></span>",
            '<a href="index.html">Contents</a>',
            f'<a href="{after.name}" rel="next">{html.escape(after.title)} →</a>'
            if after
            else "<span></span>",
        ]
        text = _PAGE.format(
            title=html.escape(page.title),
            links="".join(links),
            status=html.escape(page.status),
            body=body,
        )
        write_atomically(output_dir / page.name, text)
    rows = "".join(
        f'<tr><td><a href="{p.name}">{html.escape(p.title)}</a></td><td>{_markdown(p.claim)}</td>'
        f"<td>{html.escape(p.status)}</td></tr>"
        for p in pages
    )
    write_atomically(output_dir / "index.html", _INDEX.format(rows=rows))
    write_atomically(output_dir / "book.css", _CSS + _highlighting())
    return output_dir / "index.html"


def _page(path: Path, notebook, run: dict | None) -> Page:
    first = notebook.cells[0].source
    title = first.splitlines()[0].lstrip("# ").strip()
    claims = re.findall(
        r"\*\*By the end you will have shown\*\*\s*(.*?)(?:\n\n|$)", first, flags=re.S
    )
    if run is None:
        executed = all(
            cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code"
        )
        status = "stored outputs" if executed else "not executed"
    else:
        status = f"{run['status']}, {run['seconds'] / 60:.1f} min" + (
            f": {run['reason']}" if run["reason"] else ""
        )
    return Page(path, title, claims[0].strip(", \n") if claims else "", status)


def _static(notebook):
    """Without what needs a kernel, and without the noise of progress bars."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            if WIDGET_MIME in data:
                note = "*Controls: open the notebook in JupyterLab to use them.*"
                output = nbformat.v4.new_output("display_data", {"text/markdown": note})
            if not (output.output_type == "stream" and output.name == "stderr"):
                kept.append(output)
        cell.outputs = kept
    notebook.metadata.pop("widgets", None)
    return notebook


def _highlighting() -> str:
    return (
        HtmlFormatter(style="xcode")
        .get_style_defs(".highlight")
        .replace("background: #ffffff;", "")
    )


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · clipad</title><link rel="stylesheet" href="book.css"></head>
<body>
<nav aria-label="Notebooks">{links}</nav>
<main>
<p class="status">Run: {status}</p>
{body}
</main>
</body>
</html>
"""

_INDEX = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>clipad: CLIP-AD step by step</title><link rel="stylesheet" href="book.css"></head>
<body>
<main>
<h1>clipad: CLIP-AD step by step</h1>
<p>Zero-shot anomaly detection with a language-guided staged dual path (arXiv 2311.00453), reproduced in notebooks.</p>
<table tabindex="0">
<thead><tr><th scope="col">notebook</th><th scope="col">by the end you will have shown</th>
<th scope="col">run</th></tr></thead>
<tbody>{rows}</tbody>
</table>
</main>
</body>
</html>
"""

_CSS = """
body { font: 17px/1.6 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 }
main { max-width: 54rem; margin: 0 auto; padding: 1rem }
nav { display: flex; justify-content: space-between; gap: 1rem; max-width: 54rem; margin: 0 auto; padding: 1rem }
a { color: #0b4f9e }
h1, h2, h3 { line-height: 1.25; margin-top: 1.6em }
.status { color: #555; font-size: .9rem }
.formula { overflow-x: auto; padding: .4rem 0 }
pre { font: 14px/1.45 ui-monospace, monospace; overflow-x: auto; margin: .4rem 0 }
.output_text pre { white-space: pre-wrap }
.input_area pre { background: #f4f4f4; padding: .7rem .9rem; border-radius: 4px }
.prompt { display: none }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .93rem; margin: .8rem 0 }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ccc; vertical-align: top }
img { max-width: 100%; height: auto }
details { border-left: 3px solid #999; padding-left: .8rem; margin: .6rem 0 }
"""
