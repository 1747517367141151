"""The runner on small notebooks: what papermill lets through is refused or noticed."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from small_notebooks import PARAMETERS, notebook

from clipad.studies.experiments import run_folder
from clipad.tools import notebooks, parameters, runner


@pytest.fixture
def make(tmp_path):
    def write(name, *cells, **options):
        path = tmp_path / "note books" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(notebook(*cells, **options), path)
        return path

    return write


def checked(path, values):
    return runner.plan([path], values)[0][1]


def run(path, parameters=None, **options):
    return runner.run_notebook(path, parameters, path.parent / "out", progress_bar=False, **options)


# --- names and parameters ---


def test_find_notebook(make):
    path = notebooks.find_notebook("03")
    assert path.stem == "03_dual_path_surgery"
    assert notebooks.find_notebook("03_dual_path_surgery.ipynb") == path
    assert notebooks.find_notebook(str(path)) == path
    assert notebooks.find_notebook(str(make("03_own"))).stem == "03_own"
    with pytest.raises(ValueError, match="did you mean '03_dual_path_surgery'"):
        notebooks.find_notebook("dual_path_surgery")
    with pytest.raises(ValueError, match=r"several notebooks start with '0'.*known: 00_"):
        notebooks.find_notebook("0")


def test_inspect_parameters(make):
    found = notebooks.inspect_parameters(make("00_a"))
    assert list(found)[:3] == ["preset", "count", "share"]
    assert found["preset"].limits == "demo|paper"
    assert (found["count"].type, found["count"].limits) == ("int", "1..16")
    assert (found["categories"].type, found["categories"].default) == ("list[str]", [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x: int = 2 * 3", "x: expected .* and a plain value"),
        ("x: Path = 'a'", "x: expected .* with a type of str, int"),
        ("x: int = 1\ny: int = (", "y: expected"),
    ],
)
def test_parameters_of_another_form_are_refused(make, line, message):
    with pytest.raises(ValueError, match=message):
        notebooks.inspect_parameters(make("00_a", parameters=line))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset_": "demo"}, "unknown parameter 'preset_' .did you mean 'preset'"),
        ({"preset": "papr"}, "preset cannot be 'papr' .did you mean 'paper'.*one of demo, paper"),
        ({"preset": 3}, "preset expects str, found int 3; in YAML: -y 'preset: \"03\"'"),
        ({"count": "many"}, "count expects int, found str 'many'"),
        ({"count": 1.5}, "count expects int, found float"),
        ({"count": True}, "count expects int, found bool"),
        ({"count": 17}, r"count must lie in 1\.\.16, found 17"),
        ({"share": float("nan")}, r"share must lie in 0\.\.1, found nan"),
        ({"share": None}, "share expects float, found NoneType"),
        ({"flag": 1}, "flag expects bool, found int"),
        ({"flag": ""}, "flag expects bool, found str"),
        ({"categories": "[screw,nut]"}, r"in YAML: -y 'categories: \[a, "),
        ({"categories": ["screw", 1]}, r"categories expects list\[str\]"),
        ({"options": "{eps: 1}"}, "in YAML: -y 'options: {key: value}'"),
        ({"categories": [1, 2]}, "categories expects .*in YAML"),
        ({"preset": "x" * 10**6}, "cannot be"),
        ({"categories": "x" * 10**6}, "categories expects"),
        ({"categories": [["y"] * 1000] * 1000}, "categories expects"),
    ],
)
def test_refused_before_a_kernel_starts(make, values, message):
    path = make("00_a")
    with pytest.raises(ValueError, match=message) as raised:
        run(path, values)
    assert len(str(raised.value)) < 1000
    assert not (path.parent / "out").exists()


def test_accepted_values(make):
    path = make("00_a")
    given = {
        "share": 1,
        "flag": True,
        "categories": ["screw"],
        "options": {"eps": 1.5},
        "count": 16,
    }
    assert checked(path, given) == given
    typed = {"share": "1e-3", "flag": "True", "count": "16", "pretrained": "03"}
    assert checked(path, typed) == {"share": 0.001, "flag": True, "count": 16, "pretrained": "03"}
    assert checked(path, {"count": "0"}) == {"count": 0}  # as -p gives
    empty = {"preset": 0, "count": "", "share": "", "categories": "", "options": 0, "data_root": ""}
    assert checked(path, empty) == {
        "preset": "",
        "count": 0,
        "share": 0.0,
        "categories": [],
        "options": {},
        "data_root": "",
    }


def test_choices_and_ranges_hold_for_numbers_and_within_lists(make):
    limits = "k: int = 1  # how many [1|2]\nkinds: list[str] = []  # which [a|b]\nsizes: list = []  # [1..3]"
    path = make("00_a", parameters=limits)
    given = {"k": 2, "kinds": ["a"], "sizes": [1, 3]}
    assert checked(path, given) == given
    for wrong in ({"k": 3}, {"kinds": ["c"]}, {"sizes": [2, 9]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            checked(path, wrong)


def test_every_text_counts():
    long = "categories: [" + ", ".join(["screw"] * 40) + "]"
    found = parameters.read_parameters([], ["seed: 1\n" + long, "seed: 1\nx: 2\n" + long], [])
    assert found["x"] == 2
    assert len(found["categories"]) == 40


def test_paths_count_from_where_the_command_is_typed(make, tmp_path, monkeypatch):
    path = make("00_a")
    monkeypatch.chdir(tmp_path)
    check = lambda **values: checked(path, values)  # noqa: E731
    assert check(data_root="data/x") == {"data_root": str(tmp_path / "data" / "x")}
    assert check(pretrained="laion400m_e31") == {"pretrained": "laion400m_e31"}
    Path("weights.pt").touch()
    assert check(pretrained="weights.pt") == {"pretrained": str(tmp_path / "weights.pt")}


def test_a_parameter_goes_to_the_notebooks_that_have_it(make):
    first = make("00_a", parameters="a: int = 1")
    second = make("01_b", parameters="a: int = 1\nb = 2")
    found = runner.plan([first, second], {"a": 3, "b": 4})
    assert found == [(first, {"a": 3}), (second, {"a": 3, "b": 4})]
    with pytest.raises(ValueError, match="all notebooks: unknown parameter 'c'; known: a, b"):
        runner.plan([first, second], {"c": 1})
    with pytest.raises(ValueError, match="b expects int"):
        runner.plan([first, second], {"b": "x"})


def test_own_data_under_the_name_of_the_demo_is_refused(make):
    path = make("00_a", parameters=PARAMETERS + '\ndataset: str = ""  # which')
    with pytest.raises(ValueError, match="did you mean dataset folder"):
        run(path, {"data_root": "somewhere"})
    assert not (path.parent / "out").exists()


def test_output_folder():
    assert run_folder().name == "demo-demo"
    assert run_folder(preset="paper").name == "paper-mvtec"
    assert run_folder(dataset="headct").name == "demo-headct"


# --- running ---


@pytest.mark.slow
def test_a_good_run(make, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = make(
        "00_good",
        "import os, sys\nprint(sys.executable == EXECUTABLE, os.path.basename(os.getcwd()))".replace(
            "EXECUTABLE", repr(sys.executable)
        ),
        "print(count, data_root, os.environ.get('MPLBACKEND'))",
    )
    before = path.read_bytes()
    done = run(path, {"count": 3, "data_root": str(path.parent)})
    assert (done.status, done.reason) == ("ok", "")
    assert path.read_bytes() == before
    cells = nbformat.read(done.output_path, as_version=4).cells
    assert cells[3].outputs[0].text == "True note books\n"
    # the user's own path may be printed; the backend that hides figures is gone
    assert cells[4].outputs[0].text.startswith(f"3 {path.parent} ")
    assert "agg" not in cells[4].outputs[0].text
    record = json.loads((done.output_path.parent / "runs.json").read_text())["00_good"]
    assert record["status"] == "ok"
    assert record["parameters"] == {"count": 3, "data_root": str(path.parent)}


@pytest.mark.slow
def test_an_exception_fails_and_the_copy_shows_it(make):
    done = run(make("00_bad", "print('before')", "# first\n1 / 0", "print('after')"))
    assert (done.status, done.reason) == (
        "failed",
        "code cell 3: ZeroDivisionError: division by zero",
    )
    assert "before" in done.output_path.read_text()
    assert (
        json.loads((done.output_path.parent / "runs.json").read_text())["00_bad"]["status"]
        == "failed"
    )


@pytest.mark.slow
def test_a_killed_kernel_fails(make):
    done = run(make("00_killed", "import os", "os.kill(os.getpid(), 9)", "print('after')"))
    assert done.status == "failed"
    assert "the kernel was killed" in done.reason


def put_kernel(folder, command):
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    specification = {"argv": command, "display_name": "x", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(specification))


DIES = [sys.executable, "-c", "raise SystemExit(3)"]


@pytest.mark.slow
def test_a_kernel_that_dies_at_its_start_fails_the_run(make, tmp_path, monkeypatch):
    put_kernel(tmp_path / "jupyter", DIES)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    done = run(make("00_a", "print(1)"))
    assert done.status == "failed"
    assert done.reason
    assert json.loads((done.output_path.parent / "runs.json").read_text())["00_a"]["reason"]


@pytest.mark.slow
def test_terminated_means_stopped(make, tmp_path):
    started = tmp_path / "started"
    note = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid()))"
    path = make("00_wait", note, "time.sleep(600)")
    out = path.parent / "out"
    command = [sys.executable, "-c", "from clipad.tools.cli import app; app()", "run", str(path)]
    process = subprocess.Popen([*command, "--output-dir", str(out)], stderr=subprocess.DEVNULL)
    while not (started.is_file() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait(60)
    assert json.loads((out / "runs.json").read_text())["00_wait"]["status"] == "stopped"
    with contextlib.suppress(psutil.NoSuchProcess):  # the kernel ends, too
        psutil.Process(int(started.read_text())).wait(60)


@pytest.mark.slow
def test_streams_are_whole_and_bars_end_in_their_last_state(make):
    bar = "for i in range(3):\n    print(f'\\r{i} of 3', end='', file=sys.stderr, flush=True)\n    time.sleep(.2)"
    text = "print('a', flush=True); time.sleep(.2); print('b'); display('between'); print('c')"
    cells = notebooks.read_notebook(
        run(make("00_a", "import sys, time", bar, text)).output_path
    ).cells
    assert [output.text for output in cells[-2].outputs] == ["2 of 3"]
    assert [output.get("text") for output in cells[-1].outputs] == ["a\nb\n", None, "c\n"]


@pytest.mark.slow
def test_system_exit_skips_with_its_reason(make):
    done = run(make("00_skip", "print('this data has no masks')\nraise SystemExit(0)", "1 / 0"))
    assert (done.status, done.reason) == ("skipped", "this data has no masks")


@pytest.mark.slow
def test_system_exit_with_a_text_is_a_failure(make):
    assert run(make("00_exit", "raise SystemExit('no')")).status == "failed"


@pytest.mark.slow
def test_an_exception_inside_a_widget_fails(make):
    lines = "import ipywidgets\ndef f(x): raise ValueError('hidden')\nprint('twin')\nipywidgets.interact(f, x=(0, 3));"
    done = run(make("00_widget", lines))
    assert (done.status, done.reason) == ("failed", "in a widget: ValueError: hidden")


@pytest.mark.slow
def test_stored_outputs_do_not_travel_in_the_metadata(tmp_path):
    """papermill keeps what it was given as input; a notebook with stored figures must not count twice."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source = new_notebook(metadata={"kernelspec": kernel})
    cell = new_code_cell("1 + 1", outputs=[new_output("stream", text="x" * 100_000)])
    source.cells = [new_code_cell("n: int = 1", metadata={"tags": ["parameters"]}), cell]
    path = tmp_path / "00_big.ipynb"
    nbformat.write(source, path)
    done = runner.run_notebook(path, output_dir=tmp_path / "out", progress_bar=False)
    assert done.output_path.stat().st_size < 20_000
