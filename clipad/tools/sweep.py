"""A grid of notebooks or evaluations on Dask: ``clipad sweep sweep.yaml``.

A file holds one block, or a list of blocks. A block is ``evaluate:`` with the parameters in `EVALUATION`, or
``notebook:`` with ``parameters:``. A list is an axis; a block stands for the product of its axes::

    - evaluate: {detectors: [sdp, direct], rvs: [mean, dbscan], categories: [screw, nut]}   # 2 x 2 x 2 runs
    - notebook: "05"
      parameters: {seed: [0, 1], categories: [[screw, nut]]}            # 2 runs with two categories each

Each run has an address: a hash of its parameters, the code, the weights and the list of images. A worker computes in
a folder of its own below ``unfinished/`` and renames it to ``runs/<address>``. So a run is there completely or not at
all, and where Dask executes a run twice (a worker that was believed dead) the first to be renamed is the only result.
"""

import contextlib
import hashlib
import html
import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
import uuid
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

from clipad.files import code_version, write_atomically
from clipad.tools import runner
from clipad.tools.parameters import Parameter, checked, nearest
from clipad.tools.stored import read_notebook, source_hash

# Names of experiments.DETECTORS, without importing torch; sdp_plus needs layers, so it is swept by its notebook.
DETECTORS = ("sdp", "direct", "clip_surgery", "winclip")
_PARAMETERS = (
    Parameter("detectors", "str", "sdp", "the detector", choices=DETECTORS),
    Parameter("rvs", "str", "", "representative vector; the published one if empty"),
    Parameter("rvs_options", "dict", {}, "its options; the published ones if empty"),
    Parameter("preset", "str", "demo", "model and data", choices=("demo", "paper")),
    Parameter("model", "str", "", "open_clip model name"),
    Parameter("pretrained", "str", "", "open_clip tag, path of a checkpoint, or random"),
    Parameter("image_size", "int", 0, "side in pixels, the model's own if 0", low=1),
    Parameter("dataset", "str", "", "data set"),
    Parameter("data_root", "str", "", "path of the data set"),
    Parameter("categories", "list[str]", [], "categories of one run, all if empty"),
    Parameter("prompts", "str", "", "path of a YAML file with prompts"),
    Parameter("seed", "int", 0, "seed of random weights", low=0),
    Parameter("device", "str", "", "where to compute", choices=("cpu", "cuda")),
)
EVALUATION = {parameter.name: parameter for parameter in _PARAMETERS}


