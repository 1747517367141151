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
LARGEST_OUTPUT = 10_000_000
"""characters of one output that are looked into; more is a fault of its own"""


# --- the gate -------------------------------------------------------------------------------------------------------


def gate(notebook) -> list[str]:
    """Problems of an executed notebook that its exit code does not tell.

    No ``error`` output in cells or in widgets, every code cell executed, alt text for each figure, a static output
    beside widgets, no path of this machine, no Python warning outside cells tagged ``warns``, kernel ``python3``.
    """
    problems = []
    skipped = False
    before = []
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.source.strip() and cell.execution_count is None and not skipped:
            problems.append(f"code cell {number} was not executed")
        tags = cell.metadata.get("tags", [])
        for output in cell.outputs:
            problems += [
                f"code cell {number}: {p}" for p in _output_problems(output, notebook, tags)
            ]
        shown = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
        if len(shown) < len(cell.outputs) and not shown and not before:
            problems.append(
                f"code cell {number}: controls without a static figure or text before them"
            )
        before = shown
        skipped = skipped or any(_is_clean_exit(output) for output in cell.outputs)
    for model in _widget_models(notebook).values():
        state = dict(model.get("state", {}))
        for output in state.pop("outputs", ()):
            problems += [f"in a widget: {p}" for p in _output_problems(output, notebook, [])]
        problems += [f"in a widget: {p}" for p in _path_problems(json.dumps(state), notebook)]
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        problems.append(f"the kernel is {kernel!r}, expected 'python3'")
    return list(dict.fromkeys(problems))


def shape_problems(notebook) -> list[str]:
    """Where a stored notebook is hard to read: code lines above 100 characters, cells above 25 lines (besides the
    parameters, which are a list), not one parameters cell, a file above 1.5 MB."""
    problems = []
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code_cells(notebook)]
    if sum(tagged) != 1:
        problems.append(f"{sum(tagged)} cells are tagged `parameters`, expected 1")
    for number, (cell, listed) in enumerate(zip(code_cells(notebook), tagged, strict=True), 1):
        lines = cell.source.splitlines()
        longest = max(map(len, lines), default=0)
        if longest > 100:
            problems.append(
                f"code cell {number} has a line of {longest} characters, the limit is 100"
            )
        count = sum(bool(line.strip()) for line in lines)
        if count > 25 and not listed:
            problems.append(f"code cell {number} has {count} lines, the limit is 25")
    return problems + _too_large(notebook)


def _too_large(notebook) -> list[str]:
    size = len(_as_text(notebook).encode())
    return [f"the file has {size / 1e6:.1f} MB, the limit is 1.5 MB"] if size >= 1_500_000 else []


def _output_problems(output, notebook, tags) -> list[str]:
    if _is_clean_exit(output):
        return []
    if output["output_type"] == "error":
        return [f"{output['ename']}: {output['evalue']}"]
    if output["output_type"] == "stream":
        return _stream_problems(output, notebook, tags)
    problems, texts = [], [json.dumps(output.get("metadata", {}), ensure_ascii=False)]
    for kind, content in output["data"].items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        if len(text) > LARGEST_OUTPUT:
            return [f"an output ({kind}) of {len(text) / 1e6:.0f} MB"]
        if kind.startswith("image/"):
            alt = output.get("metadata", {}).get(kind, {}).get("alt", "").strip()
            # "<Figure size 640x480 ...>" describes nothing
            if not alt or (alt.startswith("<") and alt.endswith(">")):
                problems.append(f"a figure ({kind}) without alt text")
        elif kind == "text/html" and any(
            not re.search(r"\balt=[\"'][^\"']", tag) for tag in re.findall(r"<img\b[^>]*", text)
        ):
            problems.append("an <img> in HTML without alt text")
        if not kind.startswith("image/") or kind == "image/svg+xml":
            texts.append(re.sub(r"data:image/[\w+]+;base64,[\w+/=\s]+", "", text))
    return problems + _path_problems("\n".join(texts), notebook)


def _stream_problems(output, notebook, tags) -> list[str]:
    text = output["text"]
    if len(text) > LARGEST_OUTPUT:
        return [f"{len(text) / 1e6:.0f} MB of text on {output['name']}"]
    if output["name"] == "stderr" and "To exit: use 'exit'" in text:
        return []  # IPython's advice after every SystemExit
    warnings = [line for line in text.splitlines() if "Warning:" in line]
    if output["name"] == "stderr" and warnings and "warns" not in tags:
        return [f"a warning: {warnings[0].strip()[:200]}"]
    return _path_problems(_without_places(text), notebook)


