"""The comparison of a GPU's records with the stored ones."""

import json

import pytest

from benchmarks.records import NOTEBOOKS, compare, main, stored_record

RESULTS = {
    "SDP": {"screw": {"pixel_auroc": 0.91, "image_auroc": 0.8, "pixel_ap": None}},
    "angles": [19.0, 0.5],
    "latency": {"new image": 120.0},
    "claim": "SDP is higher",
}


def changed(**values):
    found = json.loads(json.dumps(RESULTS))
    found["SDP"]["screw"] |= values
    return found


@pytest.mark.parametrize(
    ("values", "outside"),
    [
        ({}, []),
        ({"pixel_auroc": 0.9115}, []),
        ({"pixel_auroc": 0.915}, ["/SDP/screw/pixel_auroc"]),
        ({"pixel_ap": 0.1}, ["/SDP/screw/pixel_ap"]),
        ({"more": 1.0}, ["/SDP/screw/more"]),
    ],
)
def test_numbers_are_compared_by_their_kind(values, outside):
    table = compare(changed(**values), RESULTS)
    assert table.loc[~table["within"], "name"].tolist() == outside


def test_clocks_are_left_out_and_training_is_wider():
    found = changed(pixel_auroc=0.915)
    found["latency"]["new image"] = 3.0
    assert compare(found, RESULTS, wider=5)["within"].all()


def test_the_stored_records_agree_with_themselves_and_a_missing_one_is_told(tmp_path, capsys):
    stored = {path.stem: stored_record(path) for path in NOTEBOOKS.glob("*.ipynb")}
    records = {name: record for name, record in stored.items() if record is not None}
    assert records
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert main([str(tmp_path)]) == 0
    gone = next(iter(records))
    (tmp_path / f"{gone}.json").unlink()
    assert main([str(tmp_path)]) == 1
    assert gone in capsys.readouterr().out
