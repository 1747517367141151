"""Every stored notebook: outputs made by its present sources, sound and in the agreed shape."""

import re

import pytest

from clipad import runner

NOTEBOOKS = runner.notebook_paths()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@each
def test_outputs_come_from_the_present_sources(path):
    assert runner.stored_in_step(path), f"run `clipad notebooks store {path.stem[:2]}`"


@each
def test_outputs_are_sound(path):
    assert runner.gate(runner.read_notebook(path)) == []


@each
def test_shape(path):
    assert runner.style(runner.read_notebook(path)) == []


@each
def test_parameters_are_seen_and_told(path):
    parameters = runner.inspect_parameters(path)
    assert all(parameter.help for parameter in parameters.values())
    assert parameters["preset"].choices == tuple(runner.PRESET_DATASETS)
    for name in {"data_root", "output_dir", "prompts", "pretrained", "layers"} & set(parameters):
        assert "path" in parameters[name].help, (
            f"{name}: without the word path, ./x would not count from the shell"
        )


@each
def test_no_tricks_with_the_import_path(path):
    node = runner.read_notebook(path)
    code = "\n".join(cell.source for cell in node.cells if cell.cell_type == "code")
    assert not re.search(r"sys\.path|tqdm\.(auto|notebook)|^\s*[!%]\s*pip", code, re.MULTILINE)
