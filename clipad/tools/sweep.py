"""A grid of notebooks or evaluations on Dask: ``clipad sweep sweep.yaml``.

A file holds one block, or a list of blocks. A block is ``evaluate:`` with the parameters of `evaluation_parameters`,
or ``notebook:`` with ``parameters:``. A list is an axis; a block stands for the product of its axes::

    - evaluate: {detectors: [sdp, direct], rvs: [mean, dbscan], categories: [screw, nut]}   # 2 x 2 x 2 runs
    - notebook: "05"
      parameters: {seed: [0, 1], categories: [[screw, nut]]}            # 2 runs with two categories each

Each run has an address, a hash of its parameters and of all that decides its numbers. It computes in a folder of its
own below ``unfinished/``, which is renamed to ``runs/<address>`` when it is complete; so a run is there completely or
not at all. One that fails goes to ``failed/<address>`` and is tried again by the next sweep. Workers that die, retries
and the dashboard are Dask's.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

from clipad.files import code_version, content_hash, write_atomically
from clipad.tools import runner
from clipad.tools.parameters import Parameter, checked, nearest, read_yaml, shown
from clipad.tools.stored import read_notebook, source_hash

PATIENCE = 60
"""seconds without any worker after which a sweep gives up"""


@dataclass(frozen=True)
class Run:
    """One point of the grid. ``notebook``: path of the source, "" for an evaluation; ``inputs``: hashes, by name, of
    what decides the result besides the parameters."""

    notebook: str
    parameters: dict
    inputs: dict

    @property
    def name(self) -> str:
        return Path(self.notebook).stem or "evaluate"

    @property
    def address(self) -> str:
        """Sixteen hex digits."""
        text = json.dumps([self.name, self.parameters, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- from YAML to runs ----------------------------------------------------------------------------------------------


def evaluation_parameters() -> dict[str, Parameter]:
    """What a block ``evaluate:`` may set."""
    from clipad.studies.experiments import DETECTORS, PRESETS

    listed = (
        Parameter("detectors", "str", "sdp", "the detector", choices=tuple(DETECTORS)),
        Parameter("layers", "str", "", "path of the linear layers of sdp_plus"),
        Parameter("rvs", "str", "", "representative vector; the published one if empty"),
        Parameter("rvs_options", "dict", {}, "its options; the published ones if empty"),
        Parameter("preset", "str", "demo", "model and data", choices=tuple(PRESETS)),
        Parameter("model", "str", "", "open_clip model name"),
        Parameter("pretrained", "str", "", "open_clip tag, path of a checkpoint, or random"),
        Parameter("image_size", "int", 0, "side in pixels, the model's own if 0", low=1),
        Parameter("dataset", "str", "", "data set"),
        Parameter("data_root", "str", "", "path of the data set"),
        Parameter("categories", "list[str]", [], "categories of one run, all if empty"),
        Parameter("prompts", "str", "", "path of a YAML file with prompts"),
        Parameter("seed", "int", 0, "seed of random weights", low=0),
        Parameter("device", "str", "", "where to compute"),
    )
    return {parameter.name: parameter for parameter in listed}


def plan(path) -> list[Run]:
    """The runs of a sweep file, in its order (the last axis varies fastest), each once.

    Everything that can be known beforehand is checked here: names and values of parameters, data sets, weights,
    prompts. Raises ValueError or FileNotFoundError with what was found and what was expected.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no sweep file {path}; notebooks/sweep_example.yaml is one to start from"
        )
    for kept in (_samples, _weights):  # within this call: the next one finds what changed since
        kept.cache_clear()
    blocks = read_yaml(path)
    runs = [
        run
        for block in (blocks if isinstance(blocks, list) else [blocks])
        for run in _expand(block)
    ]
    if not runs:
        raise ValueError(f"{path} holds no block `evaluate:` or `notebook:`")
    return list({run.address: run for run in runs}.values())


def _expand(block) -> list[Run]:
    _require_keys(block, "a block", ["evaluate", "notebook", "parameters"])
    if ("evaluate" in block) == ("notebook" in block) or {"evaluate", "parameters"} <= block.keys():
        raise ValueError("a block holds either `evaluate:`, or `notebook:` and `parameters:`")
    if "evaluate" in block:
        known = evaluation_parameters()
        points = map(_evaluation, _grid(block["evaluate"], "`evaluate`", known))
        return [Run("", values, _inputs(values)) for values in points]
    runner.require_own_kernel()
    runs = []
    for name in block["notebook"] if isinstance(block["notebook"], list) else [block["notebook"]]:
        # YAML reads 05 as the number 5
        source = runner.find_notebook(f"{name:02d}" if isinstance(name, int) else str(name))
        known = runner.inspect_parameters(source)
        known.pop("output_dir", None)  # every run has a folder of its own
        notebook = {"notebook": source_hash(read_notebook(source))}
        points = _grid(block.get("parameters", {}), f"`parameters` of {source.stem}", known)
        runs += [Run(str(source), values, notebook | _inputs(values)) for values in points]
    return runs


