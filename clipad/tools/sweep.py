"""A grid of notebooks or evaluations on Dask: ``clipad sweep sweep.yaml``.

A file holds one block, or a list of blocks. A block is ``evaluate:`` with the parameters in `EVALUATE`, or
``notebook:`` with ``parameters:``. A list is an axis; a block stands for the product of its axes::

    - evaluate: {detectors: [sdp, direct], rvs: [mean, dbscan], categories: [screw, nut]}   # 2 x 2 x 2 runs
    - notebook: "05"
      parameters: {seed: [0, 1], categories: [[screw, nut]]}            # 2 runs with two categories each

Each run has an address, a hash of its parameters and of all that decides its numbers, and computes in the folder
``runs/<address>``. Its record ``run.json`` is written last and in one step: where it is, the run has ended. The next
sweep skips these runs, tries again those that failed, and goes on with those that were killed. Workers that die, and
retries, are Dask's.
"""

import contextlib
import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import dask
import pandas as pd
import torch
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, as_completed, get_worker
from tqdm import tqdm

from clipad.backbone import find_device
from clipad.datasets import load_dataset
from clipad.evaluation import evaluate, fingerprint
from clipad.files import address, code_version, content_hash, write_atomically
from clipad.prompts import load_prompts
from clipad.published import data_dir, protocol
from clipad.studies.experiments import DETECTORS, PRESETS, experiment, make_detector
from clipad.text import check_method
from clipad.tools.notebooks import find_notebook, inspect_parameters, read_notebook, source_hash
from clipad.tools.parameters import Parameter, declared, read_yaml, require_known, shown
from clipad.tools.runner import model_and_data, run_notebook

EVALUATE = f"""
detectors: str = "sdp"  # the detector [{"|".join(DETECTORS)}]
layers: str = ""  # path of the linear layers of sdp_plus
rvs: str = ""  # representative vector, the published one if empty
rvs_options: dict = {{}}  # its options, the published ones if empty
preset: str = "demo"  # model and data [{"|".join(PRESETS)}]
model: str = ""  # open_clip model name
pretrained: str = ""  # open_clip tag, path of a checkpoint, or random
image_size: int = 0  # pixels a side, the model's own if 0 [1..]
dataset: str = ""  # data set
data_root: str = ""  # path of the data set
normal_folder: str = ""  # name of the sub-folders with flawless images, for dataset folder
categories: list[str] = []  # categories of one run, all if empty
prompts: str = ""  # path of a YAML file with prompts
seed: int = 0  # seed of random weights [0..]
device: str = ""  # where to compute, a GPU if there is one
"""
FILES = ("layers", "prompts", "train_root")
"""parameters that name a file or a folder whose content decides the result"""


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
        return address([self.name, self.parameters, self.inputs])

    def folder(self, output_dir) -> Path:
        return Path(output_dir) / "runs" / self.address

    def read_record(self, output_dir) -> dict:
        """The record, if the run has ended; else empty."""
        path = self.folder(output_dir) / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def has_ended_well(self, output_dir) -> bool:
        return self.read_record(output_dir).get("status") in ("ok", "skipped")

    def write_record(self, output_dir, found: dict) -> dict:
        record = {"run": self.address, "name": self.name, **found, **asdict(self)}
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_atomically(self.folder(output_dir) / "run.json", text + "\n")
        return record


# --- from YAML to runs ----------------------------------------------------------------------------------------------


