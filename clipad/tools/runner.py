"""papermill made strict: parameters are refused before a kernel starts, and the executed notebook has to pass a gate.

papermill alone ends with exit code 0 in many runs that a reader would call failed (an exception inside a widget, a
missing figure, an unknown parameter). Here a run is "ok" only when every cell ran *and* `gate` finds nothing.

What the cell tagged ``parameters`` may say, one parameter a line, ``name: type = default  # help``:

* type: ``str int float bool list dict``, also ``list[str]``, ``dict[str, float]`` and the like;
* the end of the help may limit the values: ``[mean|pca|kde]`` (choices), ``[1..16]``, ``[0..]``, ``[..1]`` (ranges,
  ends included). No ``=`` in the help: papermill does not see such a line;
* a ``str`` parameter whose help starts with "path" is a path: a relative value counts from where the command was
  typed. With "path" later in the help ("tag, or path of a file") it is one only if such a file exists;
* empty values (``""``, ``0``, ``[]``, ``{}``) mean "what the preset says" and are never out of range.
"""

import ast
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from clipad.files import write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]
PRESET_DATASETS = {
    "demo": "demo",
    "paper": "mvtec",
}  # names the folder of a run whose `dataset` is left empty
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WARNING_PLACE = re.compile(
    r"^.*/(?=[^/\n]+:\d+: \w*Warning:)", re.MULTILINE
)  # folder of the file that warns


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
        raise ValueError(
            f"{name!r} fits several notebooks: {', '.join(path.stem for path in fitting)}"
        )
    raise ValueError(f"no notebook starts with {name!r}; {_nearest(stem, known)}")


@dataclass(frozen=True)
class Parameter:
    """One line of the cell tagged ``parameters``."""

    name: str
    type: str
    default: object
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    def is_path(self, value: str) -> bool:
        """Whether the value names a file or folder; see the docstring of the module."""
        found = re.search(r"\bpath\b", self.help) if self.type == "str" else None
        return found is not None and (found.start() == 0 or Path(value).expanduser().exists())


def inspect_parameters(path) -> dict[str, Parameter]:
    """The parameters of a notebook, by name, as papermill's ``inspect_notebook`` sees them.

    Raises ValueError for a parameter that papermill does not see, that has a type not listed above or a default that
    does not fit its type.
    """
    from papermill import inspect_notebook

    path = Path(path)
    notebook = read_notebook(path)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{path.name}: expected one cell tagged `parameters`, found {len(cells)}")
    found = inspect_notebook(notebook)  # the node: papermill would format braces in a path
    seen = {name: _parameter(line, path) for name, line in found.items()}
    for statement in ast.parse(cells[0].source).body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        for target in targets:
            if isinstance(target, ast.Name) and target.id not in seen:
                raise ValueError(
                    f"{path.name}: papermill does not see the parameter {target.id!r} in line {statement.lineno} of "
                    "the parameters cell; write `name: type = default  # help`, a plain type, one `=` (ranges: [0..])"
                )
    return seen


def _parameter(found: dict, path: Path) -> Parameter:
    name, text = found["name"], found["help"]
    try:
        default = ast.literal_eval(found["default"])
    except (ValueError, SyntaxError):
        raise ValueError(
            f"{path.name}: the default of {name!r} is no plain value: {found['default']}"
        ) from None
    kind = found["inferred_type_name"].replace(" ", "")
    if kind == "None":
        kind = type(default).__name__
    if re.split(r"[\[\],]", kind)[0] not in TYPES or not set(re.findall(r"\w+", kind)) <= set(
        TYPES
    ):
        raise ValueError(
            f"{path.name}: {name!r} has the type {kind}; expected one of {', '.join(TYPES)}"
        )
    if not _fits(default, kind):
        raise ValueError(f"{path.name}: the default of {name!r} is {default!r}, its type is {kind}")
    limits = {}
    if bracket := re.search(r"\[([^\[\]]+)\]$", text):
        if numbers := re.fullmatch(r"(-?[\d.]*\d)?\.\.(-?[\d.]*\d)?", bracket[1].replace(" ", "")):
            limits = {
                end: float(number)
                for end, number in zip(("low", "high"), numbers.groups(), strict=True)
                if number
            }
        elif "|" in bracket[1]:
            limits = {"choices": tuple(choice.strip() for choice in bracket[1].split("|"))}
    return Parameter(name, kind, default, text, **limits)