def _without_places(text: str) -> str:
    """Lines that warn, without the folder of the file: ``/a/b.py:3: UserWarning: ...`` becomes ``b.py:3: ...``."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if found := re.search(r":\d+: \w*Warning:", line):
            place, rest = line[: found.start()], line[found.start() :]
            lines[number] = place.rpartition("/")[2] + rest
    return "".join(lines)


def _path_problems(text: str, notebook) -> list[str]:
    """Absolute paths of a machine, except below a path that the user gave as a parameter."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {}).values()
    paths = [value for value in given if isinstance(value, str) and os.path.isabs(value)]
    for value in sorted(paths, key=len, reverse=True):
        text = text.replace(value, "")
    here = (Path.home(), Path.cwd(), REPOSITORY, Path(sys.prefix), Path(tempfile.gettempdir()))
    names = "|".join(
        sorted(re.escape(str(place)) + r"(?![\w.-])" for place in here if len(place.parts) > 1)
    )
    usual = r"/(?:home|Users|root|tmp|var|opt|mnt|usr|private)/[\w.~-]|[A-Z]:\\+Users\\"
    found = re.search(rf"(?<![\w.:/~<-])(?:{names}|{usual})\S*|\b(?:site|dist)-packages\S*", text)
    return [f"an absolute path of this machine: {found[0][:100]}"] if found else []


def _is_clean_exit(output) -> bool:
    """``raise SystemExit(0)``: the supported way to leave a notebook early; papermill accepts it, too."""
    return (
        output["output_type"] == "error"
        and output["ename"] == "SystemExit"
        and output["evalue"] in ("", "0")
    )


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _widget_models(notebook) -> dict:
    return notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})


def skip_reason(notebook) -> str | None:
    """What the notebook printed before its ``raise SystemExit(0)``; None when it ran to its end."""
    for cell in code_cells(notebook):
        if any(_is_clean_exit(output) for output in cell.outputs):
            return " ".join(
                " ".join(o.text.split())
                for o in cell.outputs
                if o.output_type == "stream" and o.name == "stdout"
            )
    return None


def merge_streams(notebook):
    """Pieces of text between two other outputs become one of stdout and one of stderr, a progress bar its last line.

    (nbclient's own way takes a time that is quadratic in the length of a line.)
    """
    for cell in code_cells(notebook):
        merged = []
        for is_text, outputs in groupby(cell.outputs, lambda o: o.output_type == "stream"):
            outputs = list(outputs)
            if not is_text:
                merged += outputs
                continue
            # in this order, because the two streams are not in step
            for name in ("stdout", "stderr"):
                if same := [output for output in outputs if output.name == name]:
                    lines = "".join(output.text for output in same).split("\n")
                    same[0].text = "\n".join(map(_last_written, lines))
                    merged.append(same[0])
        cell.outputs = merged
    return notebook


def _last_written(line: str) -> str:
    """What stays on a line after its carriage returns."""
    end = "\r" if line.endswith("\r") else ""
    return line.removesuffix("\r").rpartition("\r")[2] + end


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

    The copy has to come from the present sources with default parameters, and the file to stay under 1.5 MB
    (ValueError otherwise, and the last good outputs stay). Cell ids stay,
    execution counts become 1..n, progress bars go, and so does what only a kernel can show.
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
    if problems := _too_large(stored):
        raise ValueError(f"{path.name} is not stored: {problems[0]}")
    write_notebook(stored, path)


def _own_cells(notebook) -> list:
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [cell for cell in notebook.cells if not added & set(cell.metadata.get("tags", []))]


def _tidy(output):
    """The output without what differs between any two runs: lines of tqdm, folders of files that warn, addresses.

    None when nothing is left.
    """
    if plain := output.get("data", {}).get("text/plain"):
        output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", plain)
    if output.output_type != "stream" or output.name != "stderr":
        return output
    lines = [
        line
        for line in re.split(r"(?<=[\n\r])", output.text)
        if not re.search(r"%\||\dit \[", line)
    ]
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
