"""Every exercise of the notebooks fails its own check unfilled, and passes it with the folded solution."""

import re

import nbformat
import papermill
import pytest

from clipad.studies.exercises import NOT_YET, SOLVED
from clipad.tools.runner import notebook_paths

SOLUTION = re.compile(r"<summary>Solution.*?</summary>\s*```python\n(.*?)```", re.S)
NOTEBOOKS = [pytest.param(path, id=path.stem[:2]) for path in notebook_paths()]


def tagged(notebook, tag):
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def verdicts(notebook):
    """What the check cells say, in order."""
    texts = []
    for i in tagged(notebook, "check"):
        outputs = "".join(
            output.get("data", {}).get("text/markdown", "") for output in notebook.cells[i].outputs
        )
        texts.append(SOLVED if SOLVED in outputs else NOT_YET if NOT_YET in outputs else outputs)
    return texts


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_unfilled_exercises_fail_their_check(path):
    notebook = nbformat.read(path, as_version=4)
    exercises = tagged(notebook, "exercise")
    assert 2 <= len(exercises) <= 3
    assert len(tagged(notebook, "check")) == len(exercises)
    assert verdicts(notebook) == [NOT_YET] * len(exercises)


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_solutions_pass_their_check(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    exercises = tagged(notebook, "exercise")
    for i in exercises:
        text = next(c.source for c in reversed(notebook.cells[:i]) if c.cell_type == "markdown")
        (solution,) = SOLUTION.findall(text)
        notebook.cells[i].source = solution
    filled = tmp_path / path.name
    nbformat.write(notebook, filled)
    executed = papermill.execute_notebook(
        str(filled),
        str(tmp_path / "executed.ipynb"),
        {"output_dir": str(tmp_path / "out")},
        progress_bar=False,
    )
    assert verdicts(executed) == [SOLVED] * len(exercises)