def check_parameters(path, values: dict) -> dict:
    """Values as the notebook may get them: known names, right types, allowed values; paths made absolute.

    An empty value ("" or 0) becomes the empty value of the parameter's type, which means "what the preset says".
    Raises ValueError with what was found and what was expected.
    """
    path = Path(path)
    known = inspect_parameters(path)
    for name in values:
        if name not in known:
            raise ValueError(f"{path.stem} has no parameter {name!r}; {_nearest(name, known)}")
    return {name: _checked(known[name], value) for name, value in values.items()}


def _checked(parameter: Parameter, value):
    name, kind = parameter.name, parameter.type
    if value in ("", 0, 0.0) and not isinstance(value, bool) and kind != "bool":
        return {"str": "", "int": 0, "float": 0.0, "list": [], "dict": {}}[
            re.match(r"\w+", kind)[0]
        ]
    if not _fits(value, kind):
        advice = ""
        if kind.startswith(("list", "dict")):
            example = "[a, b]" if kind.startswith("list") else "{key: value}"
            advice = f"; -p cannot say this, use YAML: -y '{name}: {example}'"
        elif kind == "str" and isinstance(value, int | float):
            advice = f"; for text that looks like a number or True/False use YAML: -y '{name}: \"{value}\"'"
        raise ValueError(f"{name} expects {kind}, found {type(value).__name__} {value!r}{advice}")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{name} expects a finite number, found {item}")
        if parameter.choices and str(item) not in parameter.choices:
            raise ValueError(f"{name} cannot be {item!r}; {_nearest(str(item), parameter.choices)}")
        if isinstance(item, int | float) and not parameter.low <= item <= parameter.high:
            low, high = (
                f"{end:g}" if math.isfinite(end) else "" for end in (parameter.low, parameter.high)
            )
            raise ValueError(f"{name} must lie in {low}..{high}, found {item}")
    if value and parameter.is_path(value):
        value = str(Path(value).expanduser().resolve())
    return value


def _fits(value, kind: str) -> bool:
    """Whether ``value`` has the type that is written ``kind``: "float" takes an int, "int" takes no bool."""
    outer, _, inner = kind.partition("[")
    if isinstance(value, bool):
        return outer == "bool"
    if not isinstance(value, TYPES[outer]):
        return False
    if not inner:
        return True
    if outer == "list":
        return all(_fits(item, inner[:-1]) for item in value)
    key, _, item = inner[:-1].partition(",")
    return all(_fits(k, key) and _fits(v, item) for k, v in value.items())


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return (
        f"did you mean {close[0]!r}? " if close else ""
    ) + f"known: {', '.join(known) or 'none'}"


# --- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How a notebook's run ended: ``status`` is "ok", "skipped" or "failed", ``reason`` says why it is not "ok"."""

    notebook: str
    status: str
    reason: str
    seconds: float
    output_path: Path


def output_folder(path, values: dict) -> Path:
    """Where the executed copy goes: the parameter ``output_dir``, or ``outputs/<preset>-<dataset>`` of the clone."""
    if values.get("output_dir"):
        return Path(values["output_dir"]).expanduser().resolve()
    defaults = {name: parameter.default for name, parameter in inspect_parameters(path).items()}
    settings = defaults | values
    preset = settings.get("preset") or "demo"
    dataset = settings.get("dataset") or PRESET_DATASETS.get(preset, preset)
    return REPOSITORY / "outputs" / re.sub(r"[^\w.-]+", "_", f"{preset}-{dataset}")


