"""What the stored results of several trainings of the demo model say of a finding."""

import pandas as pd
import pytest

from clipad.datasets import load_dataset
from clipad.files import content_hash
from clipad.published import data_dir
from clipad.studies.trainings import (
    COLUMNS,
    FINDINGS,
    Finding,
    differences,
    findings,
    plot_findings,
    read_trainings,
)


@pytest.fixture
def table():
    """Two trainings, two methods: on the texture SDP gains .2 and .1, on the object it gains .1 and loses .3."""
    rows = [
        (1, 8000, "Direct", "tile", 0.5),
        (1, 8000, "SDP", "tile", 0.7),
        (1, 8000, "Direct", "gear", 0.4),
        (1, 8000, "SDP", "gear", 0.5),
        (2, 8000, "Direct", "tile", 0.6),
        (2, 8000, "SDP", "tile", 0.7),
        (2, 8000, "Direct", "gear", 0.8),
        (2, 8000, "SDP", "gear", 0.5),
    ]
    names = ["seed", "steps", "method", "category", "pixel_pro"]
    return pd.DataFrame(rows, columns=names).reindex(columns=COLUMNS)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("all", [0.15, -0.1]),
        ("textures", [0.2, 0.1]),
        ("objects", [0.1, -0.3]),
    ],
)
def test_difference_per_training_is_the_mean_over_the_group(table, group, expected):
    found = differences(table, "SDP", "Direct", "pixel_pro", group)
    assert found.to_numpy() == pytest.approx(expected)
    assert list(found.index) == [(1, 8000), (2, 8000)]


def test_a_number_stands_for_a_level(table):
    found = differences(table, "SDP", 0.5, "pixel_pro", "objects")
    assert found.to_numpy() == pytest.approx([0, 0])


def test_a_finding_that_turns_round_is_marked_in_table_and_figure(table):
    chosen = [
        Finding("on textures", "pixel_pro", "SDP", "Direct", "textures"),
        Finding("on objects", "pixel_pro", "SDP", "Direct", "objects"),
    ]
    frame = findings(table, chosen)
    assert frame["turns round"].tolist() == [False, True]
    figure = plot_findings(frame)
    assert "1 of 2" in figure.get_suptitle()
    labels = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    assert [name for name in labels if "↔" in name] == ["on objects (PRO)  ↔"]


def test_another_table_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("seed,steps\n1,2\n")
    with pytest.raises(ValueError, match="expected seed, steps, weights"):
        read_trainings(tmp_path / "x.csv")


def test_stored_results_hold_every_finding_for_every_training_and_the_shipped_weights():
    stored = read_trainings()
    assert set(stored["category"]) == set(load_dataset("demo").categories)
    shipped = data_dir() / "demo" / "model" / "model.safetensors"
    assert content_hash(shipped)[:16] in set(stored["weights"])
    assert not findings(stored, FINDINGS).isna().any(axis=None)
