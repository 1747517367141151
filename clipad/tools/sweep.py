"""A grid of notebooks or evaluations on Dask: ``clipad sweep sweep.yaml``.

A file holds one block, or a list of blocks. A block is ``evaluate:`` with those in `EVALUATE` and the parameters of
notebook 00, or ``notebook:`` with ``parameters:``. A list is an axis; a block stands for the product of its axes::

    - evaluate: {detectors: [sdp, direct], rvs: [mean, dbscan], categories: [screw, nut]}   # 2 x 2 x 2 runs
    - notebook: "05"
      parameters: {seed: [0, 1], categories: [[screw, nut]]}            # 2 runs with two categories each

Each run has an address, a hash of all that decides its numbers. It computes in ``runs/<address>`` and, if it ends well,
leaves ``run.json`` there as the last thing: the next sweep skips it, and tries again what failed or was killed.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import dask
import pandas as pd
import torch
from dask.system import CPU_COUNT
from distributed import Client, as_completed, get_worker
from tqdm import tqdm

from clipad.backbone import find_device
from clipad.datasets import load_dataset
from clipad.evaluation import evaluate, fingerprint
from clipad.io.files import address, code_version, content_hash, write_atomically
from clipad.studies.experiments import DETECTORS, experiment, make_detector, resolve
from clipad.text import METHODS
from clipad.tools.notebooks import find_notebook, inspect_parameters, read_notebook, source_hash
from clipad.tools.parameters import Parameter, declared, read_yaml, require_known
from clipad.tools.runner import run_notebook

EVALUATE = f"""
detectors: str = "sdp"  # the detector [{"|".join(DETECTORS)}]
layers: str = ""  # path of the linear layers of sdp_plus
rvs: str = ""  # representative vector, the published one if empty [{"|".join(METHODS)}]
rvs_options: dict = {{}}  # its options, the published ones if empty
"""


def plan(path) -> list[dict]:
    """The runs of a sweep file, in its order (the last axis varies fastest), each once.

    A run has ``run`` (its address), ``name``, ``notebook`` (path of the source, "" for an evaluation), ``parameters``
    and ``inputs`` (hashes of what decides the result besides them). ValueError or OSError for what cannot run.
    """
    blocks = read_yaml(Path(path).read_bytes(), path)
    blocks = blocks if isinstance(blocks, list) else [blocks]
    return list({run["run"]: run for block in blocks for run in _runs(block)}.values())


def _runs(block) -> Iterator[dict]:
    """For a parameter that is itself a list, [a, b] is the axis of [a] and [b]."""
    match block:
        case {"evaluate": dict(axes), **rest} if not rest:
            name, source, inputs = "evaluate", "", {}
            known = inspect_parameters(find_notebook("00")) | declared(EVALUATE)
            known.pop("resamples")
        case {"notebook": notebook, **rest} if rest.keys() <= {"parameters"} and isinstance(
            rest.get("parameters") or {}, dict
        ):
            # YAML reads 05 as the number 5
            path = find_notebook(f"{notebook:02}" if isinstance(notebook, int) else notebook)
            name, source, axes = path.stem, str(path), rest.get("parameters") or {}
            known, inputs = inspect_parameters(path), {"notebook": source_hash(read_notebook(path))}
        case _:
            blocks = "`evaluate:` with parameters, or `notebook:` and `parameters:`"
            raise ValueError(f"a block is {blocks}; found {block}")
    known.pop("output_dir", None)  # every run has a folder of its own
    require_known(axes, known, name)
    points = []
    for parameter, axis in axes.items():
        axis = axis if isinstance(axis, list) else [axis]
        if not axis:
            raise ValueError(f"{parameter} has no values: leave it out, or list at least one")
        if known[parameter].type.startswith("list"):
            axis = [value if isinstance(value, list) else [value] for value in axis]
        points.append([known[parameter].checked(value) for value in axis])
    defaults = {parameter.name: parameter.default for parameter in known.values()}
    for point in product(*points):
        values = defaults | dict(zip(axes, point, strict=True))
        run = {"name": name, "notebook": source, "parameters": values}
        run["inputs"] = inputs | _inputs(values, known)
        yield {"run": address(run), **run}


def _inputs(values: dict, known: dict[str, Parameter]) -> dict:
    """Hashes of code, images and named files: whoever changes one of them gets other addresses."""
    files = {name: Path(value) for name, value in values.items() if known[name].is_path(value)}
    found = {"code": code_version()}
    if "preset" in values:
        root, categories = files.pop("data_root", None), values.get("categories")
        folder = values.get("normal_folder", "")
        data = load_dataset(resolve(**values)["dataset"], root, categories or None, folder)
        found["samples"] = fingerprint(data)
    for name, path in files.items():
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        hashes = [(str(p.relative_to(path)), content_hash(p)) for p in inside if not p.is_dir()]
        found[name] = address(hashes)
    return found


def read_record(run: dict, output_dir) -> dict | None:
    """A run that ended well, with ``status`` (ok, skipped), ``reason``, ``seconds``, ``results``."""
    path = Path(output_dir, "runs", run["run"], "run.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_one(run: dict, output_dir: str, gpus: list[str]) -> None:
    """Computes a run on a worker and writes its record; a failure is raised."""
    if read_record(run, output_dir):  # by a worker that was lost
        return
    if code_version() != run["inputs"]["code"]:
        raise ValueError("the worker has another version of clipad than who planned")
    start, values = time.perf_counter(), dict(run["parameters"])
    if "device" in values:
        values["device"] = placed(values["device"], gpus)
    folder = Path(output_dir, "runs", run["run"])
    folder.mkdir(exist_ok=True)  # not its parent: a worker has to see the sweep's file system
    found = run | (_run_notebook if run["notebook"] else _run_evaluation)(run, values, folder)
    found["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(folder / "run.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def placed(device: str, gpus: list[str]) -> str:
    """The device of a run: worker i has the i-th GPU, unless the run asks for the CPU, or for a GPU by its number."""
    free = gpus and device != "cpu" and ":" not in device
    return gpus[get_worker().name % len(gpus)] if free else device


def _run_evaluation(run: dict, values: dict, folder: Path) -> dict:
    name, layers = values.pop("detectors"), values.pop("layers")
    rvs, rvs_options = values.pop("rvs"), values.pop("rvs_options")
    used = experiment(run["name"], output_dir=str(folder), **values)
    options = {"prompts": used.prompts} if values["prompts"] else {}
    if name != "winclip":  # has a text side of its own
        options |= used.rvs
        if rvs not in ("", used.protocol.rvs) or rvs_options:
            options |= {"rvs": rvs or used.protocol.rvs, "rvs_options": rvs_options}
    detector = make_detector(name, used.backbone, layers or None, **options)
    table = evaluate(detector, used.dataset, folder, progress=False).table.drop(index="mean")
    long = table.reset_index().melt("category", var_name="metric").dropna()
    return {"status": "ok", "reason": "", "results": long.to_dict(orient="records")}


def _run_notebook(run: dict, values: dict, folder: Path) -> dict:
    """The notebook's numbers are those that it recorded, ``name.row.column`` (lists stay in its JSON)."""
    done = run_notebook(run["notebook"], values, folder, progress_bar=False)
    if done.status == "failed":
        raise RuntimeError(done.reason)
    record, results = folder / f"{run['name']}.json", []
    if record.is_file():
        flat = pd.json_normalize(json.loads(record.read_text(encoding="utf-8"))["results"], sep=".")
        numbers = flat.select_dtypes(["number", "bool"]).astype(float)
        results = numbers.melt(var_name="metric").assign(category="").to_dict(orient="records")
    return {"status": done.status, "reason": done.reason, "results": results}


