"""Sweeps: what a file stands for, and that nothing is lost or computed twice when processes die."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

import clipad
from clipad.datasets import load_dataset
from clipad.linear_layers import LinearLayers
from clipad.tools import sweep as sweeps

PARAMETERS = """seed: int = 0  # a number [0..99]
pause: float = 0.0  # seconds
log: str = ""  # a file
names: list[str] = []  # words
output_dir: str = ""  # path"""
# The parent of a kernel is the worker that runs it. Random numbers, so that a second execution would be seen.
WORK = """import json, os, signal, time
with open(log, "a") as file:
    file.write(f"{seed} {os.getppid()}\\n")
time.sleep(pause)
assert seed != 13, "unlucky"
if seed == 66:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
with open(os.path.join(output_dir, "00_work.json"), "w") as file:
    json.dump({"results": {"draw": {"a": int.from_bytes(os.urandom(4)), "b": [1]}, "none": None}}, file)"""


@pytest.fixture
def notebook(tmp_path):
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(WORK)]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    path = tmp_path / "00_work.ipynb"
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def plan(tmp_path):
    def make(*blocks):
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(blocks if len(blocks) != 1 else blocks[0]))
        return sweeps.plan(path)

    return make


# --- plan ---


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture\.yaml is no YAML"):
        sweeps.plan(tmp_path / "picture.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "ViT-B-99", "pretrained": "random"}, "unknown model 'ViT-B-99'"),
        ({"model": "RN50", "pretrained": "openai"}, "not a plain CLIP"),
        ({"model": "ViT-B-32", "pretrained": "nowhere"}, "neither a file nor a tag"),
        ({"image_size": 97}, "no multiple of the model's patches"),
    ],
)
def test_models_that_do_not_exist_are_refused_before_a_run(plan, values, said):
    with pytest.raises(ValueError, match=said):
        plan({"evaluate": {"categories": "gear"} | values})


def test_lists_are_axes(plan, notebook):
    block = {"notebook": str(notebook), "parameters": {"seed": [1, 2], "names": ["a", ["b", "c"]]}}
    points = [(run["parameters"]["seed"], run["parameters"]["names"]) for run in plan(block)]
    assert points == [(1, ["a"]), (1, ["b", "c"]), (2, ["a"]), (2, ["b", "c"])]
    both = plan(block, {"notebook": str(notebook), "parameters": {"seed": [2, 3], "names": "a"}})
    assert len(both) == 5  # seed 2 with ["a"] is in both blocks


def test_what_decides_the_result_decides_the_address(plan, tmp_path, notebook):
    def address(**values):
        return plan({"evaluate": {"categories": "gear"} | values})[0]["run"]

    (tmp_path / "own.yaml").write_text("normal: ['sound {}']")
    prompts = str(tmp_path / "own.yaml")
    found = [address(), address(rvs="kde"), address(detectors="direct"), address(prompts=prompts)]
    (tmp_path / "own.yaml").write_text("normal: ['whole {}']")
    found.append(address(prompts=prompts))
    random = {"model": "ViT-S-32-alt", "pretrained": "random"}
    found += [address(**random), address(**random, seed=1)]
    assert len(set(found)) == len(found)
    before = plan({"notebook": str(notebook)})[0]["run"]
    notebook.write_text(notebook.read_text().replace("unlucky", "lucky"))
    assert plan({"notebook": str(notebook)})[0]["run"] != before