@dataclass(frozen=True)
class Run:
    """One point of the grid. ``notebook``: path of the source, "" for an evaluation; ``content``: hashes, by name, of
    what decides the result besides the parameters."""

    notebook: str
    parameters: dict
    content: dict

    @property
    def name(self) -> str:
        return Path(self.notebook).stem or "evaluate"

    @property
    def address(self) -> str:
        """Sixteen hex digits."""
        text = json.dumps([self.name, self.parameters, self.content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- from YAML to runs ----------------------------------------------------------------------------------------------


def plan(path) -> list[Run]:
    """The runs of a sweep file, in its order (the last axis varies fastest), each once.

    Everything that can be known beforehand is checked here: names and values of parameters, data sets, models,
    prompts. Raises ValueError or FileNotFoundError with what was found and what was expected.
    """
    from papermill.iorw import NoDatesSafeLoader
    from yaml import YAMLError, load

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no sweep file {path}; notebooks/sweep_example.yaml is one to start from"
        )
    try:
        blocks = load(path.read_text(encoding="utf-8"), Loader=NoDatesSafeLoader)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML in UTF-8: {error}") from None
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
        return [
            _evaluation(values) for values in _grid(block["evaluate"], "`evaluate`", EVALUATION)
        ]
    runner.require_own_kernel()
    runs = []
    for name in block["notebook"] if isinstance(block["notebook"], list) else [block["notebook"]]:
        # YAML reads 05 as the number 5
        source = runner.find_notebook(f"{name:02d}" if isinstance(name, int) else str(name))
        known = runner.inspect_parameters(source)
        known.pop("output_dir", None)  # every run has a folder of its own
        content = {"notebook": source_hash(read_notebook(source))}
        for values in _grid(block.get("parameters", {}), f"`parameters` of {source.stem}", known):
            values = runner.check_parameters(source, values)
            runs.append(Run(str(source), values, content | _inputs(values)))
    return runs


def _grid(axes, what: str, known: dict[str, Parameter]) -> list[dict]:
    """Values of all known parameters, for each point of the product of the axes.

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
        values[name] = axis
    order = [*axes, *(name for name in known if name not in axes)]
    return [
        dict(zip(order, point, strict=True)) for point in product(*(values[name] for name in order))
    ]


def _require_keys(found, what: str, known) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} has to be a mapping `name: value`, found {found!r}")
    for name in found:
        if name not in known:
            raise ValueError(f"{what} has no key {name!r}; {nearest(name, known)}")


def _evaluation(values: dict) -> Run:
    from clipad.published import protocol
    from clipad.text import check_method

    values = {name: checked(EVALUATION[name], value) for name, value in values.items()}
    values |= _model_and_data(values) | {"detectors": values["detectors"] or "sdp"}
    if values["detectors"] != "winclip":
        rules = protocol(values["dataset"])
        published = rules.rvs_options if values["rvs"] in ("", rules.rvs) else {}
        values |= {
            "rvs": values["rvs"] or rules.rvs,
            "rvs_options": values["rvs_options"] or published,
        }
        check_method(values["rvs"], values["rvs_options"])
    elif values["rvs"] or values["rvs_options"]:
        raise ValueError("winclip has a fixed text side, no rvs: give it a block of its own")
    return Run("", values, _inputs(values))


def _model_and_data(values: dict) -> dict:
    """model, pretrained and dataset as `clipad.experiment` chooses them."""
    from clipad.studies.experiments import PRESETS

    chosen = dict(PRESETS[values.get("preset") or "demo"])
    if values.get("model") and values["model"] != chosen["model"]:
        chosen |= {"model": values["model"], "pretrained": ""}
    chosen |= {key: values[key] for key in ("pretrained", "dataset") if values.get(key)}
    if chosen["model"] != "demo" and not chosen["pretrained"]:
        raise ValueError(
            f"model {chosen['model']!r} needs pretrained: a tag, a checkpoint, or random"
        )
    if chosen["model"] == "demo" and chosen["pretrained"] == "random":
        raise ValueError(
            "model 'demo' has no random weights; as a control name another one, as ViT-S-32-alt"
        )
    return chosen


def _inputs(values: dict) -> dict:
    """Hashes of code, images, weights, layers and prompts: whoever changes one of them gets other addresses."""
    from clipad.published import protocol

    found = {"code": code_version()}
    if {"preset", "model", "dataset"} & values.keys():
        chosen = values | _model_and_data(values)
        found["samples"] = _samples(
            chosen["dataset"], values.get("data_root", ""), *values.get("categories", [])
        )
        found["weights"] = _weights(*_which_weights(chosen))
        if values.get("train_root"):
            trained_on = values.get("train_dataset") or protocol(chosen["dataset"]).trained_on
            found["train_samples"] = _samples(trained_on, values["train_root"])
    if values.get("backbones"):  # "name" or "name/pretrained"
        parts = (name.partition("/") for name in values["backbones"])
        found["backbones"] = [_weights(model, pretrained, 0, 0) for model, _, pretrained in parts]
    if values.get("layers"):
        from clipad.training import load_layers

        found["layers"] = load_layers(values["layers"]).hash
    if values.get("prompts"):
        from clipad.prompts import load_prompts

        found["prompts"] = asdict(load_prompts(values["prompts"]))
    return found


@cache
def _samples(dataset: str, root: str, *categories: str) -> str:
    from clipad.datasets import load_dataset
    from clipad.evaluation import fingerprint

    return fingerprint(load_dataset(dataset, root or None, categories))


@cache
def _weights(*which) -> str:
    return _backbone(*which, device="cpu").weights_hash  # the machine that plans needs no GPU


def _which_weights(chosen: dict) -> tuple:
    """model, pretrained, image_size, seed: where the weights are not random no seed changes them."""
    pretrained, seed = chosen["pretrained"], 0
    if pretrained == "random":
        pretrained, seed = "", chosen.get("seed", 0)
    return chosen["model"], pretrained, chosen.get("image_size", 0), seed


@lru_cache(maxsize=1)
def _backbone(model: str, pretrained: str, image_size: int, seed: int, device: str):
    from clipad.backbone import load_backbone

    return load_backbone(model, pretrained or None, device or None, image_size or None, seed)


# --- on a worker ----------------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # environment and random generators belong to a process


def execute(run: Run, output_dir: str) -> tuple[Path, dict] | None:
    """Computes one run and puts it at its address, unless it is there.

    A failure is returned, as `_publish` takes it, for the sweep to put there: in a worker that is being closed runs
    fail, too, and nobody waits for those any more.
    """
    if not (Path(output_dir) / "runs").is_dir():
        raise FileNotFoundError(
            f"the worker does not see {output_dir}: it needs the sweep's file system"
        )
    if _read(run, output_dir):
        return
    folder, start = _new_folder(run, output_dir), time.perf_counter()
    try:
        with _one_at_a_time:
            if code_version() != run.content["code"]:
                raise ValueError(
                    "the worker has another version of clipad than the machine that planned"
                )
            found = _run_notebook(run, folder) if run.notebook else _run_evaluation(run, folder)
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "results": []}
    found["seconds"] = round(time.perf_counter() - start, 1)
    if found["status"] == "failed":
        return folder, found
    _publish(run, folder, found)
    return None


def _run_evaluation(run: Run, folder: Path) -> dict:
    from clipad.datasets import load_dataset
    from clipad.evaluation import evaluate
    from clipad.prompts import load_prompts
    from clipad.studies.experiments import make_detector

    values = run.parameters
    backbone = _backbone(*_which_weights(values), device=values["device"])
    if backbone.weights_hash != run.content["weights"]:
        raise ValueError("the worker has other weights than the machine that planned")
    options = {"prompts": load_prompts(values["prompts"]) if values["prompts"] else None}
    options |= {"rvs": values["rvs"], "rvs_options": values["rvs_options"]} if values["rvs"] else {}
    detector = make_detector(values["detectors"], backbone, **options)
    dataset = load_dataset(values["dataset"], values["data_root"] or None, values["categories"])
    table = evaluate(detector, dataset, folder, progress=False).table.drop(index="mean")
    long = table.reset_index().melt("category", var_name="metric").dropna()
    return {"status": "ok", "reason": "", "results": long.to_dict(orient="records")}


def _run_notebook(run: Run, folder: Path) -> dict:
    """Executes the notebook; its numbers are those that it recorded, ``name.row.column`` (lists stay in its JSON)."""
    import pandas as pd

    known = runner.inspect_parameters(run.notebook)
    own_folder = {"output_dir": str(folder)} if "output_dir" in known else {}
    done = runner.run_notebook(
        run.notebook, run.parameters | own_folder, folder, progress_bar=False
    )
    record, results = folder / f"{run.name}.json", []
    if record.is_file():
        flat = pd.json_normalize(json.loads(record.read_text(encoding="utf-8"))["results"], sep=".")
        numbers = {
            name: column.iloc[0] for name, column in flat.items() if column.dtype.kind in "biuf"
        }
        results = [
            {"category": "", "metric": name, "value": float(n)} for name, n in numbers.items()
        ]
    return {"status": done.status, "reason": done.reason, "results": results}


def _new_folder(run: Run, output_dir) -> Path:
    folder = Path(output_dir) / "unfinished" / f"{run.address}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    return folder


def _publish(run: Run, folder: Path, found: dict) -> None:
    record = {"run": run.address, "name": run.name} | found | asdict(run)
    write_atomically(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    final = folder.parents[1] / "runs" / run.address
    try:
        folder.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(folder)  # another attempt was first; its result stands


def _read(run: Run, output_dir) -> dict | None:
    path = Path(output_dir) / "runs" / run.address / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --- the sweep ------------------------------------------------------------------------------------------------------


def sweep(
    runs: list[Run], output_dir, workers: int | None = None, scheduler: str | None = None
) -> list[dict]:
    """Executes the runs that are not finished; returns the records of all, in the order of ``runs``.

    Writes ``table.parquet``, ``table.csv`` and ``index.html``, also when it is interrupted. Runs that failed in an
    earlier sweep are tried again. ``workers``: local processes, None for one per core but at most 4; ``scheduler``:
    address of a running Dask cluster whose workers see ``output_dir`` under the same path and have the same clipad.

    Raises OSError when the cluster does not answer; what goes wrong inside a run is told by its record.
    """
    output_dir = Path(output_dir).expanduser().resolve()
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    todo = []
    for run in runs:
        record = _read(run, output_dir)
        if record and record["status"] == "failed":
            shutil.rmtree(output_dir / "runs" / run.address)
            record = None
        if not record:
            todo.append(run)
    try:
        if todo:
            _compute(todo, len(runs), output_dir, workers, scheduler)
    finally:
        # From the disk: a run may have ended right before the interruption, when nobody looked any more.
        records = [record for run in runs if (record := _read(run, output_dir))]
        _write_results(records, len(runs), output_dir)
    addresses = {run.address for run in runs}
    for rest in (output_dir / "unfinished").glob("*"):  # what killed attempts left
        if rest.name.partition("-")[0] in addresses:
            shutil.rmtree(rest)
    return records


def _compute(todo: list[Run], planned: int, output_dir: Path, workers, scheduler) -> None:
    """Executes the runs in ``todo`` and tells of each as it ends."""
    from distributed import as_completed
    from tqdm import tqdm

    with (
        _client(workers, scheduler, len(todo)) as client,
        tqdm(total=planned, initial=planned - len(todo), unit="run") as bar,
    ):
        futures = client.map(execute, todo, output_dir=str(output_dir))
        run_of = dict(zip(futures, todo, strict=True))
        for future in as_completed(futures):
            run = run_of[future]
            try:
                failure = future.result()
            except Exception as error:
                failure = _without_answer(run, output_dir, error)
            if failure:
                _publish(run, *failure)
            record = _read(run, output_dir)
            if record["status"] == "failed":
                place = output_dir / "runs" / run.address
                bar.write(f"{run.name} failed: {record['reason']}; see {place}", file=sys.stderr)
            bar.update()


def _without_answer(run: Run, output_dir: Path, error) -> tuple[Path, dict]:
    """The failure of a run whose workers died (often: out of memory) or could not start it."""
    attempts = sorted((output_dir / "unfinished").glob(f"{run.address}-*"), key=os.path.getmtime)
    folder = attempts[-1] if attempts else _new_folder(run, output_dir)
    reason = str(error).strip().partition(". ")[0]
    return folder, {"status": "failed", "reason": reason, "results": [], "seconds": 0.0}


# In each local worker. A terminal sends Ctrl-C to every process: the one that plans ends the others, and they do it
# in silence (Dask warns of cancelled tasks, asyncio of loops that are still open). What goes wrong in a run is told
# by its record.
_PRELOAD = """
import atexit, logging, signal, sys
signal.signal(signal.SIGINT, lambda *_: None)
logging.getLogger("distributed").setLevel(logging.CRITICAL)
atexit.register(setattr, sys, "unraisablehook", lambda *_: None)
"""


@contextlib.contextmanager
def _client(workers: int | None, scheduler: str | None, most: int):
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.ERROR)
    if scheduler:
        with Client(scheduler) as client:
            client.wait_for_workers(1, timeout=60)
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
        "preload": _PRELOAD,
    }
    with dask.config.set(settings), LocalCluster(**local) as cluster, Client(cluster) as client:
        yield client


def _write_results(records: list[dict], planned: int, output_dir: Path) -> None:
    """The table, one row per run and number (a run without numbers: one row without), and the index page."""
    import pandas as pd

    if not records:
        return
    # lists and mappings as JSON, so that a column has one type
    rows = []
    for record in records:
        values = {
            k: json.dumps(v) if isinstance(v, list | dict) else v
            for k, v in record["parameters"].items()
        }
        rows.append({k: record[k] for k in ("run", "name", "status", "reason", "seconds")} | values)
    runs = pd.DataFrame(rows)
    numbers = [
        {"run": record["run"]} | result for record in records for result in record["results"]
    ]
    numbers = pd.DataFrame(numbers, columns=["run", "category", "metric", "value"])
    table = runs.merge(numbers, on="run", how="left").convert_dtypes()
    mixed = table.select_dtypes(
        "object"
    ).columns  # text in one block and a number in another: Parquet has one type
    table[mixed] = table[mixed].map(str, na_action="ignore")
    write_atomically(output_dir / "table.csv", table.to_csv(index=False))
    write_atomically(output_dir / "table.parquet", table.to_parquet(index=False))

    shown = ["name", "status", "reason", "seconds"]
    same = {name: column[0] for name, column in runs.items() if column.nunique(dropna=False) == 1}
    page = runs.drop(columns=[name for name in same if name not in shown])
    page = page.map(lambda value: "" if pd.isna(value) else html.escape(str(value)))
    page["files"] = [_links(record, output_dir) for record in records]
    with pd.option_context("display.max_colwidth", None):
        body = page.drop(columns="run", errors="ignore").to_html(
            index=False, escape=False, border=0
        )
    settings = ", ".join(
        f"{name} = {value}" for name, value in same.items() if name not in ["run", *shown]
    )
    failed = int((runs["status"] == "failed").sum())
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>clipad sweep</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 2rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ccc }}
</style>
<h1>Sweep: {len(records)} of {planned} runs ended, {failed} of them failed</h1>
<p>All numbers: <a href="table.csv">table.csv</a>, <a href="table.parquet">table.parquet</a>.
In every run: {html.escape(settings)}.</p>
{body}
</html>
"""
    write_atomically(output_dir / "index.html", text)


def _links(record: dict, output_dir: Path) -> str:
    names = (f"{record['name']}.ipynb", "table.csv", "images.csv", "traceback.txt", "run.json")
    there = [name for name in names if (output_dir / "runs" / record["run"] / name).is_file()]
    return " ".join(
        f'<a href="runs/{record["run"]}/{html.escape(name)}">{html.escape(name)}</a>'
        for name in there
    )