def _grid(axes, what: str, known: dict[str, Parameter]) -> list[dict]:
    """Checked values of all known parameters, for each point of the product of the axes.

    For a parameter that is itself a list, [a, b] is the axis of [a] and [b].
    """
    _require_keys(axes, what, known)
    values = {name: [parameter.default] for name, parameter in known.items()}
    for name, axis in axes.items():
        axis = axis if isinstance(axis, list) else [axis]
        if not axis:
            raise ValueError(f"{name} has no values: leave it out, or list at least one")
        if known[name].type.startswith("list"):
            axis = [value if isinstance(value, list) else [value] for value in axis]
        values[name] = [checked(known[name], value) for value in axis]
    order = [*axes, *(name for name in known if name not in axes)]
    points = product(*(values[name] for name in order))
    return [dict(zip(order, point, strict=True)) for point in points]


def _require_keys(found, what: str, known) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} has to be a mapping `name: value`, found {shown(found)}")
    for name in found:
        if name not in known:
            raise ValueError(f"{what} has no key {shown(name)}; {nearest(name, known)}")


def _evaluation(values: dict) -> dict:
    """The values of an evaluation with what preset and protocol say, so that equal runs have one address."""
    from clipad.published import protocol
    from clipad.text import check_method

    values = values | _model_and_data(values) | {"detectors": values["detectors"] or "sdp"}
    if (values["detectors"] == "sdp_plus") != bool(values["layers"]):
        raise ValueError("layers belong to sdp_plus, and it needs them: give it a block of its own")
    if values["detectors"] == "winclip":
        if values["rvs"] or values["rvs_options"]:
            raise ValueError("winclip has a fixed text side, no rvs: give it a block of its own")
        return values
    rules = protocol(values["dataset"])
    published = rules.rvs_options if values["rvs"] in ("", rules.rvs) else {}
    chosen = {"rvs": values["rvs"] or rules.rvs, "rvs_options": values["rvs_options"] or published}
    check_method(chosen["rvs"], chosen["rvs_options"])
    return values | chosen


def _model_and_data(values: dict) -> dict:
    from clipad.studies.experiments import resolve

    names = ("preset", "model", "pretrained", "dataset", "data_root")
    return resolve(**{name: values[name] for name in names if values.get(name)})


def _inputs(values: dict) -> dict:
    """Hashes of code, images, weights and named files: whoever changes one of them gets other addresses."""
    found = {"code": code_version()}
    if {"preset", "model", "dataset"} & values.keys():
        chosen = values | _model_and_data(values)
        categories = tuple(values.get("categories", []))
        found["samples"] = _samples(chosen["dataset"], values.get("data_root", ""), categories)
        size, seed = values.get("image_size", 0), values.get("seed", 0)
        found["weights"] = _weights(chosen["model"], chosen["pretrained"], size, seed)
    for name in ("layers", "prompts", "train_root"):
        if values.get(name):
            found[name] = _file_or_folder(Path(values[name]))
    if values.get("prompts"):
        from clipad.prompts import load_prompts

        load_prompts(values["prompts"])
    return found


@cache
def _samples(dataset: str, root: str, categories: tuple[str, ...]) -> str:
    from clipad.datasets import load_dataset
    from clipad.evaluation import fingerprint

    return fingerprint(load_dataset(dataset, root or None, categories))


@cache
def _weights(model: str, pretrained: str, image_size: int, seed: int) -> str:
    from clipad.backbone import load_backbone

    given = None if pretrained == "random" else pretrained or None
    # the machine that plans needs no GPU
    return load_backbone(model, given, "cpu", image_size or None, seed).weights_hash


