"""Executed and stored notebooks: the gate that an executed copy has to pass, the shape of a stored one, and how
outputs get into the repository.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from clipad.files import write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
LARGEST = 1_500_000
"""bytes of a stored notebook"""


# --- the gate -------------------------------------------------------------------------------------------------------


def gate(notebook) -> list[str]:
    """Problems of an executed notebook that its exit code does not tell.

    No ``error`` output in cells or in widgets, every code cell executed, alt text for each figure, a static output
    beside widgets, no path of this machine, no Python warning outside cells tagged ``warns``, kernel ``python3``.
    """
    problems, skipped, before = [], False, []
    for number, cell in enumerate(code_cells(notebook), 1):
        found = []
        if cell.source.strip() and cell.execution_count is None and not skipped:
            found.append("was not executed")
        for output in cell.outputs:
            found += _output_problems(output, notebook, cell.metadata.get("tags", []))
        shown = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
        if len(shown) < len(cell.outputs) and not shown and not before:
            found.append("controls without a static figure or text before them")
        before = shown
        skipped = skipped or any(map(_is_clean_exit, cell.outputs))
        problems += [f"code cell {number}: {problem}" for problem in found]
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for state in (dict(model.get("state", {})) for model in widgets.values()):
        found = [p for o in state.pop("outputs", ()) for p in _output_problems(o, notebook, [])]
        found += _path_problems(json.dumps(state), notebook)
        problems += [f"in a widget: {problem}" for problem in found]
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        problems.append(f"the kernel is {kernel!r}, expected 'python3'")
    return list(dict.fromkeys(problems))


def _output_problems(output, notebook, tags) -> list[str]:
    if _is_clean_exit(output):
        return []
    if output["output_type"] == "error":
        return [f"{output['ename']}: {output['evalue']}"]
    if output["output_type"] == "stream":
        return _stream_problems(output, notebook, tags)
    metadata = output.get("metadata", {})
    problems, texts = [], [json.dumps(metadata, ensure_ascii=False)]
    for kind, content in output["data"].items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        alts = []
        if kind.startswith("image/"):
            alts = [metadata.get(kind, {}).get("alt", "").strip()]
        elif kind == "text/html":
            tags = re.findall(r"<img\b[^>]*", text)
            alts = ["".join(re.findall(r"\balt=[\"']([^\"']+)", tag)) for tag in tags]
        # "<Figure size 640x480 ...>" describes nothing
        if any(not alt or alt.startswith("<") for alt in alts):
            problems.append(f"a figure ({kind}) without alt text")
        if not kind.startswith("image/") or kind == "image/svg+xml":
            texts.append(re.sub(r"data:image/[\w+]+;base64,[\w+/=\s]+", "", text))
    return problems + _path_problems("\n".join(texts), notebook)


def _stream_problems(output, notebook, tags) -> list[str]:
    text = output["text"]
    if output["name"] == "stderr":
        if "To exit: use 'exit'" in text:
            return []  # IPython's advice after every SystemExit
        warnings = [line for line in text.splitlines() if "Warning:" in line]
        if warnings and "warns" not in tags:
            return [f"a warning: {warnings[0].strip()[:200]}"]
    return _path_problems(_without_places(text), notebook)


def _without_places(text: str) -> str:
    """Lines that warn, without the folder of the file: ``/a/b.py:3: UserWarning: ...`` becomes ``b.py:3: ...``."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if found := re.search(r":\d+: \w*Warning:", line):
            lines[number] = line[: found.start()].rpartition("/")[2] + line[found.start() :]
    return "".join(lines)


