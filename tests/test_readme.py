"""The README's numbers are those of the stored notebooks, and its links lead somewhere."""

import re
from pathlib import Path

import nbformat
import pytest

from clipad.studies.common import METRIC_NAMES, Interval
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


def rows_of(name):
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.S)[1].strip()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_the_table_is_that_of_notebook_05():
    means = recorded("05_benchmark")["means"]
    shown = {name: [float(x) for x in numbers] for name, *numbers in rows_of("means")}
    assert set(shown) == {"Direct", "CLIP Surgery", "WinCLIP", "SDP", "SDP+"}
    for name, values in shown.items():
        assert values == pytest.approx([100 * means[name][column] for column in COLUMNS], abs=0.051)


def as_the_readme_has_it(claim):
    """Verdict and interval of a recorded claim."""
    if claim["estimate"] is None:
        return claim["verdict"], ""
    ends = Interval(*(claim[key] for key in ("estimate", "low_wide", "high_wide")))
    metric = METRIC_NAMES.get(claim["metric"], claim["metric"])
    level = claim["level"]
    told = f"{metric} {ends} against {100 * level:g}" if level else f"{metric} {ends:+}"
    return claim["verdict"], told.strip()


@pytest.mark.parametrize("row", rows_of("findings"), ids=lambda row: row[0][:40])
def test_every_finding_is_a_claim_of_its_notebook(row):
    sentence, verdict, interval, link = row
    stem = re.search(r"notebooks/(\w+)\.ipynb", link)[1]
    claims = [c for c in recorded(stem)["claims"] if c["sentence"] == sentence]
    assert (verdict, interval) in [as_the_readme_has_it(c) for c in claims]


def test_there_are_findings_of_each_notebook_on_the_method():
    cited = {re.search(r"notebooks/(\d\d)", row[-1])[1] for row in rows_of("findings")}
    assert cited >= {"00", "01", "02", "03", "04", "05"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()