def _file_or_folder(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names."""
    if path.is_file():
        return content_hash(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no {path}")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {content_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- one run, on a worker -------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # environment and random generators belong to a process


def run_one(run: Run, output_dir: str) -> dict:
    """Computes a run and puts it at its address, unless it is there; returns its record.

    A failure is told by the record, too: its ``status`` is then "failed".
    """
    if not (Path(output_dir) / "runs").is_dir():
        raise FileNotFoundError(
            f"the worker does not see {output_dir}: it needs the sweep's file system"
        )
    if done := read_record(run, output_dir):
        return done
    folder = Path(output_dir) / "unfinished" / f"{run.address}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    start = time.perf_counter()
    try:
        with _one_at_a_time:
            if code_version() != run.inputs["code"]:
                raise ValueError("the worker has another version of clipad than who planned")
            found = _run_notebook(run, folder) if run.notebook else _run_evaluation(run, folder)
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "results": []}
    record = {"run": run.address, "name": run.name, **found, **asdict(run)}
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _put(folder, Path(output_dir) / ("failed" if record["status"] == "failed" else "runs"), run)
    return read_record(run, output_dir) or record


def _put(folder: Path, place: Path, run: Run) -> None:
    """Renames a folder to its address; where a complete run is there already, that one stays."""
    place.mkdir(exist_ok=True)
    final = place / run.address
    complete = place.name == "runs" and read_record(run, place.parent)
    if final.exists() and not complete:
        shutil.rmtree(final, ignore_errors=True)  # an earlier failure, or half of a removed run
    with contextlib.suppress(OSError):  # another attempt was first
        folder.rename(final)
    shutil.rmtree(folder, ignore_errors=True)


def read_record(run: Run, output_dir) -> dict | None:
    """The record of a complete run; None where there is none, or half of one."""
    try:
        text = (Path(output_dir) / "runs" / run.address / "run.json").read_text(encoding="utf-8")
        return json.loads(text)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _run_evaluation(run: Run, folder: Path) -> dict:
    from clipad.evaluation import evaluate
    from clipad.studies.experiments import experiment, make_detector

    own = ("detectors", "layers", "rvs", "rvs_options")
    settings = {name: value for name, value in run.parameters.items() if name not in own}
    used = experiment("evaluate", output_dir=str(folder), **settings)
    if used.backbone.weights_hash != run.inputs["weights"]:
        raise ValueError("the worker has other weights than who planned")
    name, layers, *rvs = (run.parameters[name] for name in own)
    options = {} if name == "winclip" else dict(zip(own[2:], rvs, strict=True))
    if run.parameters["prompts"]:
        options["prompts"] = used.prompts
    detector = make_detector(name, used.backbone, layers or None, **options)
    table = evaluate(detector, used.dataset, folder, progress=False).table.drop(index="mean")
    long = table.reset_index().melt("category", var_name="metric").dropna()
    return {"status": "ok", "reason": "", "results": long.to_dict(orient="records")}


def _run_notebook(run: Run, folder: Path) -> dict:
    """Executes the notebook; its numbers are those that it recorded, ``name.row.column`` (lists stay in its JSON)."""
    import pandas as pd

    known = runner.inspect_parameters(run.notebook)
    own_folder = {"output_dir": str(folder)} if "output_dir" in known else {}
    values = run.parameters | own_folder
    done = runner.run_notebook(run.notebook, values, folder, progress_bar=False)
    record, results = folder / f"{run.name}.json", []
    if record.is_file():
        flat = pd.json_normalize(json.loads(record.read_text(encoding="utf-8"))["results"], sep=".")
        results = [
            {"category": "", "metric": name, "value": float(column.iloc[0])}
            for name, column in flat.items()
            if column.dtype.kind in "biuf"
        ]
    return {"status": done.status, "reason": done.reason, "results": results}


# --- the sweep ------------------------------------------------------------------------------------------------------


def sweep(
    runs: list[Run], output_dir, workers: int | None = None, scheduler: str | None = None
) -> list[dict]:
    """Executes the runs that are not finished; returns the records of all that ended, in the order of ``runs``.

    Writes ``table.csv``, also when it is interrupted. ``workers``: local processes, None for one per core but at most
    4; ``scheduler``: address of a running Dask cluster whose workers see ``output_dir`` under the same path and have
    the same clipad.

    Raises OSError when the cluster does not answer or is gone, and when there is no worker for `PATIENCE` seconds;
    runs that have not ended then are not done, and no failures. What goes wrong inside a run is told by its record.
    """
    output_dir = Path(output_dir).expanduser().resolve()
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    runner.remove_leftovers(output_dir)
    todo = [run for run in runs if not read_record(run, output_dir)]
    failures: dict[str, dict] = {}
    try:
        if todo:
            _compute(todo, len(runs), output_dir, workers, scheduler, failures)
    finally:
        # From the disk: a run may have ended right before the interruption, when nobody looked any more.
        found = [read_record(run, output_dir) or failures.get(run.address) for run in runs]
        records = [record for record in found if record]
        write_table(records, output_dir / "table.csv")
    addresses = {run.address for run in runs}
    for rest in (output_dir / "unfinished").glob("*"):  # what killed attempts left
        if rest.name.partition("-")[0] in addresses:
            shutil.rmtree(rest, ignore_errors=True)
    return records


def _compute(todo, planned: int, output_dir: Path, workers, scheduler, failures: dict) -> None:
    """Executes the runs in ``todo``, tells of each as it ends, and keeps the records of those that fail."""
    from distributed import wait
    from tqdm import tqdm

    with (
        _client(workers, scheduler, len(todo), output_dir) as client,
        tqdm(total=planned, initial=planned - len(todo), unit="run") as bar,
    ):
        run_of = dict(zip(client.map(run_one, todo, output_dir=str(output_dir)), todo, strict=True))
        last_seen = time.monotonic()
        while run_of:
            done = set()
            try:
                done = wait(list(run_of), timeout=5, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                pass
            except CancelledError:
                raise OSError(
                    f"the Dask scheduler is gone, {len(run_of)} runs are not done"
                ) from None
            for future in done:
                run = run_of.pop(future)
                record = _record_of(future, run, output_dir)
                if record["status"] == "failed":
                    failures[run.address] = record
                    place = output_dir / "failed" / run.address
                    bar.write(f"{run.name} failed: {record['reason']}; see {place}", sys.stderr)
                bar.update()
            if done or client.status != "running" or client.nthreads():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > PATIENCE:
                raise OSError(f"no worker for {PATIENCE} s, {len(run_of)} runs are not done")


def _record_of(future, run: Run, output_dir: Path) -> dict:
    """The record of a run that ended."""
    if future.status == "finished":
        return future.result()
    # its workers died (often: out of memory), or could not start it
    reason = str(future.exception()).strip().partition(". ")[0]
    attempts = sorted((output_dir / "unfinished").glob(f"{run.address}-*"), key=os.path.getmtime)
    if attempts:
        _put(attempts[-1], output_dir / "failed", run)
    failed = {"status": "failed", "reason": reason, "results": [], "seconds": 0.0}
    return {"run": run.address, "name": run.name, **failed, **asdict(run)}


def dask_setup(_worker) -> None:
    """Dask calls this in each local worker. A terminal sends Ctrl-C to every process: the one that planned ends the
    workers, which say nothing of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _silence()


def _silence() -> None:
    """What Dask and its loop say of workers that end; what goes wrong in a run is told by its record."""
    for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _client(workers: int | None, scheduler: str | None, most: int, output_dir: Path):
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    _silence()
    if scheduler:
        with Client(scheduler) as client:
            client.wait_for_workers(1, timeout=PATIENCE)
            yield client
        return
    workers = min(workers or min(CPU_COUNT, 4), most)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(names, max(1, CPU_COUNT // workers)),
        "distributed.scheduler.worker-saturation": 1.0,  # who kills a worker takes no waiting run with it
    }
    local = {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "n_workers": workers,
        "threads_per_worker": 1,
        "memory_limit": 0,  # Dask would kill a process by a share of the memory that says nothing about torch
        "local_directory": str(
            output_dir / "unfinished" / "dask"
        ),  # Dask sweeps it at its next start
        "preload": __name__,
    }
    with dask.config.set(settings), LocalCluster(**local) as cluster, Client(cluster) as client:
        yield client


def write_table(records: list[dict], path: Path) -> None:
    """A CSV file with a row per run and number (a run without numbers: one row without). Lists and mappings as JSON."""
    import pandas as pd

    rows = []
    for record in records:
        about = {name: record[name] for name in ("run", "name", "status", "reason", "seconds")}
        about |= {
            name: json.dumps(value) if isinstance(value, list | dict) else value
            for name, value in record["parameters"].items()
        }
        rows += [about | number for number in record["results"] or [{}]]
    if rows:
        columns = [name for name in dict.fromkeys(name for row in rows for name in row)]
        numbers = ["category", "metric", "value"]
        order = [name for name in columns if name not in numbers] + numbers
        write_atomically(path, pd.DataFrame(rows).reindex(columns=order).to_csv(index=False))
