"""Notebooks as files: find, read and write them, their parameters, and what an executed copy tells."""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from clipad.files import did_you_mean, write_atomically
from clipad.tools.parameters import Parameter, declared

REPOSITORY = Path(__file__).resolve().parents[2]
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def notebook_paths() -> list[Path]:
    """The numbered notebooks of the project, in order; ValueError where there are none."""
    found = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(
            f"there are no notebooks in {REPOSITORY / 'notebooks'}: they lie beside the package in a clone of the "
            "repository; install from it with `pip install -e .`"
        )
    return found


def find_notebook(name: str) -> Path:
    """The one notebook whose name starts with ``name`` ("03"), or the file itself when ``name`` is a path of one.

    Raises ValueError with the nearest names when none or several fit.
    """
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    known = {path.stem: path for path in notebook_paths()}
    stem = name.removesuffix(".ipynb")
    fitting = [known_stem for known_stem in known if stem and known_stem.startswith(stem)]
    if len(fitting) > 1:
        raise ValueError(f"{name!r} fits several notebooks: {', '.join(fitting)}")
    if not fitting:
        hint = did_you_mean(stem, known)
        raise ValueError(f"no notebook starts with {name!r}{hint}; known: {', '.join(known)}")
    return known[fitting[0]]


def read_notebook(path):
    """The notebook as an nbformat 4 node; ValueError when the file is no notebook."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except OSError:
        raise
    except Exception as error:  # nbformat meets other JSON with whatever its own code then does
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is no Jupyter notebook: {said[0][:200]}") from None
    return notebook


def write_notebook(notebook, path) -> None:
    """Deterministic JSON (sorted keys, indent 1, newline at the end), validated, written in one step."""
    import nbformat

    nbformat.validate(notebook)
    write_atomically(Path(path), nbformat.writes(notebook).rstrip("\n") + "\n")


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
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    name = Path(path).name
    if len(sources) != 1:
        raise ValueError(f"{name}: expected one cell tagged `parameters`, found {len(sources)}")
    return declared(sources[0], name)


# --- executed copies ------------------------------------------------------------------------------------------------


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
    """What went wrong in an executed notebook, also where papermill calls it good: errors inside widgets."""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"code cell {number}: was not executed")
        if any(map(is_clean_exit, cell.outputs)):
            break
    for place, _, output in outputs(notebook):
        if output["output_type"] == "error" and not is_clean_exit(output):
            found.append(f"{place}: {output['ename']}: {output['evalue']}")
    return found


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


def merge_streams(notebook):
    """Pieces of text between two other outputs become one of stdout and one of stderr, a progress bar its last line.

    (nbclient's own way takes a time that is quadratic in the length of a line.)
    """
    for cell in code_cells(notebook):
        merged = []
        for is_text, group in groupby(cell.outputs, lambda o: o.output_type == "stream"):
            pieces = list(group)
            if not is_text:
                merged += pieces
                continue
            for name in ("stdout", "stderr"):  # the two streams are not in step
                same = [piece for piece in pieces if piece.name == name]
                lines = "".join(piece.text for piece in same).split("\n")
                for output in same[:1]:
                    output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
                    merged.append(output)
        cell.outputs = merged
    return notebook
