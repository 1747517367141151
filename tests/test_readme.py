"""The README's numbers are those of the stored notebooks, and its links lead somewhere."""

import re
from pathlib import Path

import nbformat
import pytest

from clipad.studies.experiments import RESULT_MIME

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLUMNS = ["image_auroc", "pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_pro"]


def recorded(stem):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    outputs = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    return [data[RESULT_MIME] for data in outputs if RESULT_MIME in data][-1]["results"]


def test_the_table_is_that_of_notebook_05():
    means = recorded("05_benchmark")["means"]
    rows = re.search(r"<!-- means -->\n(.*?)<!-- end -->", README, re.S)[1].strip().splitlines()[2:]
    shown = {row.split("|")[1].strip(): [float(x) for x in row.split("|")[2:-1]] for row in rows}
    assert set(shown) == {"Direct", "CLIP Surgery", "WinCLIP", "SDP", "SDP+"}
    for name, values in shown.items():
        assert values == pytest.approx([100 * means[name][column] for column in COLUMNS], abs=0.051)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()
