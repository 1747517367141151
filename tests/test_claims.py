"""The page of claims that ends `clipad run --all`."""

import json

import pandas as pd

from clipad.tools.claims import write_claims

CLAIM = {
    "id": "a", "sentence": "four | beat one", "source": "paper 3.2", "metric": "pixel_pro", "verdict": "higher",
    "estimate": 0.015, "low": 0.01, "high": 0.02, "low_wide": 0.007, "high_wide": 0.043, "level": 0.0,
    "scope": "other images and categories", "p": 0.01, "measured": "PRO +1.5 [+0.7, +4.3]",
}  # fmt: skip
EXACT = CLAIM | dict.fromkeys(("estimate", "low", "high", "low_wide", "high_wide", "p"))
EXACT |= {"verdict": "holds", "metric": "", "measured": ""}


def record(folder, notebook, **results):
    path = folder / f"{notebook}.json"
    path.write_text(json.dumps({"notebook": notebook, "results": results}))
    return path


def test_claims_of_all_notebooks_come_on_one_page(tmp_path):
    published = {"0": {"method": "SDP", "metric": "pro", "ours": 0.51234, "published": 0.8}}
    records = [
        record(tmp_path, "03_path", claims=[CLAIM, CLAIM | {"id": "c"}]),
        record(tmp_path, "04_layers", claims=[EXACT]),
        record(tmp_path, "05_benchmark", **{"beside published": published}),
    ]
    page = write_claims(records, tmp_path).read_text()
    table = pd.read_csv(tmp_path / "claims.csv")
    assert table["notebook"].tolist() == ["03_path", "03_path", "04_layers"]
    assert table["low_wide"].tolist()[:2] == [0.007, 0.007]
    lines = [line for line in page.splitlines() if "beat one" in line]
    assert "PRO +1.5 [+0.7, +4.3]" in lines[0]
    assert "holds" in lines[2]
    assert "(04_layers.ipynb)" in lines[2]
    assert "0.5123" in page
    # a cell's own bar does not end it
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_no_claims_no_page(tmp_path):
    assert write_claims([record(tmp_path, "00_a")], tmp_path) is None
    assert write_claims([], tmp_path) is None