def test_what_sdp_plus_is_trained_with_decides_the_address_too(plan, tmp_path):
    def address(**values):
        return plan({"notebook": "05", "parameters": values})[0]["run"]

    checkpoint, root = tmp_path / "layers.pt", tmp_path / "demo_aux"
    with pytest.raises(FileNotFoundError, match="layers"):
        address(layers=str(checkpoint))
    with pytest.raises(FileNotFoundError, match="demo_aux"):
        address(train_root=str(root))
    found = [address()]
    for seed in range(2):
        torch.save({"linear_layers": LinearLayers(96, 128, 4, seed).state_dict()}, checkpoint)
        found.append(address(layers=str(checkpoint)))
    shutil.copytree(load_dataset("demo_aux").root, root)
    found.append(address(train_root=str(root)))
    next(root.rglob("test/good/*.png")).unlink()
    found.append(address(train_root=str(root)))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "a block is"),
        ("x", "a block is"),
        ({"evaluat": {}}, "a block is.*found {'evaluat'"),
        ({"evaluate": {}, "parameters": {}}, "a block is"),
        ({"evaluate": "sdp"}, "a block is"),
        ({"evaluate": {"detector": "sdp"}}, "did you mean 'detectors'"),
        ({"evaluate": {"detectors": "sdq"}}, "did you mean 'sdp'"),
        ({"evaluate": {"seed": "x"}}, "seed expects int"),
        ({"evaluate": {"seed": -1}}, "must lie in 0"),
        ({"evaluate": {"rvs": "kdee"}}, "did you mean 'kde'"),
        ({"evaluate": {"categories": "gears"}}, "unknown category 'gears'"),
        ({"evaluate": {"dataset": "demoo"}}, "'demo"),
        ({"evaluate": {"model": "ViT-S-32-alt"}}, "needs pretrained"),
        ({"evaluate": {"pretrained": "random"}}, "needs pretrained"),
        ({"notebook": "99"}, "no notebook starts with"),
        ({"notebook": "00_work", "parameters": {"sead": 1}}, "did you mean 'seed'"),
        ({"notebook": "00_work", "parameters": {"seed": [1, 100]}}, "must lie in 0..99"),
        (
            {"notebook": "00_work", "parameters": {"output_dir": "x"}},
            "unknown parameter 'output_dir'",
        ),
    ],
)
def test_wrong_files_are_refused(plan, notebook, block, message):
    if isinstance(block, dict) and block.get("notebook") == "00_work":
        block = block | {"notebook": str(notebook)}
    with pytest.raises(ValueError, match=message):
        plan(block)


# --- devices ---


@pytest.mark.parametrize(
    ("kind", "count", "asked", "gpus"),
    [
        (None, 0, "", []),
        ("cuda", 4, "cpu", []),
        ("cuda", 2, "", ["cuda:0", "cuda:1"]),
        ("cuda", 1, "cuda", ["cuda:0"]),
        ("xpu", 2, "xpu:1", ["xpu:0", "xpu:1"]),
        ("mps", 1, "mps", ["mps:0"]),
    ],
)
def test_gpus_that_a_sweep_may_use(monkeypatch, kind, count, asked, gpus):
    device = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert sweeps.gpus_for([{"parameters": {"device": asked}}, {"parameters": {}}]) == gpus
    with pytest.raises(ValueError, match="torch sees"):
        sweeps.gpus_for([{"parameters": {"device": "cuda:7"}}])


@pytest.mark.slow
def test_each_worker_has_a_gpu_of_its_own():
    gpus, given = ["cuda:0", "cuda:1"], ["", "cuda", "cpu", "cuda:5"]
    with sweeps.local_cluster(2) as client:
        found = [
            [client.submit(sweeps.placed, d, gpus, workers=[i], pure=False).result() for d in given]
            for i in range(2)
        ]
    assert found == [["cuda:0", "cuda:0", "cpu", "cuda:5"], ["cuda:1", "cuda:1", "cpu", "cuda:5"]]


# --- one run ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "rvs"),
    [
        ({"rvs": "mean"}, "mean"),
        ({"rvs": "dbscan"}, "dbscan"),  # with the published options
        ({}, "dbscan"),
    ],
)
def test_an_evaluation_is_what_evaluate_says(plan, tmp_path, values, rvs):
    run = plan({"evaluate": {"detectors": "direct", "categories": "gear"} | values})[0]
    (tmp_path / "runs").mkdir()
    sweeps.run_one(run, str(tmp_path), [])
    record = sweeps.read_record(run, tmp_path)
    assert (record["status"], record["reason"]) == ("ok", "")
    backbone, data = clipad.load_backbone("demo"), clipad.load_dataset("demo", categories=["gear"])
    options = clipad.protocol("demo").rvs_options if rvs == "dbscan" else {}
    detector = clipad.Direct(backbone, rvs=rvs, rvs_options=options)
    expected = clipad.evaluate(detector, data, progress=False).table.loc["gear"]
    assert {result["metric"]: result["value"] for result in record["results"]} == expected.to_dict()


