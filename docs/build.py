"""Builds the book: ``python docs/build.py [FOLDER OF EXECUTED NOTEBOOKS] [OUTPUT]``, see ``make book``.

The pages lie as the repository does, so that links between notebooks, METHOD.md and the data card hold.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

ROOT = Path(__file__).resolve().parents[1]


def build(source: Path, output: Path) -> int:
    """Exit code; ``source`` holds executed notebooks, and what ``clipad run --all`` wrote beside them."""
    notebooks = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise SystemExit(f"{source} holds no notebooks: run `make reproduce`, or name a folder")
    if output.exists() and any(output.iterdir()) and not (output / "objects.inv").is_file():
        raise SystemExit(f"{output} holds something else than a book: choose another folder")
    beside = [source / name for name in ("runs.json", "claims.csv")]
    shipped = [path for kind in ("*.png", "*.yaml") for path in (ROOT / "notebooks").glob(kind)]
    with tempfile.TemporaryDirectory() as temporary:
        pages = Path(temporary) / "pages"
        shutil.copytree(ROOT / "docs", pages)
        for name in ("clipad/METHOD.md", "data/README.md"):
            (pages / name).parent.mkdir()
            shutil.copy(ROOT / name, pages / name)
        (pages / "notebooks").mkdir()
        for path in [*shipped, *notebooks, *filter(Path.is_file, beside)]:
            shutil.copy(path, pages / "notebooks")
        shutil.rmtree(output, ignore_errors=True)  # pages of former notebooks
        cache = str(Path(temporary) / "cache")
        return sphinx_build(["-q", "-b", "html", "-d", cache, str(pages), str(output)])


if __name__ == "__main__":
    executed = ROOT / "outputs" / "demo-demo"
    default = executed if (executed / "runs.json").is_file() else ROOT / "notebooks"
    source, output = [*sys.argv[1:], *(default, ROOT / "book")[len(sys.argv) - 1 :]]
    code = build(Path(source), Path(output))
    print(Path(output) / "index.html")
    sys.exit(code)
