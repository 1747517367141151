"""What Sphinx and myst-nb do not do for our notebooks: papermill's own cells are left out, figures keep their alt text,
and the first page lists notebooks and claims. Sphinx reads a folder that holds a copy of this one and the notebooks.
"""

import json
from pathlib import Path

import nbformat
import pandas as pd
from myst_nb.core.render import NbElementRenderer
from store import without_kernel

from clipad.tools.claims import markdown

HERE = Path(__file__).parent
NOTEBOOKS = HERE / "notebooks"


def as_read(text: str):
    """A notebook as a reader wants it: parameters folded, nothing of papermill's own cells, nothing for a kernel."""
    notebook = nbformat.reads(text, as_version=4)
    without_kernel(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if "parameters" in tags:
            tags.append("hide-input")
            cell.metadata["mystnb"] = {"code_prompt_show": "Parameters of this notebook"}
        if "injected-parameters" in tags:
            tags.append("remove-cell")
    return notebook


def _image_with_alt(self, data, _drawn=NbElementRenderer.render_image):
    """myst-nb keeps width and height of an output's metadata and drops its alt text."""
    images = _drawn(self, data)
    images[0]["alt"] = data.output_metadata.get(data.mime_type, {}).get("alt", "")
    return images


def _fill_first_page(app, name, source) -> None:
    if name == "index":
        source[0] = source[0].replace("NOTEBOOKS", _notebooks()).replace("CLAIMS", _claims())


def _notebooks() -> str:
    """A row a notebook: title with link, and how its run ended."""
    path = NOTEBOOKS / "runs.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = ["| notebook | run |", "|---|---|"]
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        title = first.splitlines()[0].lstrip("# ").strip()
        run = runs.get(path.stem)
        said = f"{run['status']}, {run['seconds'] / 60:.1f} min" if run else "stored outputs"
        rows.append(f"| [{title}](notebooks/{path.name}) | {said} |")
    return "\n".join(rows)


def _claims() -> str:
    """What `clipad run --all` wrote to claims.csv, if it is there: sentence, verdict, wide interval, notebook."""
    path = NOTEBOOKS / "claims.csv"
    if not path.is_file():
        return "The claims stand here after `make reproduce`."
    return markdown(pd.read_csv(path), "notebooks/")


def setup(app) -> dict:
    NbElementRenderer.render_image = _image_with_alt
    app.connect("source-read", _fill_first_page)
    return {"parallel_read_safe": True}