def plan(path) -> list[Run]:
    """The runs of a sweep file, in its order (the last axis varies fastest), each once.

    Checked here, before anything runs: names and values of parameters, data sets, named files, prompts. Raises
    ValueError or FileNotFoundError with what was found and what was expected.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        example = "notebooks/sweep_example.yaml is one to start from"
        raise FileNotFoundError(f"no sweep file {path}; {example}")
    blocks = read_yaml(path.read_bytes(), str(path))
    blocks = blocks if blocks and isinstance(blocks, list) else [blocks]
    runs = [run for block in blocks for run in _expand(block)]
    return list({run.address: run for run in runs}.values())


def _expand(block) -> Iterator[Run]:
    match block:
        case {"evaluate": axes, **rest} if not rest:
            for values in _grid(axes, "evaluate", declared(EVALUATE, "evaluate")):
                values = _evaluation(values)
                yield Run("", values, _inputs(values))
        case {"notebook": name, **rest} if rest.keys() <= {"parameters"}:
            # YAML reads 05 as the number 5
            source = find_notebook(f"{name:02d}" if isinstance(name, int) else str(name))
            known = inspect_parameters(source)
            known.pop("output_dir", None)  # every run has a folder of its own
            notebook = {"notebook": source_hash(read_notebook(source))}
            for values in _grid(rest.get("parameters", {}), source.stem, known):
                yield Run(str(source), values, notebook | _inputs(values))
        case _:
            raise ValueError(
                "a block holds either `evaluate:`, or `notebook:` and `parameters:`; "
                f"found {shown(block)}"
            )


def _grid(axes, what: str, known: dict[str, Parameter]) -> list[dict]:
    """Checked values of all known parameters, for each point of the product of the axes.

    For a parameter that is itself a list, [a, b] is the axis of [a] and [b].
    """
    if not isinstance(axes, dict):
        raise ValueError(f"{what} has to be a mapping `name: values`, found {shown(axes)}")
    require_known(axes, known, what)
    values = {name: [parameter.default] for name, parameter in known.items()}
    for name, axis in axes.items():
        axis = axis if isinstance(axis, list) else [axis]
        if not axis:
            raise ValueError(f"{name} has no values: leave it out, or list at least one")
        if known[name].type.startswith("list"):
            axis = [value if isinstance(value, list) else [value] for value in axis]
        values[name] = [known[name].checked(value) for value in axis]
    names = [*axes, *(name for name in known if name not in axes)]
    points = product(*(values[name] for name in names))
    return [dict(zip(names, point, strict=True)) for point in points]


def _evaluation(values: dict) -> dict:
    """The values of an evaluation with what preset and protocol say, and without what its detector does not take, so
    that equal runs have one address."""
    values = values | model_and_data(values)
    if values["detectors"] != "sdp_plus":
        values["layers"] = ""
    elif not values["layers"]:
        raise ValueError("sdp_plus needs its linear layers: give the path of a checkpoint (layers)")
    if values["detectors"] == "winclip":  # has a text side of its own
        return values | {"rvs": "", "rvs_options": {}}
    rules = protocol(values["dataset"])
    if values["rvs"] in ("", rules.rvs):
        values["rvs"] = rules.rvs
        values["rvs_options"] = values["rvs_options"] or rules.rvs_options
    check_method(values["rvs"], values["rvs_options"])
    return values


def _inputs(values: dict) -> dict:
    """Hashes of code, images and named files: whoever changes one of them gets other addresses. (Weights of a tag, and
    random ones, follow from the parameters.)"""
    found = {"code": code_version(), "demo": _content(data_dir() / "demo" / "model")}
    if "preset" in values:
        chosen = values | model_and_data(values)
        data = [chosen.get(name) or None for name in ("data_root", "categories")]
        folder = chosen.get("normal_folder", "")
        found["samples"] = fingerprint(load_dataset(chosen["dataset"], *data, folder))
    files = {name: values[name] for name in FILES if values.get(name)}
    if (weights := values.get("pretrained")) and Path(weights).exists():
        files["pretrained"] = weights
    if "prompts" in files:
        load_prompts(files["prompts"])
    return found | {name: _content(Path(path)) for name, path in files.items()}


def _content(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return address([(file.relative_to(path).as_posix(), content_hash(file)) for file in files])


# --- one run, on a worker -------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # environment and random generators belong to a process


def run_one(run: Run, output_dir: str, gpus: list[str]) -> dict:
    """Computes a run, unless it has ended well before; writes and returns its record.

    A failure is told by the record, too: its ``status`` is then "failed". ``gpus``: see `placed`.
    """
    if not (Path(output_dir) / "runs").is_dir():
        raise FileNotFoundError(
            f"the worker does not see {output_dir}: it needs the sweep's file system"
        )
    if run.has_ended_well(output_dir):  # by a worker that was lost
        return run.read_record(output_dir)
    start = time.perf_counter()
    try:
        with _one_at_a_time:
            if code_version() != run.inputs["code"]:
                raise ValueError("the worker has another version of clipad than who planned")
            values = dict(run.parameters)
            if "device" in values:
                values["device"] = placed(values["device"], gpus)
            compute = _run_notebook if run.notebook else _run_evaluation
            found = compute(run, values, run.folder(output_dir))
    except Exception as error:
        found = _failure(error) | {"traceback": traceback.format_exc()}
    seconds = round(time.perf_counter() - start, 1)
    return run.write_record(output_dir, found | {"seconds": seconds})


def _failure(error: Exception) -> dict:
    reason = f"{type(error).__name__}: {error}"
    return {"status": "failed", "reason": reason, "results": [], "seconds": 0.0}


def placed(device: str, gpus: list[str]) -> str:
    """The device of a run on this worker: of the GPUs of a local cluster worker i has the i-th, unless the run asks for
    the CPU, or for a GPU by its number."""
    if not gpus or device == "cpu" or ":" in device:
        return device
    return gpus[get_worker().name % len(gpus)]


def _run_evaluation(run: Run, values: dict, folder: Path) -> dict:
    name, layers = values.pop("detectors"), values.pop("layers")
    options = {option: values.pop(option) for option in ("rvs", "rvs_options")}
    used = experiment(run.name, output_dir=str(folder), **values)
    options = {} if name == "winclip" else options
    if values["prompts"]:
        options["prompts"] = used.prompts
    detector = make_detector(name, used.backbone, layers or None, **options)
    table = evaluate(detector, used.dataset, folder, progress=False).table.drop(index="mean")
    long = table.reset_index().melt("category", var_name="metric").dropna()
    return {"status": "ok", "reason": "", "results": long.to_dict(orient="records")}


def _run_notebook(run: Run, values: dict, folder: Path) -> dict:
    """Executes the notebook; its numbers are those that it recorded, ``name.row.column`` (lists stay in its JSON)."""
    if "output_dir" in inspect_parameters(run.notebook):
        values["output_dir"] = str(folder)
    done = run_notebook(run.notebook, values, folder, progress_bar=False)
    record, results = folder / f"{run.name}.json", []
    if done.status == "ok" and record.is_file():
        flat = pd.json_normalize(json.loads(record.read_text(encoding="utf-8"))["results"], sep=".")
        numbers = flat.select_dtypes(["number", "bool"]).astype(float)
        results = numbers.melt(var_name="metric").assign(category="").to_dict(orient="records")
    return {"status": done.status, "reason": done.reason, "results": results}


# --- the sweep ------------------------------------------------------------------------------------------------------


def sweep(
    runs: list[Run], output_dir, workers: int | None = None, scheduler: str | None = None
) -> list[dict]:
    """Executes the runs that are not finished; returns the records of all that ended, in the order of ``runs``.

    Writes ``table.csv``, also when it is interrupted. ``workers``: local processes; None for one on each GPU that the
    runs may use, else one per core but at most 4. ``scheduler``: address of a running Dask cluster whose workers see
    ``output_dir`` under the same path and have the same clipad.

    Raises ValueError for a device that this machine has not, OSError when the cluster does not answer or is gone; runs
    that have not ended then are not done, and no failures. What goes wrong inside a run is told by its record.
    """
    output_dir = Path(output_dir).expanduser().resolve()
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not run.has_ended_well(output_dir)]
    try:
        if todo:
            _compute(todo, output_dir, workers, scheduler)
    finally:
        # from the disk: a run may have ended right before the interruption, when nobody looked any more
        records = [record for run in runs if (record := run.read_record(output_dir))]
        write_table(records, output_dir / "table.csv")
    return records


def _compute(todo: list[Run], output_dir: Path, workers, scheduler) -> None:
    """Executes the runs in ``todo`` and tells of each failure as it ends."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # errors say it once
    gpus = [] if scheduler else gpus_for(todo)
    workers = min(workers or len(gpus) or min(CPU_COUNT, 4), len(todo))
    with (
        Client(scheduler) if scheduler else local_cluster(workers) as client,
        tqdm(total=len(todo), unit="run") as bar,
    ):
        client.wait_for_workers(1, timeout=60)
        futures = client.map(run_one, todo, output_dir=str(output_dir), gpus=gpus)
        run_of = dict(zip(futures, todo, strict=True))
        for future in as_completed(futures):
            run = run_of.pop(future)
            try:
                record = future.result()
            except CancelledError:
                left = len(run_of) + 1
                raise OSError(f"the Dask scheduler is gone, {left} runs are not done") from None
            except Exception as error:  # its workers died (often: out of memory)
                record = run.write_record(output_dir, _failure(error))
            if record["status"] == "failed":
                where = run.folder(output_dir)
                bar.write(f"{run.name} failed: {record['reason']}; see {where}", sys.stderr)
            bar.update()