def sweep(
    runs: list[dict], output_dir, workers: int | None = None, scheduler: str | None = None
) -> list[dict]:
    """Executes the runs that have not ended well; returns the records of all that ended, in the order of ``runs``, and
    writes them to ``table.csv``, also when it is interrupted. A failure has the status "failed".

    ``workers``: local processes; None for one on each GPU that the runs may use, else one per core but at most 4.
    ``scheduler``: address of a running Dask cluster whose workers see ``output_dir`` under the same path.

    Raises ValueError for a device that this machine has not, OSError when the cluster does not answer.
    """
    output_dir = Path(output_dir).resolve()
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not read_record(run, output_dir)]
    gpus = [] if scheduler else gpus_for(todo)
    workers = min(workers or len(gpus) or min(CPU_COUNT, 4), len(todo))
    failed = {}
    try:
        if todo:
            with Client(scheduler) if scheduler else local_cluster(workers) as client:
                for run, error in _failures(client, todo, str(output_dir), gpus):
                    reason = f"{type(error).__name__}: {error}"
                    tqdm.write(f"{run['name']} {run['run']} failed: {reason}", sys.stderr)
                    told = {"status": "failed", "reason": reason, "seconds": 0.0, "results": []}
                    failed[run["run"]] = run | told
    finally:
        # from the disk: a run may have ended right before the interruption, when nobody looked any more
        records = [read_record(run, output_dir) or failed.get(run["run"]) for run in runs]
        records = [record for record in records if record]
        write_table(records, output_dir / "table.csv")
    return records


def _failures(client: Client, todo: list[dict], output_dir: str, gpus: list[str]) -> Iterator:
    """Executes the runs; those that fail, with their error, also that workers died (often: out of memory)."""
    futures = client.map(run_one, todo, output_dir=output_dir, gpus=gpus)
    run_of = dict(zip(futures, todo, strict=True))
    for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
        if future.cancelled():
            raise OSError("the Dask scheduler is gone; the same command continues")
        if error := future.exception():
            yield run_of[future], error


def gpus_for(runs: list[dict]) -> list[str]:
    """The GPUs of this machine, none where all runs compute on the CPU; ValueError for one that torch does not see."""
    devices = [find_device(run["parameters"].get("device", "cpu")) for run in runs]
    kinds = {device.type for device in devices} - {"cpu"}
    return [f"{kind}:{i}" for kind in kinds for i in range(torch.accelerator.device_count())]


def dask_setup(_worker) -> None:
    """Dask calls this in each local worker. Ctrl-C goes to every process; the one that planned ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def local_cluster(workers: int) -> Client:
    """Dask on this machine: worker i is a process of its own, which shares the cores equally with the others."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # errors say it once
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    dask.config.set({
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(threads, max(1, CPU_COUNT // workers)),
        "distributed.scheduler.worker-saturation": 1.0,  # one that dies takes no waiting run with it
        "distributed.deploy.lost-worker-timeout": "10m",  # one that dies has time to start again
    })  # fmt: skip
    local = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "preload": __name__}
    # Dask's share of the memory says nothing about torch
    return Client(n_workers=workers, **local, memory_limit=0, silence_logs=logging.CRITICAL)


def write_table(records: list[dict], path: Path) -> None:
    """A CSV file with a row per run and number, one row for a run without numbers."""
    about = ("run", "name", "status", "reason", "seconds")
    rows = [
        {name: record[name] for name in about} | record["parameters"] | number
        for record in records
        for number in record["results"] or [{}]
    ]
    if rows:
        write_atomically(path, pd.DataFrame(rows).to_csv(index=False))