def test_other_code_on_a_worker_is_noticed(plan, tmp_path):
    run = plan({"evaluate": {"categories": "gear"}})[0]
    (tmp_path / "runs").mkdir()
    other = run | {"inputs": run["inputs"] | {"code": "0"}}
    with pytest.raises(ValueError, match="another version"):
        sweeps.run_one(other, str(tmp_path), [])
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        sweeps.run_one(run, str(tmp_path / "elsewhere"), [])


@pytest.mark.slow
def test_a_complete_run_stays(plan, notebook, tmp_path):
    run = plan({"notebook": str(notebook), "parameters": {"log": str(tmp_path / "log")}})[0]
    (tmp_path / "runs").mkdir()
    for _ in range(2):
        sweeps.run_one(run, str(tmp_path), [])
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_runs_of_different_kinds_share_one_table(tmp_path):
    common = {"notebook": "", "inputs": {}, "seconds": 1.0}
    number = {"category": "nut", "metric": "image_auroc", "value": 0.5}
    first = {"run": "a", "name": "evaluate", "status": "ok", "reason": "", "results": [number]}
    second = {"run": "b", "name": "00_work", "status": "failed", "reason": "x, <b>", "results": []}
    first["parameters"] = {"categories": ["nut"], "seed": 0, "share": 1, "other": 1}
    second["parameters"] = {"seed": 1, "share": 0.5, "more": "text"}
    sweeps.write_table([first | common, second | common], tmp_path / "table.csv")
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["value"].isna().tolist() == [False, True]
    assert table["seed"].tolist() == [0, 1]
    assert table["reason"].tolist()[1] == "x, <b>"


# --- the whole, with processes that die ---


