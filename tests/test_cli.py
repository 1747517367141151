"""The command line: exit codes, one-line errors, help that comes at once."""

import json
import subprocess
import sys
from importlib.metadata import version

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook

from clipad.studies import experiments
from clipad.tools import doctor, notebooks
from clipad.tools.cli import app
from clipad.tools.parameters import read_parameters


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks; the second one fails when told to."""
    for module in (notebooks, experiments):
        monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    for name, lines, code in (
        ("00_first", "n: int = 1  # a number [1..9]", "print(n)"),
        ("01_second", "n: int = 1  # a number\nfail: bool = False  # or not", "assert not fail"),
    ):
        cells = [new_code_cell(lines, metadata={"tags": ["parameters"]}), new_code_cell(code)]
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        nbformat.write(
            new_notebook(cells=cells, metadata=metadata), tmp_path / "notebooks" / f"{name}.ipynb"
        )
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_needs_no_heavy_import():
    code = (
        "import sys, clipad.tools.cli\n"
        "try: clipad.tools.cli.app(['--help'])\n"
        "finally: print(sorted({'torch', 'papermill', 'pandas', 'nbformat'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "clipad run --all" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_version():
    assert invoke("--version").output == f"clipad {version('clipad')}\n"


@pytest.mark.parametrize("command", [["run"], ["params"], ["doctor"], ["data", "check"]])
def test_every_command_has_help(command):
    done = invoke(*command, "--help")
    assert done.exit_code == 0
    assert len(done.output) > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name one notebook"),
        (["run", "00", "--all"], "name one notebook"),
        (["run", "07"], "no notebook starts with '07'"),
        (["run", "00", "-p", "m", "1"], "00_first: unknown parameter 'm'"),
        (["run", "00", "-p", "n", "12"], "n must lie in 1..9, found 12"),
        (["run", "00", "-p", "n", "-1"], "n must lie in 1..9, found -1"),
        (["run", "00", "-p", "n", "x"], "n expects int, found str 'x'"),
        (["run", "00", "--preset", "paper"], "unknown parameter 'preset'"),
        (["run", "00", "-y", "n: [1"], "is no YAML"),
        (["run", "00", "-y", "n"], "holds 'n', expected `name: value`"),
        (["run", "--all", "-p", "m", "1"], "all notebooks: unknown parameter 'm'"),
        (["params", "07"], "no notebook starts with '07'"),
    ],
)
def test_wrong_usage_is_told_in_one_line(project, arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / "outputs").exists()


def test_missing_parameter_file_is_told(project):
    done = invoke("run", "00", "-f", "nowhere.yaml")
    assert done.exit_code == 2
    assert "nowhere.yaml" in done.stderr


@pytest.mark.slow
def test_run(project):
    done = invoke("run", "00", "-p", "n", 5)
    assert done.exit_code == 0
    assert "00_first: ok" in done.stdout
    assert "5" in (project / "outputs" / "demo-demo" / "00_first.ipynb").read_text()


@pytest.mark.slow
def test_run_all_goes_on_after_a_failure(project):
    project.joinpath("notebooks", "01_second.ipynb").rename(project / "notebooks" / "000_x.ipynb")
    project.joinpath("notebooks", "000_x.ipynb").rename(
        project / "notebooks" / "00_a.ipynb"
    )  # now the first
    done = invoke("run", "--all", "-p", "fail", "True", "--output-dir", project / "there")
    assert done.exit_code == 1
    assert "AssertionError" in done.stderr
    assert "2 notebooks, failed: 00_a" in done.stdout
    record = json.loads((project / "there" / "runs.json").read_text())
    assert {name: run["status"] for name, run in record.items()} == {
        "00_a": "failed",
        "00_first": "ok",
    }


def test_params(project):
    lines = invoke("params", "01").output.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["n", "int", "1"],
        ["fail", "bool", "false"],
    ]


def test_later_kinds_of_parameters_win(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: 1\nc: 1")
    found = read_parameters([("c", "3")], ["{b: 2, c: 2}"], [tmp_path / "a.yaml"])
    assert found == {"a": 1, "b": 2, "c": "3"}


def test_data_check(tmp_path):
    assert invoke("data", "check", "mvtec", "--root", tmp_path / "nowhere").exit_code == 2
    done = invoke("data", "check", "mvtek", "--root", tmp_path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "mvtec" in done.stderr


@pytest.mark.slow
def test_doctor_says_faults_with_their_fix(monkeypatch, tmp_path, capfd):
    assert list(doctor.diagnose()) == []
    done = invoke("doctor")
    assert done.exit_code == 0
    assert "PyTorch version" in capfd.readouterr().out
    monkeypatch.setenv("CLIPAD_DATA", str(tmp_path))  # no model, no images
    faults = list(doctor.diagnose())
    assert len(faults) == 1
    assert "restore data/demo" in faults[0][1]
    done = invoke("doctor")
    assert done.exit_code == 1
    assert done.output.count("fix:") == 1


def test_doctor_speaks_where_torch_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # its import fails
    faults = list(doctor.diagnose())
    assert any("torchvision" in fault and "install" in fix for fault, fix in faults)
