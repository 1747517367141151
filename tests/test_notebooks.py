"""Every stored notebook: outputs made by its present sources, sound and in the agreed shape."""

import inspect
import json
import re

import pytest

import clipad
from clipad.studies.experiments import PRESETS
from clipad.tools import notebooks, runner
from docs import store

NOTEBOOKS = notebooks.notebook_paths()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@each
def test_outputs_come_from_the_present_sources(path):
    assert store.is_in_step(path), f"run `python docs/store.py {path.stem[:2]}`"


@each
def test_outputs_are_sound(path):
    assert store.problems(notebooks.read_notebook(path)) == []


@each
def test_code_can_be_read_at_a_glance(path):
    """Lines of at most 100 characters, cells of at most 25 (besides the parameters, which are a list)."""
    for cell in notebooks.code_cells(notebooks.read_notebook(path)):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert max(map(len, lines), default=0) <= 100, cell.source
        assert len(lines) <= 25 or "parameters" in cell.metadata.get("tags", []), cell.source


@each
def test_a_page_stays_small(path):
    assert path.stat().st_size < store.LARGEST


@each
def test_parameters_are_seen_and_told(path):
    parameters = notebooks.inspect_parameters(path)
    assert all(parameter.help for parameter in parameters.values())
    assert parameters["preset"].limits == "|".join(PRESETS)
    for name in {"data_root", "output_dir", "prompts", "pretrained", "layers"} & set(parameters):
        assert "path" in parameters[name].help, (
            f"{name}: without the word path, ./x would not count from the shell"
        )


@each
def test_what_experiment_takes_is_passed_on(path):
    code = "\n".join(
        cell.source for cell in notebooks.read_notebook(path).cells if cell.cell_type == "code"
    )
    passed = re.search(r"clipad\.experiment\((.*?)\)\nrun", code, re.DOTALL)[1]
    parameters = set(inspect.signature(clipad.experiment).parameters) & set(
        notebooks.inspect_parameters(path)
    )
    assert "image_size" in parameters
    assert [name for name in parameters - {"preset"} if f"{name}={name}" not in passed] == []


@each
def test_no_tricks_with_the_import_path(path):
    node = notebooks.read_notebook(path)
    code = "\n".join(cell.source for cell in node.cells if cell.cell_type == "code")
    assert not re.search(r"sys\.path|tqdm\.(auto|notebook)|^\s*[!%]\s*pip", code, re.MULTILINE)


@pytest.mark.notebook
@each
def test_two_runs_record_equal_numbers(path, tmp_path, monkeypatch):
    """Two runs in folders of their own, so that nothing is read back, differ in times and memory only."""
    small = {"categories": ["screw", "leather"], "draws": 20, "resamples": 20, "epochs": 1}
    small = {
        name: value for name, value in small.items() if name in notebooks.inspect_parameters(path)
    }
    records = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        monkeypatch.setenv("CLIPAD_CACHE", str(folder / "cache"))
        run = runner.run_notebook(path, small | {"output_dir": str(folder)}, progress_bar=False)
        assert run.status == "ok", run.reason
        record = json.loads((folder / f"{path.stem}.json").read_text(encoding="utf-8"))
        records.append(
            {k: v for k, v in record["results"].items() if k not in ("latency", "costs")}
        )
    assert records[0] == records[1] != {}