class Sweep:
    """`clipad sweep` in a process group of its own, with two workers."""

    def __init__(self, folder, notebook, seeds, pause):
        self.out, self.log = folder / "out", folder / "log"
        parameters = {"seed": seeds, "pause": pause, "log": str(self.log)}
        self.file = folder / "sweep.yaml"
        self.file.write_text(json.dumps({"notebook": str(notebook), "parameters": parameters}))

    def start(self):
        command = [
            sys.executable,
            "-c",
            "from clipad.tools.cli import app; app()",
            "sweep",
            str(self.file),
        ]
        environment = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
        self.process = subprocess.Popen(
            [*command, "--workers", "2", "--output-dir", str(self.out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            # A shell starts its background jobs with SIGINT ignored, and the tests may run in one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def end(self):
        """Exit code, and what was printed."""
        stdout, stderr = self.process.communicate(timeout=300)
        return self.process.returncode, stdout + stderr

    def started(self):
        """(seed, worker) of each execution that began."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [tuple(map(int, line.split())) for line in lines]

    def finished(self):
        """Records of runs that ended well, by their address."""
        return {path.parent.name: path.read_bytes() for path in self.out.glob("runs/*/run.json")}

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.end()
            time.sleep(0.05)


@pytest.mark.slow
def test_workers_that_die_and_runs_that_fail(tmp_path, notebook):
    sweep = Sweep(tmp_path, notebook, [1, 13, 66, 2, 3], pause=2)
    sweep.start()
    sweep.wait_for(lambda: 1 in dict(sweep.started()))
    os.kill(dict(sweep.started())[1], signal.SIGKILL)  # in the middle of the run with seed 1
    code, said = sweep.end()
    assert code == 1, said
    assert "5 runs, 2 failed" in said
    assert "AssertionError: unlucky" in said
    assert "workers died" in said

    times = collections.Counter(seed for seed, _ in sweep.started())
    # a failure lies in the memory of its worker: if that one dies, too, it is computed again
    assert times.pop(13) >= 1
    assert times == {1: 2, 66: 2, 2: 1, 3: 1}
    table = pd.read_csv(sweep.out / "table.csv")
    assert dict(zip(table["seed"], table["status"], strict=True)) == dict.fromkeys(
        [1, 2, 3], "ok"
    ) | {
        13: "failed",
        66: "failed",
    }
    assert table["value"].notna().tolist() == [True, False, False, True, True]
    assert table["metric"].dropna().unique().tolist() == ["draw.a"]
    assert all((sweep.out / "runs" / run / "00_work.ipynb").is_file() for run in table["run"])

    # without the failed ones there is nothing left to do, and nothing changes
    before, count = sweep.finished(), len(sweep.started())
    sweep.file.write_text(sweep.file.read_text().replace("13, 66, ", ""))
    tables = []
    for _ in range(2):
        sweep.start()
        assert sweep.end()[0] == 0
        tables.append((sweep.out / "table.csv").read_bytes())
    assert sweep.finished() == before
    assert len(sweep.started()) == count
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_stopped_and_a_killed_sweep_continue(tmp_path, notebook):
    sweep = Sweep(tmp_path, notebook, [1, 2, 3, 4, 5, 6], pause=0.5)
    kept = {}
    for stop, least in ((signal.SIGINT, 1), (signal.SIGKILL, 3)):
        sweep.start()
        sweep.wait_for(lambda least=least: len(sweep.finished()) >= least)
        if stop == signal.SIGINT:
            os.killpg(sweep.process.pid, stop)  # as a terminal does it
            code, said = sweep.end()
            assert code == 130
            assert "the same command continues" in said
            assert "Traceback" not in said
            assert "WARNING" not in said
            assert len(pd.read_csv(sweep.out / "table.csv")) >= 1
        else:
            sweep.process.kill()
            assert sweep.end()[0] == -signal.SIGKILL
        assert kept.items() <= sweep.finished().items()
        kept = sweep.finished()
    done = [json.loads(text)["parameters"]["seed"] for text in kept.values()]
    count = collections.Counter(seed for seed, _ in sweep.started())

    sweep.start()
    code, said = sweep.end()
    assert code == 0, said
    assert kept.items() <= sweep.finished().items()
    table = pd.read_csv(sweep.out / "table.csv")
    assert table["seed"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["value"].notna().all()
    after = collections.Counter(seed for seed, _ in sweep.started())
    assert all(after[seed] == count[seed] for seed in done)


@pytest.mark.slow
def test_what_a_lost_cluster_did_not_do_is_no_failure(plan, notebook, tmp_path):
    log, address = tmp_path / "log", tmp_path / "scheduler.json"
    runs = plan({"notebook": str(notebook), "parameters": {"pause": 600.0, "log": str(log)}})
    dask = [sys.executable, "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = [*dask, "scheduler", *local, "--port", "0", "--scheduler-file", str(address)]
    worker = [*dask, "worker", "--scheduler-file", str(address), "--nthreads", "1", "--no-nanny"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    processes = {name: subprocess.Popen(command, **quiet, start_new_session=True)
                 for name, command in (("scheduler", scheduler), ("worker", worker))}  # fmt: skip

    def kill():
        while not log.exists():
            time.sleep(0.1)
        processes["scheduler"].kill()

    try:
        while not address.exists():
            time.sleep(0.1)
        threading.Thread(target=kill, daemon=True).start()
        at = json.loads(address.read_text())["address"]
        with pytest.raises(OSError, match="scheduler is gone"):
            sweeps.sweep(runs, tmp_path / "out", scheduler=at)
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (tmp_path / "out" / "table.csv").exists()


@pytest.mark.parametrize(
    "text", ["evaluate: {rvs: []}", 'notebook: "00"\nparameters: [1]', "evaluate:"]
)
def test_a_grid_without_runs_is_refused(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"no values|a block is"):
        sweeps.plan(tmp_path / "sweep.yaml")
