"""papermill made strict: wrong parameters are refused before a kernel starts, the executed notebook has to pass a gate.

papermill alone ends with exit code 0 in many runs that a reader would call failed (an exception inside a widget, a
missing figure, an unknown parameter). Here a run is "ok" only when every cell ran *and* `stored.gate` finds nothing.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from clipad.files import write_atomically
from clipad.tools.parameters import Parameter, checked, declared, nearest
from clipad.tools.stored import (
    REPOSITORY,
    code_cells,
    gate,
    merge_streams,
    read_notebook,
    skip_reason,
    write_notebook,
)

# --- notebooks and their parameters ---------------------------------------------------------------------------------


def notebook_paths(folder=None) -> list[Path]:
    """The numbered notebooks of the project, in order."""
    folder = Path(folder) if folder else REPOSITORY / "notebooks"
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}: the notebooks lie beside the package in a clone of the repository; "
            "install from it with `pip install -e .`"
        )
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def find_notebook(name: str, folder=None) -> Path:
    """The one notebook whose name starts with ``name`` ("03"), or the file itself when ``name`` is a path of one.

    Raises ValueError with the nearest names when none or several fit.
    """
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    known = {path.stem: path for path in notebook_paths(folder)}
    stem = name.removesuffix(".ipynb")
    fitting = [path for known_stem, path in known.items() if stem and known_stem.startswith(stem)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(path.stem for path in fitting)
        raise ValueError(f"{name!r} fits several notebooks: {names}")
    raise ValueError(f"no notebook starts with {name!r}; {nearest(stem, known)}")


def inspect_parameters(path) -> dict[str, Parameter]:
    """The parameters of a notebook file, by name; ValueError for what `parameters.declared` refuses."""
    return declared(read_notebook(path), Path(path).name)


def check_parameters(path, values: dict) -> dict:
    """Values as the notebook may get them: known names, right types, allowed values; paths made absolute."""
    path = Path(path)
    known = inspect_parameters(path)
    for name in values:
        if name not in known:
            raise ValueError(f"{path.stem} has no parameter {name!r}; {nearest(name, known)}")
    return {name: checked(known[name], value) for name, value in values.items()}


def plan_all(paths, parameters: dict) -> list[tuple[Path, dict]]:
    """Each notebook with those of the parameters that it has, all checked; ValueError for one that none has."""
    known = {path: inspect_parameters(path) for path in paths}
    names = {name: None for parameters_of in known.values() for name in parameters_of}
    for name in parameters:
        if name not in names:
            raise ValueError(f"no notebook has a parameter {name!r}; {nearest(name, names)}")
    chosen = {path: {n: v for n, v in parameters.items() if n in known[path]} for path in paths}
    return [(path, check_parameters(path, values)) for path, values in chosen.items()]


def output_folder(path, values: dict) -> Path:
    """Where the executed copy goes: the parameter ``output_dir``, or ``outputs/<preset>-<dataset>`` of the clone."""
    from clipad.studies.experiments import run_name

    if values.get("output_dir"):
        return Path(values["output_dir"]).expanduser().resolve()
    defaults = {name: parameter.default for name, parameter in inspect_parameters(path).items()}
    settings = defaults | values
    name = run_name(settings.get("preset") or "demo", settings.get("dataset", ""))
    return REPOSITORY / "outputs" / name


def _require_model_and_data(path, values: dict) -> None:
    """ValueError for a preset, model and data set that do not go together."""
    from clipad.studies.experiments import resolve

    names = ("preset", "model", "pretrained", "dataset", "data_root")
    settings = {name: p.default for name, p in inspect_parameters(path).items()} | values
    given = {name: settings[name] for name in names if settings.get(name)}
    if {"preset", "dataset"} <= settings.keys():
        resolve(**given)


def require_own_kernel() -> None:
    """Raises ValueError unless the kernel ``python3`` runs the Python that runs this.

    A kernel specification of the user's account may hide the environment's own and start another Python.
    """
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"fix: {Path(sys.executable).name} -m ipykernel install --sys-prefix"
    specifications = KernelSpecManager()
    try:
        command = specifications.get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        raise ValueError(f"Jupyter finds no kernel `python3`; {fix}") from None
    except Exception as error:  # whatever a damaged file makes of itself
        place = specifications.find_kernel_specs().get("python3", "")
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place}/kernel.json starts no kernel ({said}); {fix}") from None
    # jupyter_client replaces a bare "python" or "python3" by the running interpreter
    if Path(command).is_absolute() and Path(command) != Path(sys.executable):
        raise ValueError(f"the kernel `python3` runs {command}, not {sys.executable}; {fix}")


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How a notebook's run ended: ``status`` is "ok", "skipped" or "failed", ``reason`` says why it is not "ok"."""

    notebook: str
    status: str
    reason: str
    seconds: float
    output_path: Path


