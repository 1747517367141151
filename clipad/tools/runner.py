"""papermill made strict: wrong parameters are refused before a kernel starts, and an error in a widget fails a run."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from clipad.io.files import write_atomically
from clipad.tools import notebooks
from clipad.tools.parameters import require_known

KERNEL = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # another one would lose each figure
    "PYTHONWARNINGS": "",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the debugger's remark about frozen modules
}
"""environment of the kernel, which changes outputs otherwise"""


def plan(paths, values: dict) -> list[tuple[Path, dict]]:
    """Each notebook with those of the values that it has, checked; ValueError for a name that no notebook has."""
    known = {path: notebooks.inspect_parameters(path) for path in paths}
    names = {name: None for own in known.values() for name in own}
    require_known(values, names, Path(paths[0]).stem if len(paths) == 1 else "all notebooks")
    return [
        (path, {n: own[n].checked(value) for n, value in values.items() if n in own})
        for path, own in known.items()
    ]


@dataclass(frozen=True)
class Run:
    """How a notebook's run ended: ``status`` is "ok", "skipped" or "failed", ``reason`` says why it is not "ok"."""

    notebook: str
    status: str
    reason: str
    seconds: float
    output_path: Path


def run_notebook(path, parameters=None, output_dir=None, progress_bar=True) -> Run:
    """Executes a notebook in a fresh kernel, in the notebook's folder.

    Writes the executed copy ``output_dir/<name>.ipynb`` cell by cell (also when it fails) and the run's end in
    ``output_dir/runs.json``; without ``output_dir``: ``outputs/<preset>-<dataset>`` of the clone. Wrong parameters
    raise ValueError before anything starts; what goes wrong inside the notebook is told by the returned `Run`.
    """
    from clipad.studies.experiments import resolve, run_folder

    path = Path(path).resolve()
    declared = notebooks.inspect_parameters(path)
    values = dict(parameters or {})
    if output_dir and "output_dir" in declared:
        values["output_dir"] = str(output_dir)
    [(_, values)] = plan([path], values)
    known = {name: own.default for name, own in declared.items()} | values
    if {"preset", "dataset"} <= known.keys():
        resolve(**known)
    folder = output_dir or known.get("output_dir") or run_folder(**known)
    output_path = Path(folder).resolve() / path.name
    if output_path == path:
        raise ValueError(f"the executed copy would overwrite {path}: choose another output folder")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    start, status, reason = time.perf_counter(), "stopped", ""
    try:
        status, reason = _execute(path, output_path, values, progress_bar)
    finally:
        seconds = round(time.perf_counter() - start, 1)
        beside = output_path.with_name("runs.json")
        ends = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        end = {"parameters": values, "status": status, "reason": reason, "seconds": seconds}
        text = json.dumps(ends | {path.stem: end}, indent=1, sort_keys=True, ensure_ascii=False)
        write_atomically(beside, text + "\n")
    return Run(path.stem, status, reason, seconds, output_path)


def _execute(path, output_path, values, progress_bar) -> tuple[str, str]:
    """Status and reason."""
    raised = ""
    try:
        with patch.dict(os.environ, KERNEL):
            papermill.execute_notebook(
                path,  # given a whole notebook, papermill keeps it in the copy's metadata
                output_path,
                parameters=values,
                kernel_name="python3",
                cwd=path.parent,
                progress_bar=progress_bar,
                iopub_timeout=60,  # nbclient's 4 s are short for a large figure on a busy machine
                extra_arguments=["--log-level=50"],  # the kernel's remarks about its own shutdown
                shutdown_kernel="immediate",  # a stop shall not wait for a cell to end
            )
    except papermill.PapermillExecutionError as error:
        raised = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        return "failed", "the kernel was killed (often: out of memory)"
    except Exception as error:  # a kernel that does not start; other notebooks run all the same
        return "failed", f"{type(error).__name__}: {error}"
    executed = notebooks.merge_streams(notebooks.read_notebook(output_path))
    nbformat.write(executed, output_path)
    found = notebooks.faults(executed)
    if found or raised:
        return "failed", "; ".join(found) or raised
    skipped = notebooks.skip_reason(executed)
    return ("ok", "") if skipped is None else ("skipped", skipped)
