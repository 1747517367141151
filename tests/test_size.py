"""The package stays one that can be read. Whoever meets this test with something new: what does it make unnecessary?"""

import ast
from pathlib import Path

CLIPAD = Path(__file__).resolve().parents[1] / "clipad"
WHY = "clipad is read by people who want to know how the paper goes: remove, join, or move it where it is used"


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_method_and_what_it_runs_on():
    assert lines(CLIPAD.glob("*.py")) <= 2600, WHY


def test_package():
    assert lines(CLIPAD.rglob("*.py")) <= 8000, WHY


def test_files():
    assert not {path.name for path in CLIPAD.rglob("*.py") if lines([path]) > 500}, WHY


def test_functions():
    long = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in CLIPAD.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long, WHY