def gpus_for(runs: list[Run]) -> list[str]:
    """The GPUs of this machine, as in cuda:0 and cuda:1; none where all runs compute on the CPU.

    Raises ValueError for a device that torch does not see.
    """
    devices = [find_device(run.parameters.get("device", "cpu")) for run in runs]
    kinds = {device.type for device in devices} - {"cpu"}
    return [f"{kind}:{i}" for kind in kinds for i in range(torch.accelerator.device_count())]


def dask_setup(_worker) -> None:
    """Dask calls this in each local worker. A terminal sends Ctrl-C to every process: the one that planned ends the
    workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[Client]:
    """Dask on this machine: worker i is a process of its own, which shares the cores equally with the others."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(threads, max(1, CPU_COUNT // workers)),
        "distributed.scheduler.worker-saturation": 1.0,  # one that dies takes no waiting run with it
        "distributed.deploy.lost-worker-timeout": "10m",  # one that dies has time to start again
        "distributed.scheduler.no-workers-timeout": "10m",  # then what waits fails, and the sweep ends
    }
    local = {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "n_workers": workers,
        "threads_per_worker": 1,
        "memory_limit": 0,  # Dask's share of the memory says nothing about torch
        "preload": __name__,
        "silence_logs": logging.CRITICAL,
    }
    with dask.config.set(settings), LocalCluster(**local) as cluster, Client(cluster) as client:
        yield client


def write_table(records: list[dict], path: Path) -> None:
    """A CSV file with a row per run and number (a run without numbers: one row without). Lists and mappings as JSON."""
    rows = []
    for record in records:
        about = {name: record[name] for name in ("run", "name", "status", "reason", "seconds")}
        values = {
            name: json.dumps(value) if isinstance(value, list | dict) else value
            for name, value in record["parameters"].items()
        }
        nothing = dict.fromkeys(("category", "metric", "value"))
        rows += [about | nothing | number | values for number in record["results"] or [{}]]
    if rows:
        write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
