"""Notebooks as files: find them, their parameters, and what an executed copy tells."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import nbformat

from clipad.io.files import REPOSITORY, did_you_mean
from clipad.tools.parameters import Parameter, declared

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def notebook_paths() -> list[Path]:
    """The numbered notebooks of the project, in order; ValueError where there are none."""
    found = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(f"no notebooks in {REPOSITORY}: `pip install -e .` in a clone")
    return found


def find_notebook(name: str) -> Path:
    """The one notebook whose name starts with ``name`` ("03"), or the file ``name``; ValueError if none or several."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    known = {path.stem: path for path in notebook_paths()}
    stem = name.removesuffix(".ipynb")
    fitting = [path for known_stem, path in known.items() if known_stem.startswith(stem)]
    if len(fitting) != 1:
        many = "several notebooks start" if fitting else "no notebook starts"
        hint = f"{did_you_mean(stem, known)}; known: {', '.join(known)}"
        raise ValueError(f"{many} with {name!r}{hint}")
    return fitting[0]


def read_notebook(path):
    """The notebook as an nbformat 4 node; ValueError when the file is no notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except OSError:
        raise
    except Exception as error:  # nbformat meets other JSON with whatever its own code then does
        raise ValueError(f"{path} is no Jupyter notebook ({type(error).__name__})") from error
    return notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def own_cells(notebook) -> list:
    """The cells without those that papermill put in."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [cell for cell in notebook.cells if not added & set(cell.metadata.get("tags", []))]


def source_hash(notebook) -> str:
    """SHA-256 over type and source of the notebook's own cells."""
    cells = [[cell.cell_type, cell.source] for cell in own_cells(notebook)]
    return hashlib.sha256(json.dumps(cells, ensure_ascii=False).encode()).hexdigest()


def inspect_parameters(path) -> dict[str, Parameter]:
    """The parameters of a notebook file, by name; ValueError for what `parameters.declared` refuses."""
    cells = code_cells(read_notebook(path))
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return declared("\n".join(tagged))


def outputs(notebook) -> Iterator[tuple[str, list[str], dict]]:
    """Place, the cell's tags and output: those of code cells, then those that lie in widgets."""
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            yield f"code cell {number}", cell.metadata.get("tags", []), output
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for model in widgets.values():
        for output in model.get("state", {}).get("outputs", ()):
            yield "in a widget", [], output


def faults(notebook) -> list[str]:
    """Errors in an executed notebook, also those inside widgets, where papermill does not look."""
    errors = [(place, o) for place, _, o in outputs(notebook) if o["output_type"] == "error"]
    return [f"{place}: {o['ename']}: {o['evalue']}" for place, o in errors if not is_clean_exit(o)]


def merge_streams(notebook):
    """Neighbouring pieces of text of a stream become one, and a progress bar its last line (nbclient's own way takes
    minutes for a line of 2 MB, and moves text before a figure that it followed)."""
    for cell in code_cells(notebook):
        merged = []
        for output in cell.outputs:
            if merged and output.get("name", "") == merged[-1].get("name"):
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            if output.output_type == "stream":
                lines = output.text.split("\n")
                output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
        cell.outputs = merged
    return notebook


def is_clean_exit(output) -> bool:
    """``raise SystemExit(0)``: the supported way to leave a notebook early; papermill accepts it, too."""
    return output.get("ename") == "SystemExit" and output["evalue"] in ("", "0")


def skip_reason(notebook) -> str | None:
    """What the notebook printed before its ``raise SystemExit(0)``; None when it ran to its end."""
    for cell in code_cells(notebook):
        if any(map(is_clean_exit, cell.outputs)):
            printed = [output.text for output in cell.outputs if output.get("name") == "stdout"]
            return " ".join(" ".join(printed).split())
    return None