def run_notebook(path, parameters=None, output_dir=None, timeout=None, progress_bar=True) -> Run:
    """Executes a notebook in a fresh kernel of this Python, in the notebook's folder.

    Writes the executed copy ``output_dir/<name>.ipynb`` cell by cell (also when it fails) and the run's end in
    ``output_dir/runs.json``. ``timeout``: seconds a cell may take. Wrong parameters and a wrong kernel raise
    ValueError before anything starts; what goes wrong inside the notebook is told by the returned `Run`.
    """
    path = Path(path).resolve()
    values = check_parameters(path, parameters or {})
    _require_model_and_data(path, values)
    require_own_kernel()
    output_path = Path(output_dir or output_folder(path, values)).resolve() / path.name
    if output_path == path:
        raise ValueError(f"the executed copy would overwrite {path}: choose another output folder")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_path.parent)
    note = {"parameters": values, "status": "running", "reason": "", "seconds": 0.0}
    _record(output_path, note)
    start, status, reason = time.perf_counter(), "failed", ""
    try:
        with _neutral_environment(), _stoppable():
            status, reason = _execute(path, output_path, values, timeout, progress_bar)
    except KeyboardInterrupt:
        status, reason = "stopped", "stopped by the user"
        raise
    finally:
        seconds = round(time.perf_counter() - start, 1)
        _record(output_path, note | {"status": status, "reason": reason, "seconds": seconds})
    return Run(path.stem, status, reason, seconds, output_path)


def _execute(path, output_path, values, timeout, progress_bar) -> tuple[str, str]:
    """Status and reason."""
    fault = _papermill(path, output_path, values, timeout, progress_bar)
    executed = merge_streams(read_notebook(output_path))
    write_notebook(executed, output_path)
    if fault:
        return "failed", fault
    if problems := gate(executed):
        return "failed", "; ".join(problems)
    skipped = skip_reason(executed)
    return ("ok", "") if skipped is None else ("skipped", skipped)


def _papermill(path, output_path, values, timeout, progress_bar) -> str:
    """What stopped the run, "" if nothing did."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    connection = output_path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        papermill.execute_notebook(
            # Paths, because papermill keeps a whole notebook in the copy's metadata if it is given one;
            # braces doubled, because it formats paths.
            *(str(p).replace("{", "{{").replace("}", "}}") for p in (path, output_path)),
            parameters=values,
            kernel_name="python3",
            cwd=path.parent,
            progress_bar=progress_bar,
            execution_timeout=timeout,
            iopub_timeout=60,  # nbclient's 4 s are short for a large figure on a busy machine
            extra_arguments=["--log-level=50"],  # the kernel's remarks about its own shutdown
            shutdown_kernel="immediate",  # a stop shall not wait for a cell to end
            config=Config(KernelManager={"connection_file": str(connection)}),
        )
    except papermill.PapermillExecutionError as error:
        return f"{_cell_text(error.source)} raised {error.ename}: {error.evalue}".strip()
    except DeadKernelError:
        said = "the kernel was killed (often: out of memory) in"
        return _mark_stop(output_path, "DeadKernelError", said)
    except CellTimeoutError:
        said = f"no end after the time limit of {timeout} s in"
        return _mark_stop(output_path, "CellTimeoutError", said)
    except (
        Exception
    ) as error:  # a kernel that does not start; other notebooks shall run all the same
        return f"{type(error).__name__}: {error}"
    finally:
        connection.unlink(missing_ok=True)
    return ""


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left below a folder: ``.<name>.<process>.part`` of processes that are gone."""
    for part in Path(folder).rglob(".*.part"):
        process = part.name.split(".")[-2]
        if not process.isdecimal() or int(process) == os.getpid():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except OSError:  # somebody else's, and alive
            continue


@contextlib.contextmanager
def _stoppable():
    """SIGTERM stops a run as Ctrl-C does, so that the kernel ends and runs.json says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _neutral_environment():
    """The kernel inherits the environment: MPLBACKEND=agg would lose each figure, PYTHONWARNINGS change the output."""
    before = dict(os.environ)
    for name in ("MPLBACKEND", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # the debugger's remark about frozen modules
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cell_text(source: str) -> str:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    lines = lines or [""]
    return f"the cell `{lines[0][:100]}{' ...' if len(lines) > 1 else ''}`"


def _mark_stop(output_path: Path, kind: str, message: str) -> str:
    """papermill calls every cell of a killed kernel "completed": put the error where a reader looks for it."""
    from nbformat.v4 import new_output

    notebook = read_notebook(output_path)
    cells = code_cells(notebook)
    started = [c for c in cells if c.metadata.get("papermill", {}).get("start_time")] or cells[:1]
    reason = f"{message} {_cell_text(started[-1].source)}"
    error = new_output("error", ename=kind, evalue=reason, traceback=[f"{kind}: {reason}"])
    started[-1].outputs.append(error)
    write_notebook(notebook, output_path)
    return reason


def _record(output_path: Path, entry: dict) -> None:
    path = output_path.with_name("runs.json")
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except (
        FileNotFoundError,
        ValueError,
    ):  # none yet, or damaged: the runs themselves are what matters
        runs = {}
    runs[output_path.stem] = entry
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