def _path_problems(text: str, notebook) -> list[str]:
    """Absolute paths of a machine, except below a path that the user gave as a parameter."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {}).values()
    paths = [value for value in given if isinstance(value, str) and os.path.isabs(value)]
    for value in sorted(paths, key=len, reverse=True):
        text = text.replace(value, "")
    here = (Path.home(), Path.cwd(), REPOSITORY, Path(sys.prefix), Path(tempfile.gettempdir()))
    names = "|".join(re.escape(str(place)) + r"(?![\w.-])" for place in here if place.name)
    usual = r"/(?:home|Users|root|tmp|var|opt|mnt|usr|private)/[\w.~-]|[A-Z]:\\+Users\\"
    found = re.search(rf"(?<![\w.:/~<-])(?:{names}|{usual})\S*|\b(?:site|dist)-packages\S*", text)
    return [f"an absolute path of this machine: {found[0][:100]}"] if found else []


def _is_clean_exit(output) -> bool:
    """``raise SystemExit(0)``: the supported way to leave a notebook early; papermill accepts it, too."""
    return output.get("ename") == "SystemExit" and output["evalue"] in ("", "0")


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def skip_reason(notebook) -> str | None:
    """What the notebook printed before its ``raise SystemExit(0)``; None when it ran to its end."""
    for cell in code_cells(notebook):
        if any(map(_is_clean_exit, cell.outputs)):
            printed = [output.text for output in cell.outputs if output.get("name") == "stdout"]
            return " ".join(" ".join(printed).split())
    return None


def merge_streams(notebook):
    """Pieces of text between two other outputs become one of stdout and one of stderr, a progress bar its last line.

    (nbclient's own way takes a time that is quadratic in the length of a line.)
    """
    for cell in code_cells(notebook):
        merged = []
        for is_text, outputs in groupby(cell.outputs, lambda o: o.output_type == "stream"):
            outputs = list(outputs)
            if is_text:
                # in this order, because the two streams are not in step
                by_name = [[o for o in outputs if o.name == name] for name in ("stdout", "stderr")]
                outputs = [same[0] for same in by_name if same]
                for output, same in zip(outputs, filter(None, by_name), strict=True):
                    lines = "".join(piece.text for piece in same).split("\n")
                    output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
            merged += outputs
        cell.outputs = merged
    return notebook


# --- stored outputs -------------------------------------------------------------------------------------------------


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
    write_atomically(Path(path), _as_text(notebook))


def source_hash(notebook) -> str:
    """SHA-256 over type and source of the cells, without what papermill put in."""
    cells = [[cell.cell_type, cell.source] for cell in _own_cells(notebook)]
    return hashlib.sha256(json.dumps(cells, ensure_ascii=False).encode()).hexdigest()


def stored_in_step(path) -> bool:
    """Whether the stored outputs were made by the stored sources: `update_stored` left the hash of the sources."""
    notebook = read_notebook(path)
    return notebook.metadata.get("clipad", {}).get("source_hash") == source_hash(notebook)


def update_stored(path, executed_path) -> None:
    """Writes the outputs of an executed copy into the stored notebook; nothing of when, where or how long stays.

    The copy has to come from the present sources with default parameters, and the file to stay under `LARGEST`
    (ValueError otherwise, and the last good outputs stay). Cell ids stay, execution counts become 1..n, progress bars
    go, and so does what only a kernel can show.
    """
    path = Path(path)
    stored, executed = read_notebook(path), read_notebook(executed_path)
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in executed.cells):
        raise ValueError(
            f"{path.name}: stored outputs come from the default parameters, this copy got others"
        )
    if source_hash(stored) != source_hash(executed):
        raise ValueError(f"{path.name} changed since the copy was executed: run it again")
    count = 0
    for cell, done in zip(stored.cells, _own_cells(executed), strict=True):
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = [output for output in map(_tidy, done.outputs) if output]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    stored.metadata.pop("papermill", None)
    stored.metadata.get("language_info", {}).pop("version", None)
    stored.metadata.clipad = {"source_hash": source_hash(stored)}
    without_kernel(stored)
    size = len(_as_text(stored).encode())
    if size > LARGEST:
        raise ValueError(f"{path.name} has {size / 1e6:.1f} MB, the limit is {LARGEST / 1e6:g} MB")
    write_notebook(stored, path)


def _own_cells(notebook) -> list:
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [cell for cell in notebook.cells if not added & set(cell.metadata.get("tags", []))]


def _tidy(output):
    """The output without what differs between any two runs (lines of tqdm, folders of files that warn, addresses);
    None when nothing is left."""
    if plain := output.get("data", {}).get("text/plain"):
        output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", plain)
    if output.output_type != "stream" or output.name != "stderr":
        return output
    lines = re.split(r"(?<=[\n\r])", output.text)
    lines = [line for line in lines if not re.search(r"%\||\dit \[", line)]
    output.text = _without_places("".join(lines))
    return output if output.text.strip() else None


def without_kernel(notebook) -> None:
    """Leaves of widgets what works without a kernel: the HTML or text that stands beside them in an output."""
    notebook.metadata.pop("widgets", None)
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET_VIEW, None)


def _as_text(notebook) -> str:
    import nbformat

    return nbformat.writes(notebook).rstrip("\n") + "\n"
