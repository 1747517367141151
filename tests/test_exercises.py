"""Every exercise of the notebooks is left open and quiet, and passes its check with the folded solution."""

import re

import nbformat
import papermill
import pytest

from clipad.studies import exercises
from clipad.studies.exercises import NOT_YET, SOLVED, check
from clipad.tools.notebooks import notebook_paths

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


def test_a_check_is_quiet_until_there_is_an_answer(monkeypatch):
    said = []
    monkeypatch.setattr(exercises, "display", lambda text: said.append(text.data))
    check(..., lambda: 1 / 0, "hint")
    assert said == []
    for answer, solved in ((1, True), (2, False), (None, False)):
        check(answer, lambda answer=answer: answer + 0 == 1, "hint")
        assert (SOLVED if solved else "hint") in said.pop()


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_exercises_are_left_open_and_quiet(path):
    notebook = nbformat.read(path, as_version=4)
    exercises = tagged(notebook, "exercise")
    assert len(exercises) >= 2
    assert len(tagged(notebook, "check")) == len(exercises)
    assert verdicts(notebook) == [""] * len(exercises)


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
        cwd=path.parent,
        progress_bar=False,
    )
    assert verdicts(executed) == [SOLVED] * len(exercises)
