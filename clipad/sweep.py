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
import json
import shutil
import threading
import time
import traceback
import uuid
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path

from clipad.files import code_version, write_atomically
from clipad.runner import (
    Parameter,
    _checked,
    _nearest,
    check_parameters,
    find_notebook,
    inspect_parameters,
    read_notebook,
    require_own_kernel,
    run_notebook,
    source_hash,
)

DETECTORS = {
    "sdp": ("detectors", "SDP"),
    "direct": ("detectors", "Direct"),
    "clip_surgery": ("detectors", "ClipSurgery"),
    "winclip": ("winclip", "WinCLIP"),
}
EVALUATION = {
    parameter.name: parameter
    for parameter in (
        Parameter("detectors", "str", "sdp", "the detector", choices=tuple(DETECTORS)),
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
}


@dataclass(frozen=True)
class Run:
    """One point of the grid. ``notebook`` is the path of the source, empty for an evaluation; ``content`` is what
    besides the parameters decides the result (hashes by name)."""

    notebook: str
    parameters: dict
    content: dict

    @property
    def name(self) -> str:
        return Path(self.notebook).stem if self.notebook else f"evaluate {self.parameters['detectors']}"

    @property
    def address(self) -> str:
        """Sixteen hex digits."""
        text = json.dumps([Path(self.notebook).stem, self.parameters, self.content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- from YAML to runs ----------------------------------------------------------------------------------------------


def plan(path) -> list[Run]:
    """The runs of a sweep file, in its order, each once.

    Everything that can be known beforehand is checked here: names and values of parameters, data sets, models,
    prompts. Raises ValueError or FileNotFoundError with what was found and what was expected.
    """
    from papermill.iorw import NoDatesSafeLoader
    from yaml import YAMLError, load

    try:
        blocks = load(Path(path).expanduser().read_text(encoding="utf-8"), Loader=NoDatesSafeLoader)
    except YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    runs = [run for block in (blocks if isinstance(blocks, list) else [blocks]) for run in _expand(block)]
    if not runs:
        raise ValueError(f"{path} holds no block `evaluate:` or `notebook:`")
    return list({run.address: run for run in runs}.values())


def _expand(block) -> list[Run]:
    _require_mapping(block, "a block", ["evaluate", "notebook", "parameters"])
    if ("evaluate" in block) == ("notebook" in block) or ("evaluate" in block and "parameters" in block):
        raise ValueError("a block holds either `evaluate:`, or `notebook:` and `parameters:`")
    if "evaluate" in block:
        _require_mapping(block["evaluate"], "`evaluate`", EVALUATION)
        defaults = {name: parameter.default for name, parameter in EVALUATION.items()}
        return [_evaluation(defaults | values) for values in _grid(block["evaluate"], EVALUATION)]
    require_own_kernel()
    runs = []
    for name in block["notebook"] if isinstance(block["notebook"], list) else [block["notebook"]]:
        # YAML reads 05 as the number 5
        source = find_notebook(f"{name:02d}" if isinstance(name, int) else str(name))
        known = inspect_parameters(source)
        _require_mapping(block.get("parameters", {}), f"`parameters` of {source.stem}", known)
        if "output_dir" in block.get("parameters", {}):
            raise ValueError("output_dir is no axis: every run of a sweep has its own folder")
        defaults = {name: parameter.default for name, parameter in known.items() if name != "output_dir"}
        content = {"notebook": source_hash(read_notebook(source))}
        for values in _grid(block.get("parameters", {}), known):
            values = check_parameters(source, defaults | values)
            runs.append(Run(str(source), values, content | _inputs(values)))
    return runs


def _require_mapping(found, what: str, known) -> None:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{what} has to be a mapping `name: value`, found {found!r}")
    for name in found:
        if name not in known:
            raise ValueError(f"{what} has no key {name!r}; {_nearest(name, known)}")


def _grid(axes: dict, known: dict[str, Parameter]) -> list[dict]:
    """The product of the axes; for a parameter that is itself a list, [a, b] is the axis of [a] and [b]."""
    values = []
    for name, axis in axes.items():
        axis = axis if isinstance(axis, list) else [axis]
        if not axis:
            raise ValueError(f"{name} has no values: leave it out, or list at least one")
        if known[name].type.startswith("list"):
            axis = [value if isinstance(value, list) else [value] for value in axis]
        values.append(axis)
    return [dict(zip(axes, point, strict=True)) for point in product(*values)]


def _evaluation(values: dict) -> Run:
    from clipad.published import protocol
    from clipad.text import check_method

    values = {name: _checked(EVALUATION[name], value) for name, value in values.items()}
    values["detectors"] = values["detectors"] or "sdp"
    values |= _model_and_data(values)
    if values["detectors"] == "winclip":
        if values["rvs"] or values["rvs_options"]:
            raise ValueError("winclip has a fixed text side, no rvs: give it a block of its own")
    else:
        rules = protocol(values["dataset"])
        published = rules.rvs_options if values["rvs"] in ("", rules.rvs) else {}
        values |= {"rvs": values["rvs"] or rules.rvs, "rvs_options": values["rvs_options"] or published}
        check_method(values["rvs"], values["rvs_options"])
    return Run("", values, _inputs(values))


def _model_and_data(values: dict) -> dict:
    """What `clipad.experiment` makes of the parameters: model, pretrained and dataset, presets resolved."""
    from clipad.experiments import PRESETS

    chosen = dict(PRESETS[values.get("preset") or "demo"])
    if values.get("model") and values["model"] != chosen["model"]:
        chosen |= {"model": values["model"], "pretrained": ""}
    chosen |= {key: values[key] for key in ("pretrained", "dataset") if values.get(key)}
    if chosen["model"] != "demo" and not chosen["pretrained"]:
        raise ValueError(
            f"model {chosen['model']!r} needs pretrained: an open_clip tag, a checkpoint, or random"
        )
    return chosen


def _inputs(values: dict) -> dict:
    """Hashes of code, weights, images and prompts: whoever changes one of them gets other addresses."""
    found = {"code": code_version()}
    if {"preset", "model", "dataset"} & values.keys():
        chosen = _model_and_data(values)
        seed = values.get("seed", 0) if chosen["pretrained"] == "random" else 0
        found["samples"] = _samples(
            chosen["dataset"], values.get("data_root", ""), *values.get("categories", [])
        )
        found["weights"] = _weights(chosen["model"], chosen["pretrained"], values.get("image_size", 0), seed)
    if "prompts" in values:
        from clipad.prompts import load_prompts

        found["prompts"] = asdict(load_prompts(values["prompts"] or None))
    return found


@cache
def _samples(dataset: str, root: str, *categories: str) -> str:
    from clipad.datasets import load_dataset
    from clipad.evaluation import fingerprint

    return fingerprint(load_dataset(dataset, root or None, categories))


@cache
def _weights(*key) -> str:
    return _backbone(*key, "cpu").weights_hash  # the machine that plans needs no GPU


@lru_cache(maxsize=1)
def _backbone(model: str, pretrained: str, image_size: int, seed: int, device: str):
    from clipad.backbone import load_backbone

    weights = None if pretrained in ("", "random") else pretrained
    return load_backbone(model, weights, device or None, image_size or None, seed)


# --- on a worker ----------------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # environment, seeds and file names belong to a process


def execute(run: Run, output_dir: str) -> None:
    """Computes one run and puts it at its address, unless it is there. An exception inside the run is its result."""
    final = Path(output_dir) / "runs" / run.address
    if not final.parent.is_dir():
        raise FileNotFoundError(f"the worker does not see {final.parent}: it needs the sweep's file system")
    if final.exists():
        return
    folder = Path(output_dir) / "unfinished" / f"{run.address}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    start, status, reason, results = time.perf_counter(), "ok", "", []
    try:
        with _one_at_a_time:
            if code_version() != run.content["code"]:
                raise ValueError("the worker has another version of clipad than the machine that planned")
            if run.notebook:
                given = (
                    {"output_dir": str(folder)} if "output_dir" in inspect_parameters(run.notebook) else {}
                )
                done = run_notebook(run.notebook, run.parameters | given, folder, progress_bar=False)
                status, reason, results = (
                    done.status,
                    done.reason,
                    _notebook_results(folder / f"{run.name}.json"),
                )
            else:
                results = _evaluate(run, folder)
    except Exception as error:
        status, reason = "failed", f"{type(error).__name__}: {error}"
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    _publish(run, folder, final, status, reason, round(time.perf_counter() - start, 1), results)


def _evaluate(run: Run, folder: Path) -> list[dict]:
    from clipad.datasets import load_dataset
    from clipad.evaluation import evaluate
    from clipad.prompts import load_prompts

    values = run.parameters
    seed = values["seed"] if values["pretrained"] == "random" else 0
    backbone = _backbone(values["model"], values["pretrained"], values["image_size"], seed, values["device"])
    if backbone.weights_hash != run.content["weights"]:
        raise ValueError("the worker has other weights than the machine that planned")
    module, name = DETECTORS[values["detectors"]]
    options = {"prompts": load_prompts(values["prompts"]) if values["prompts"] else None}
    if values["rvs"]:
        options |= {"rvs": values["rvs"], "rvs_options": values["rvs_options"]}
    detector = getattr(import_module(f"clipad.{module}"), name)(backbone, **options)
    dataset = load_dataset(values["dataset"], values["data_root"] or None, values["categories"])
    table = evaluate(detector, dataset, folder, progress=False).table.drop(index="mean")
    long = table.reset_index().melt("category", var_name="metric").dropna()
    return long.to_dict(orient="records")


def _notebook_results(record: Path) -> list[dict]:
    """The numbers that a notebook recorded, ``name.row.column``; lists stay in the notebook's own JSON."""
    import pandas as pd

    if not record.is_file():
        return []
    flat = pd.json_normalize(json.loads(record.read_text(encoding="utf-8"))["results"], sep=".")
    numbers = {name: values.iloc[0] for name, values in flat.items() if values.dtype.kind in "biuf"}
    return [{"category": "", "metric": name, "value": float(value)} for name, value in numbers.items()]


def _publish(run: Run, folder: Path, final: Path, status, reason, seconds, results) -> None:
    record = {"run": run.address, "name": run.name, "status": status, "reason": reason, "seconds": seconds}
    record |= asdict(run) | {"results": results}
    write_atomically(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    try:
        folder.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(folder)  # another attempt was first; its result stands


# --- the sweep ------------------------------------------------------------------------------------------------------


def sweep(
    runs: list[Run], output_dir, workers: int | None = None, scheduler: str | None = None
) -> list[dict]:
    """Executes the runs that are not finished; returns the records of all that are, in the order of ``runs``.

    Writes ``table.parquet``, ``table.csv`` and ``index.html``, also when it is interrupted. Failed runs of an earlier
    sweep are tried again. ``workers``: local processes, None for a process per core but at most 4; ``scheduler``:
    address of a running Dask cluster whose workers see ``output_dir`` under the same path and have the same clipad.

    Raises OSError when the cluster does not answer; what goes wrong inside a run is told by its record.
    """
    from distributed import as_completed
    from tqdm import tqdm

    output_dir = Path(output_dir).expanduser().resolve()
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    records = {run.address: _record(output_dir, run) for run in runs}
    for address, record in records.items():
        if record and record["status"] == "failed":
            shutil.rmtree(output_dir / "runs" / address)
            records[address] = None
    todo = [run for run in runs if not records[run.address]]
    try:
        if todo:
            with (
                _client(workers, scheduler, len(todo)) as client,
                tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as bar,
            ):
                run_of = {client.submit(execute, run, str(output_dir)): run for run in todo}
                for future in as_completed(run_of):
                    run = run_of[future]
                    if future.status != "finished":
                        _fail(run, output_dir, future)
                    records[run.address] = _record(output_dir, run)
                    if records[run.address]["status"] == "failed":
                        bar.write(f"{run.name} failed: {records[run.address]['reason']}")
                    bar.update()
    finally:
        done = [record for record in records.values() if record]
        _write_results(done, len(runs), output_dir)
    for rest in (output_dir / "unfinished").glob("*"):  # of killed attempts
        if rest.name.partition("-")[0] in records:
            shutil.rmtree(rest)
    return done


def _record(output_dir: Path, run: Run) -> dict | None:
    path = output_dir / "runs" / run.address / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _fail(run: Run, output_dir: Path, future) -> None:
    """The record of a run that could not make one: its workers died (often: out of memory), or never could start."""
    folder = output_dir / "unfinished" / f"{run.address}-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    reason = "cancelled by the cluster" if future.cancelled() else f"{future.exception()}"
    (folder / "traceback.txt").write_text(reason, encoding="utf-8")
    _publish(run, folder, output_dir / "runs" / run.address, "failed", reason, 0.0, [])


@contextlib.contextmanager
def _client(workers: int | None, scheduler: str | None, most: int):
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    if scheduler:
        with Client(scheduler) as client:
            client.wait_for_workers(1, timeout=60)
            yield client
        return
    workers = min(workers or min(CPU_COUNT, 4), most)
    threads = max(1, CPU_COUNT // workers)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(names, threads),
        "distributed.scheduler.worker-saturation": 1.0,  # who kills a worker takes no waiting run with it
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            host="127.0.0.1",
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # torch's memory is none of Dask's business
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _write_results(records: list[dict], planned: int, output_dir: Path) -> None:
    """One row per run and number; a run without numbers is a row without ``metric`` and ``value``."""
    import pandas as pd
    from jinja2 import Template

    rows, columns = [], ["run", "name", "status", "seconds"]
    for record in records:
        # lists and mappings as JSON, so that a column has one type
        values = {
            k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in record["parameters"].items()
        }
        first = {name: record[name] for name in columns} | values
        rows += [first | result for result in record["results"] or [{"category": None}]]
    table = pd.DataFrame(rows).convert_dtypes()
    write_atomically(output_dir / "table.csv", table.to_csv(index=False))
    write_atomically(output_dir / "table.parquet", table.to_parquet(index=False))
    names = list(dict.fromkeys(name for record in records for name in record["parameters"]))
    differing = [n for n in names if len({json.dumps(r["parameters"].get(n)) for r in records}) > 1]
    for record in records:
        files = (f"{record['name']}.ipynb", "table.csv", "images.csv", "traceback.txt", "run.json")
        record["files"] = [f for f in files if (output_dir / "runs" / record["run"] / f).is_file()]
    page = Template(PAGE, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.render(
        records=records, planned=planned, differing=differing, same=set(names) - set(differing)
    )
    write_atomically(output_dir / "index.html", text)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>clipad sweep</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; margin: 2rem; color: #222 }
table { border-collapse: collapse }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ccc; vertical-align: top }
.failed { background: #fbe9e7 }
</style>
<h1>Sweep: {{ records | length }} of {{ planned }} runs,
{{ records | selectattr("status", "equalto", "failed") | list | length }} failed</h1>
<p>Numbers: <a href="table.csv">table.csv</a>, <a href="table.parquet">table.parquet</a>.
{% if records %}
Same in all runs:
{% for name in same | sort %}{{ name }} = {{ records[0].parameters[name] | tojson }}{{ ", " if not loop.last }}{% endfor %}.
{% endif %}
</p>
<table>
<tr><th>run</th>{% for name in differing %}<th>{{ name }}</th>{% endfor %}
<th>status</th><th>seconds</th><th>files</th></tr>
{% for record in records %}
<tr class="{{ record.status }}"><td>{{ record.name }}</td>
{% for name in differing %}<td>{{ record.parameters.get(name, "") }}</td>{% endfor %}
<td>{{ record.status }}{{ ": " ~ record.reason if record.reason }}</td><td>{{ record.seconds }}</td>
<td>{% for file in record.files %}<a href="runs/{{ record.run }}/{{ file }}">{{ file }}</a> {% endfor %}</td></tr>
{% endfor %}
</table>
</html>
"""