def run_notebook(path, parameters=None, output_dir=None, timeout=None, progress_bar=True) -> Run:
    """Executes a notebook in a fresh kernel of this Python, in the notebook's folder.

    Writes the executed copy ``output_dir/<name>.ipynb`` cell by cell (also when it fails) and the run's end in
    ``output_dir/runs.json``. ``timeout``: seconds a cell may take. Wrong parameters and a wrong kernel raise
    ValueError before anything starts; what goes wrong inside the notebook is told by the returned `Run`.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    path = Path(path).resolve()
    values = check_parameters(path, parameters or {})
    require_own_kernel()
    output_path = Path(output_dir or output_folder(path, values)).resolve() / path.name
    if output_path == path:
        raise ValueError(f"the executed copy would overwrite {path}: choose another output folder")
    output_path.parent.mkdir(parents=True, exist_ok=True)
    note = {"parameters": values, "status": "running", "reason": "", "seconds": 0.0}
    _record(output_path, note)
    start, status, reason = time.perf_counter(), "failed", ""
    try:
        with _neutral_environment():
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
                coalesce_streams=True,  # a progress bar is stored as its last line
                extra_arguments=[
                    "--log-level=50"
                ],  # the kernel's remarks about its own transport and shutdown
            )
        executed = read_notebook(output_path)
        problems, skipped = gate(executed), skip_reason(executed)
        status = "failed" if problems else "ok" if skipped is None else "skipped"
        reason = "; ".join(problems) or skipped or ""
    except papermill.PapermillExecutionError as error:
        reason = f"{_cell_text(error.source)} raised {error.ename}: {error.evalue}".strip()
    except DeadKernelError:
        reason = _mark_stop(
            output_path, "DeadKernelError", "the kernel was killed (often: out of memory) in"
        )
    except CellTimeoutError:
        reason = _mark_stop(
            output_path, "CellTimeoutError", f"no end after the time limit of {timeout} s in"
        )
    except KeyboardInterrupt:
        status, reason = "interrupted", "stopped by the user"
        raise
    finally:
        seconds = round(time.perf_counter() - start, 1)
        _record(output_path, note | {"status": status, "reason": reason, "seconds": seconds})
    return Run(path.stem, status, reason, seconds, output_path)


def plan_all(paths, parameters: dict) -> list[tuple[Path, dict]]:
    """Each notebook with those of the parameters that it has, all checked; ValueError for one that none has."""
    known = {path: inspect_parameters(path) for path in paths}
    names = {name: None for parameters_of in known.values() for name in parameters_of}
    for name in parameters:
        if name not in names:
            raise ValueError(f"no notebook has a parameter {name!r}; {_nearest(name, names)}")
    chosen = {path: {n: v for n, v in parameters.items() if n in known[path]} for path in paths}
    return [(path, check_parameters(path, values)) for path, values in chosen.items()]


def require_own_kernel() -> None:
    """Raises ValueError unless the kernel ``python3`` runs the Python that runs this.

    A kernel specification of the user's account may hide the environment's own and start another Python.
    """
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"fix: {Path(sys.executable).name} -m ipykernel install --sys-prefix"
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        raise ValueError(f"Jupyter finds no kernel `python3`; {fix}") from None
    # jupyter_client replaces a bare "python" or "python3" by the running interpreter
    if Path(command).is_absolute() and Path(command) != Path(sys.executable):
        raise ValueError(f"the kernel `python3` runs {command}, not {sys.executable}; {fix}")


def skip_reason(notebook) -> str | None:
    """What the notebook printed before its ``raise SystemExit(0)``; None when it ran to its end."""
    for cell in _code_cells(notebook):
        if any(_is_clean_exit(output) for output in cell.outputs):
            return " ".join(
                " ".join(o.text.split())
                for o in cell.outputs
                if o.output_type == "stream" and o.name == "stdout"
            )
    return None


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
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")] or [
        ""
    ]
    return f"the cell `{lines[0]}{' ...' if len(lines) > 1 else ''}`"


def _mark_stop(output_path: Path, kind: str, message: str) -> str:
    """papermill calls every cell of a killed kernel "completed": put the error where a reader looks for it."""
    from nbformat.v4 import new_output

    notebook = read_notebook(output_path)
    started = [
        c for c in _code_cells(notebook) if c.metadata.get("papermill", {}).get("start_time")
    ]
    reason = f"{message} {_cell_text(started[-1].source)}"
    started[-1].outputs.append(
        new_output("error", ename=kind, evalue=reason, traceback=[f"{kind}: {reason}"])
    )
    write_notebook(notebook, output_path)
    return reason


def _record(output_path: Path, entry: dict) -> None:
    path = output_path.with_name("runs.json")
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs[output_path.stem] = entry
    write_atomically(path, json.dumps(runs, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


# --- the gate -------------------------------------------------------------------------------------------------------


def gate(notebook) -> list[str]:
    """Problems of an executed notebook that its exit code does not tell.

    No ``error`` output in cells or in widgets, every code cell executed, alt text for each figure, a static output
    beside widgets, no path of this machine, no Python warning outside cells tagged ``warns``, kernel ``python3``.
    """
    problems = []
    skipped = False
    before = []
    for number, cell in enumerate(_code_cells(notebook), 1):
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


def style(notebook) -> list[str]:
    """Where a stored notebook leaves the agreed shape: one parameters cell, 150 lines of code, 20 a cell (besides
    the parameters, which are a list), 2,500 words, under 1.5 MB (galleries of 15 categories may take more)."""
    problems = []
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in _code_cells(notebook)]
    if sum(tagged) != 1:
        problems.append(f"{sum(tagged)} cells are tagged `parameters`, expected 1")
    lines = [
        sum(bool(line.strip()) for line in cell.source.splitlines())
        for cell in _code_cells(notebook)
    ]
    if sum(lines) > 150:
        problems.append(f"{sum(lines)} lines of code, the limit is 150")
    problems += [
        f"code cell {i} has {n} lines, the limit is 20"
        for i, (n, listed) in enumerate(zip(lines, tagged, strict=True), 1)
        if n > 20 and not listed
    ]
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    if words > 2500:
        problems.append(f"{words} words, the limit is 2,500")
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
        text = output["text"]
        if output["name"] == "stderr" and "To exit: use 'exit'" in text:
            return []  # IPython's advice after every SystemExit
        if (
            output["name"] == "stderr"
            and "warns" not in tags
            and (found := re.search(r".*Warning:.*", text))
        ):
            return [f"a warning: {found[0].strip()[:200]}"]
        return _path_problems(WARNING_PLACE.sub("", text), notebook)
    problems, texts = [], [json.dumps(output.get("metadata", {}), ensure_ascii=False)]
    for kind, content in output["data"].items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        if kind.startswith("image/"):
            alt = output.get("metadata", {}).get(kind, {}).get("alt", "").strip()
            if not alt or re.fullmatch(
                r"<.*>", alt
            ):  # "<Figure size 640x480 ...>" describes nothing
                problems.append(f"a figure ({kind}) without alt text")
        elif kind == "text/html" and re.search(r"<img\b(?![^>]*\balt=[\"'][^\"'])", text):
            problems.append("an <img> in HTML without alt text")
        if not kind.startswith("image/") or kind == "image/svg+xml":
            texts.append(re.sub(r"data:image/[\w+]+;base64,[\w+/=\s]+", "", text))
    return problems + _path_problems("\n".join(texts), notebook)


def _path_problems(text: str, notebook) -> list[str]:
    """Absolute paths of a machine, except below a path that the user gave as a parameter."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {}).values()
    for value in sorted(
        (v for v in given if isinstance(v, str) and os.path.isabs(v)), key=len, reverse=True
    ):
        text = text.replace(value, "")
    here = (Path.home(), Path.cwd(), REPOSITORY, Path(sys.prefix), Path(tempfile.gettempdir()))
    names = "|".join(
        sorted(re.escape(str(place)) + r"(?![\w.-])" for place in here if len(place.parts) > 1)
    )
    usual = r"/(?:home|Users|root|tmp|var|opt|mnt|usr|private)/[\w.~-]|[A-Z]:\\+Users\\|\S*(?:site|dist)-packages"
    found = re.search(rf"(?<![\w.:/~<-])(?:{names}|{usual})\S*", text)
    return [f"an absolute path of this machine: {found[0][:100]}"] if found else []


