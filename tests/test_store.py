"""What may be stored in the repository as a notebook's output, and in what shape."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_output
from small_notebooks import notebook

from clipad.studies import experiments
from clipad.tools import runner
from clipad.tools.notebooks import merge_streams, read_notebook, source_hash
from docs import store
from docs.store import write_notebook

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def executed(*outputs, tags=()):
    """The same as if executed, with these outputs in its last cell."""
    node = notebook("work()")
    node.cells[1].execution_count, node.cells[2].execution_count = 1, 2
    node.cells[2].metadata.tags = list(tags)
    node.cells[2].outputs = list(outputs)
    return node


@pytest.fixture
def make(tmp_path):
    def write(name, *cells):
        path = tmp_path / f"{name}.ipynb"
        write_notebook(notebook(*cells), path)
        return path

    return write


def run(path, parameters=None):
    return runner.run_notebook(path, parameters, path.parent / "out", progress_bar=False)


# --- what a reader should not meet ---


def figure(alt=None):
    metadata = {"image/png": {"alt": alt}} if alt is not None else {}
    return new_output(
        "display_data", data={"image/png": PNG, "text/plain": "<Figure>"}, metadata=metadata
    )


def text(content, name="stdout"):
    return new_output("stream", name=name, text=content)


def html(content):
    return new_output("display_data", data={"text/html": content, "text/plain": ""})


CLEAN = [
    figure("Bar chart of three scores"),
    text("see https://example.org/home/page and a ratio 1/2, /3"),
    text(" 50%|#####     | 1/2 [00:01<00:01,  1.00s/it]", "stderr"),
    html('<table></table><img src="data:image/png;base64,/tmp/x" alt="A map">'),
]
UNCLEAN = [
    (figure(), "without alt text"),
    (figure(" "), "without alt text"),
    (figure("<Figure size 640x480 with 1 Axes>"), "without alt text"),
    (html('<img src="a.png">'), "without alt text"),
    (html('<img src="a.png" alt="">'), "without alt text"),
    (
        text("reading /home/somebody/data.csv"),
        "absolute path of this machine: /home/somebody/data.csv",
    ),
    (text(f"reading {Path.cwd() / 'x.csv'}"), "absolute path"),
    (text("in lib/python3.11/site-packages/torch"), "absolute path"),
    (figure(f"From {store.REPOSITORY}/data"), "absolute path"),
    (text("x.py:1: FutureWarning: soon\n", "stderr"), "a warning: x.py:1: FutureWarning: soon"),
    (new_output("error", ename="ValueError", evalue="bad", traceback=[]), "ValueError: bad"),
]


@pytest.mark.parametrize("output", CLEAN)
def test_accepted(output):
    assert store.problems(executed(output)) == []


@pytest.mark.parametrize(("output", "problem"), UNCLEAN)
def test_refused(output, problem):
    problems = store.problems(executed(output))
    assert len(problems) == 1
    assert problem in problems[0]
    # the same inside an Output widget, where papermill does not look
    node = executed(text("static"))
    state = {"outputs": [output]}
    node.metadata.widgets = {store.WIDGET_STATE: {"state": {"0" * 32: {"state": state}}}}
    problems = store.problems(nbformat.from_dict(node))
    assert len(problems) == 1
    assert problem in problems[0]


def test_warnings_that_a_cell_is_about_are_allowed():
    warning = "/home/somebody/clipad/text.py:10: UserWarning: constant scores\n  warn()\n"
    assert store.problems(executed(text(warning, "stderr"), tags=["warns"])) == []
    assert len(store.problems(executed(text(warning, "stderr")))) == 1


@pytest.mark.parametrize("unit", ["x", "/", "a:1", "9", "<img ", "Warning", "A/b+", "\\Users\\"])
def test_the_search_takes_linear_time(unit):
    """2 MB without a blank or a new line; a search that is quadratic in its length would take hours."""
    long = unit * (2_000_000 // len(unit))
    picture = html(f'<img alt="a" src="data:image/png;base64,{long}">')
    for output in (text(long), text(long, "stderr"), html(long), picture):
        node = merge_streams(executed(output))
        assert isinstance(store.problems(node), list)


def test_cells_are_executed_by_the_python_kernel():
    node = executed()
    node.metadata.kernelspec.name = "conda-env-x"
    problems = store.problems(node)
    assert problems == ["the kernel is 'conda-env-x', expected 'python3'"]


def test_something_static_stands_beside_controls():
    view = {store.WIDGET_VIEW: {"model_id": "0" * 32}, "text/plain": "IntSlider(value=0)"}
    controls = new_output("display_data", data=view)
    assert "controls without" in store.problems(executed(controls))[0]
    assert store.problems(executed(figure("A map"), controls)) == []


# --- stored outputs ---


@pytest.mark.slow
def test_what_differs_between_any_two_runs_is_not_stored(make):
    shown = "class Shown:\n    def __repr__(self): return f'<Shown at {hex(id(self))}>'\nShown()"
    path = make("00_a", shown, "import warnings; warnings.warn('constant scores')")
    node = read_notebook(path)
    node.cells[3].metadata.tags = ["warns"]
    write_notebook(node, path)
    done = run(path)
    assert done.status == "ok", done.reason
    store.store(path, done.output_path)
    shown, warning = (cell.outputs[0] for cell in read_notebook(path).cells[2:])
    assert shown.data["text/plain"] == "<Shown>"
    assert "/" not in warning.text.split("UserWarning")[0]


@pytest.mark.slow
def test_stored_outputs_follow_the_sources(make):
    path = make("00_a", "print('hello')\n3", "import sys; print(' 50%|##  | 1/2', file=sys.stderr)")
    done = run(path)
    assert not store.is_in_step(path)
    store.store(path, done.output_path)
    assert store.is_in_step(path)
    once = path.read_bytes()
    assert once.endswith(b"}\n")
    node = read_notebook(path)
    assert [cell.execution_count for cell in node.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert node.cells[2].outputs[0].text == "hello\n"
    assert node.cells[3].outputs == []  # a progress bar differs between any two runs
    assert "papermill" not in once.decode()
    assert store.problems(node) == []

    again = run(path)  # another kernel, other times
    store.store(path, again.output_path)
    assert path.read_bytes() == once

    node.cells[2].source += "\n# changed"
    write_notebook(node, path)
    assert not store.is_in_step(path)
    with pytest.raises(ValueError, match="changed since"):
        store.store(path, again.output_path)


@pytest.mark.slow
def test_outputs_that_are_too_large_are_not_stored(make):
    path = make("00_a", "print('x' * 1_700_000)")
    before, done = path.read_bytes(), run(path)
    assert done.status == "ok"
    with pytest.raises(ValueError, match=r"has 1\.7 MB, the limit is 1\.5 MB"):
        store.store(path, done.output_path)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_only_default_parameters_are_stored(make):
    path = make("00_a", "print(count)")
    done = run(path, {"count": 3})
    with pytest.raises(ValueError, match="default parameters"):
        store.store(path, done.output_path)
    assert source_hash(read_notebook(done.output_path)) == source_hash(read_notebook(path))


@pytest.mark.slow
def test_of_widgets_stays_what_works_without_a_kernel(make):
    path = make("00_w", "import ipywidgets as w\nprint('twin')\nw.VBox([w.IntSlider()])")
    kept = []
    for _ in range(2):
        store.store(path, run(path).output_path)
        kept.append(path.read_bytes())
    assert kept[0] == kept[1]
    node = read_notebook(path)
    assert "widgets" not in node.metadata
    _, shown = node.cells[2].outputs
    assert list(shown.data) == ["text/plain"]


@pytest.mark.slow
def test_a_notebook_that_fails_keeps_its_last_outputs(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "REPOSITORY", tmp_path)
    good, bad = make("00_good", "print(1)"), make("01_bad", "print('/home/somebody')")
    before = bad.read_bytes()
    assert store.main([str(good), str(bad)]) == 1
    assert store.is_in_step(good)
    assert bad.read_bytes() == before
    assert (
        "00_good: stored\n01_bad: 01_bad.ipynb: code cell 2: an absolute path"
        in capsys.readouterr().out
    )


def test_a_name_that_no_notebook_has_does_not_end_the_others(capsys):
    assert store.main(["99"]) == 1
    assert "99: no notebook starts with '99'" in capsys.readouterr().out
