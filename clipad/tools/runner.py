"""papermill made strict: wrong parameters are refused before a kernel starts, and a run with an error inside a widget,
where papermill does not look, has failed (`notebooks.faults`).
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from clipad.files import write_atomically
from clipad.tools.notebooks import (
    REPOSITORY,
    code_cells,
    faults,
    inspect_parameters,
    merge_streams,
    read_notebook,
    skip_reason,
    write_notebook,
)
from clipad.tools.parameters import require_known

# --- parameters -----------------------------------------------------------------------------------------------------


def plan(paths, values: dict) -> list[tuple[Path, dict]]:
    """Each notebook with those of the values that it has, as it may get them: right types, allowed, paths absolute.

    Raises ValueError for a name that no notebook has.
    """
    known = {path: inspect_parameters(path) for path in paths}
    names = {name: None for own in known.values() for name in own}
    require_known(values, names, Path(paths[0]).stem if len(paths) == 1 else "all notebooks")
    return [
        (path, {n: own[n].checked(value) for n, value in values.items() if n in own})
        for path, own in known.items()
    ]


def model_and_data(parameters: dict) -> dict:
    """model, pretrained and dataset of a preset, and what was given instead; ValueError for what does not go together,
    see :func:`clipad.studies.experiments.resolve`."""
    from clipad.studies.experiments import resolve

    names = ("preset", "model", "pretrained", "dataset", "data_root", "image_size")
    return resolve(**{name: parameters[name] for name in names if parameters.get(name)})


def output_folder(parameters: dict) -> Path:
    """Where the executed copy goes: the parameter ``output_dir``, or ``outputs/<preset>-<dataset>`` of the clone."""
    from clipad.studies.experiments import run_name

    if parameters.get("output_dir"):
        return Path(parameters["output_dir"]).expanduser().resolve()
    name = run_name(parameters.get("preset") or "demo", parameters.get("dataset", ""))
    return REPOSITORY / "outputs" / name


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How a notebook's run ended: ``status`` is "ok", "skipped" or "failed", ``reason`` says why it is not "ok"."""

    notebook: str
    status: str
    reason: str
    seconds: float
    output_path: Path


def run_notebook(path, parameters=None, output_dir=None, progress_bar=True) -> Run:
    """Executes a notebook in a fresh kernel of this Python, in the notebook's folder.

    Writes the executed copy ``output_dir/<name>.ipynb`` cell by cell (also when it fails) and the run's end in
    ``output_dir/runs.json``. Wrong parameters raise ValueError before anything starts; what goes wrong inside the
    notebook is told by the returned `Run`.
    """
    from clipad.backbone import find_device

    path = Path(path).resolve()
    [(_, values)] = plan([path], parameters or {})
    known = {name: own.default for name, own in inspect_parameters(path).items()} | values
    find_device(known.get("device"))
    if {"preset", "dataset"} <= known.keys():
        model_and_data(known)
    output_path = Path(output_dir or output_folder(known)).resolve() / path.name
    if output_path == path:
        raise ValueError(f"the executed copy would overwrite {path}: choose another output folder")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    note = {"parameters": values, "status": "running", "reason": "", "seconds": 0.0}
    _record(output_path, note)
    start, status, reason = time.perf_counter(), "failed", ""
    try:
        with _neutral_environment():
            status, reason = _execute(path, output_path, values, progress_bar)
    except KeyboardInterrupt:
        status, reason = "stopped", "stopped by the user"
        raise
    finally:
        seconds = round(time.perf_counter() - start, 1)
        _record(output_path, note | {"status": status, "reason": reason, "seconds": seconds})
    return Run(path.stem, status, reason, seconds, output_path)


def _execute(path, output_path, values, progress_bar) -> tuple[str, str]:
    """Status and reason."""
    fault = _papermill(path, output_path, values, progress_bar)
    executed = merge_streams(read_notebook(output_path))
    write_notebook(executed, output_path)
    if fault:
        return "failed", fault
    if found := faults(executed):
        return "failed", "; ".join(found)
    skipped = skip_reason(executed)
    return ("ok", "") if skipped is None else ("skipped", skipped)


def _papermill(path, output_path, values, progress_bar) -> str:
    """What stopped the run, "" if nothing did."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            # Paths, because papermill keeps a whole notebook in the copy's metadata if it is given one;
            # braces doubled, because it formats paths.
            *(str(p).replace("{", "{{").replace("}", "}}") for p in (path, output_path)),
            parameters=values,
            kernel_name="python3",
            cwd=path.parent,
            progress_bar=progress_bar,
            iopub_timeout=60,  # nbclient's 4 s are short for a large figure on a busy machine
            extra_arguments=["--log-level=50"],  # the kernel's remarks about its own shutdown
            shutdown_kernel="immediate",  # a stop shall not wait for a cell to end
        )
    except papermill.PapermillExecutionError as error:
        return f"{_cell_text(error.source)} raised {error.ename}: {error.evalue}".strip()
    except DeadKernelError:
        return _mark_killed(output_path)
    except Exception as error:  # a kernel that does not start; other notebooks run all the same
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def _neutral_environment():
    """The kernel inherits the environment: MPLBACKEND=agg would lose each figure, PYTHONWARNINGS change the output, and
    a kernel ``python3`` of the user's account would start another Python than this one."""
    before = dict(os.environ)
    for name in ("MPLBACKEND", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # comes first
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # the debugger's remark about frozen modules
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cell_text(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    first = lines[0][:100] if lines else ""
    return f"the cell `{first}{' ...' if len(lines) > 1 else ''}`"


def _mark_killed(output_path: Path) -> str:
    """papermill calls every cell of a killed kernel "completed": put the error where a reader looks for it."""
    from nbformat.v4 import new_output

    notebook = read_notebook(output_path)
    cells = code_cells(notebook)
    started = [c for c in cells if c.metadata.get("papermill", {}).get("start_time")] or cells[:1]
    reason = f"the kernel was killed (often: out of memory) in {_cell_text(started[-1].source)}"
    started[-1].outputs.append(new_output("error", ename="Killed", evalue=reason, traceback=[]))
    write_notebook(notebook, output_path)
    return reason


def _record(output_path: Path, entry: dict) -> None:
    path = output_path.with_name("runs.json")
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or damaged: the runs are what matters
        runs = {}
    runs[output_path.stem] = entry
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