def _is_clean_exit(output) -> bool:
    """``raise SystemExit(0)``: the supported way to leave a notebook early; papermill accepts it, too."""
    return (
        output["output_type"] == "error"
        and output["ename"] == "SystemExit"
        and output["evalue"] in ("", "0")
    )


def _code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _widget_models(notebook) -> dict:
    return notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})


# --- stored outputs -------------------------------------------------------------------------------------------------


def read_notebook(path):
    """The notebook as an nbformat 4 node; ValueError when the file is no notebook."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Jupyter notebook: {str(error).splitlines()[0]}") from None


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
    execution counts become 1..n, progress bars go, widgets get ids that are the same in every run.
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
    stored.metadata.pop("widgets", None)
    if "widgets" in executed.metadata:
        stored.metadata.widgets = executed.metadata.widgets
    stored.metadata.clipad = {"source_hash": source_hash(stored)}
    stored = _with_stable_widget_ids(stored)
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
        if not re.search(r"%\||\d+it \[", line)
    ]
    output.text = WARNING_PLACE.sub("", "".join(lines))
    return output if output.text.strip() else None


def _with_stable_widget_ids(notebook):
    """Numbers the widgets by where they first appear, in place of their random ids."""
    import nbformat

    models = _widget_models(notebook)
    if not models:
        return notebook
    one_of_them = re.compile("|".join(models))
    order = list(dict.fromkeys(one_of_them.findall(json.dumps(notebook.cells))))
    rest = sorted(
        set(models) - set(order), key=lambda name: one_of_them.sub("", json.dumps(models[name]))
    )
    for name in order:  # grows while it is read: a box names its children, a slider its layout
        order += dict.fromkeys(
            n for n in one_of_them.findall(json.dumps(models[name])) if n not in order
        )
    order += [name for name in rest if name not in order]
    numbers = {name: f"{position:032x}" for position, name in enumerate(order)}
    return nbformat.reads(
        one_of_them.sub(lambda m: numbers[m[0]], _as_text(notebook)), as_version=4
    )


def _as_text(notebook) -> str:
    import nbformat

    return nbformat.writes(notebook).rstrip("\n") + "\n"
