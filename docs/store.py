"""How the notebooks' outputs get into the repository: ``python docs/store.py 03``, or ``make notebooks`` for all.

A notebook is executed with its default parameters. Its outputs are stored when they are what a reader should meet
(`problems`) and without what differs between any two runs; otherwise the last good ones stay.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

from clipad.io.files import REPOSITORY, write_atomically
from clipad.tools.notebooks import (
    WIDGET_STATE,
    code_cells,
    faults,
    find_notebook,
    notebook_paths,
    outputs,
    own_cells,
    read_notebook,
    source_hash,
)
from clipad.tools.runner import run_notebook

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
LARGEST = 1_500_000
"""bytes of a stored notebook"""


# --- what a reader should not meet ----------------------------------------------------------------------------------


def problems(notebook) -> list[str]:
    """Faults of the run, figures without alt text, controls without a static output before them, paths of this
    machine, Python warnings outside cells tagged ``warns``, another kernel than ``python3``."""
    found = faults(notebook)
    for place, tags, output in outputs(notebook):
        found += [f"{place}: {problem}" for problem in _output_problems(output, notebook, tags)]
    before = []
    for number, cell in enumerate(code_cells(notebook), 1):
        shown = [output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})]
        if len(shown) < len(cell.outputs) and not shown and not before:
            found.append(
                f"code cell {number}: controls without a static figure or text before them"
            )
        before = shown
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for model in widgets.values():
        state = {key: value for key, value in model.get("state", {}).items() if key != "outputs"}
        found += [f"in a widget: {path}" for path in _path_problems(json.dumps(state), notebook)]
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        found.append(f"the kernel is {kernel!r}, expected 'python3'")
    return list(dict.fromkeys(found))


def _output_problems(output, notebook, tags) -> list[str]:
    if output["output_type"] == "error":
        return []  # a fault of the run
    if output["output_type"] == "stream":
        return _stream_problems(output, notebook, tags)
    metadata = output.get("metadata", {})
    found, texts = [], [json.dumps(metadata, ensure_ascii=False)]
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
            found.append(f"a figure ({kind}) without alt text")
        if not kind.startswith("image/") or kind == "image/svg+xml":
            texts.append(re.sub(r"data:image/[\w+]+;base64,[\w+/=\s]+", "", text))
    return found + _path_problems("\n".join(texts), notebook)


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


# --- storing --------------------------------------------------------------------------------------------------------


def write_notebook(notebook, path) -> None:
    """Deterministic JSON (sorted keys, indent 1, newline at the end), validated, written in one step."""
    nbformat.validate(notebook)
    write_atomically(Path(path), nbformat.writes(notebook).rstrip("\n") + "\n")


def is_in_step(path) -> bool:
    """Whether the stored outputs were made by the stored sources: `store` left the hash of the sources."""
    notebook = read_notebook(path)
    return notebook.metadata.get("clipad", {}).get("source_hash") == source_hash(notebook)


def store(path, executed_path) -> None:
    """Writes the outputs of an executed copy into the stored notebook; nothing of when, where or how long stays.

    The copy has to come from the present sources with default parameters and to have no `problems`, and the file to
    stay under `LARGEST` (ValueError otherwise, and the last good outputs stay). Cell ids stay, execution counts become
    1..n, progress bars go, and so does what only a kernel can show.
    """
    path = Path(path)
    stored, executed = read_notebook(path), read_notebook(executed_path)
    if len(own_cells(executed)) < len(executed.cells):
        raise ValueError(
            f"{path.name}: stored outputs come from the default parameters, this copy got others"
        )
    if source_hash(stored) != source_hash(executed):
        raise ValueError(f"{path.name} changed since the copy was executed: run it again")
    if found := problems(executed):
        raise ValueError(f"{path.name}: {'; '.join(found)}")
    count = 0
    for cell, done in zip(stored.cells, executed.cells, strict=True):
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
    size = len(json.dumps(stored, indent=1, ensure_ascii=False).encode())
    if size > LARGEST:
        raise ValueError(f"{path.name} has {size / 1e6:.1f} MB, the limit is {LARGEST / 1e6:g} MB")
    write_notebook(stored, path)


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


def main(names) -> int:
    """Executes and stores notebooks (all when none is named); the number of those that keep their last outputs."""
    kept = 0
    for name in names or [path.stem for path in notebook_paths()]:
        try:
            path = find_notebook(name)
            done = run_notebook(path)
            said = f"{done.status} {done.reason}"
            if done.status == "ok":
                store(path, done.output_path)
                said = "stored"
        except (ValueError, OSError) as error:
            said = str(error)
        kept += said != "stored"
        print(f"{Path(name).stem}: {said}", flush=True)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
