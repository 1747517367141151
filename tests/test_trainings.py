"""What the stored results of several trainings of the demo model say of a finding."""

import pandas as pd
import pytest

from clipad.datasets import load_dataset
from clipad.io.files import content_hash
from clipad.published import data_dir
from clipad.studies.trainings import findings, plot_findings, read_trainings


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
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([], [0.15, -0.1]),
        (["textures"], [0.2, 0.1]),
        (["objects"], [0.1, -0.3]),
    ],
)
def test_difference_per_training_is_the_mean_over_the_group(table, group, expected):
    frame = findings(table, {"x": ("pixel_pro", "SDP", "Direct", *group)})
    assert list(frame.columns) == ["seed 1, 8,000 steps", "seed 2, 8,000 steps", "turns round"]
    assert frame.iloc[0, :2].tolist() == pytest.approx(expected)


def test_a_number_stands_for_a_level(table):
    frame = findings(table, {"x": ("pixel_pro", "SDP", 0.5, "objects")})
    assert frame.iloc[0, :2].tolist() == pytest.approx([0, 0])


def test_a_finding_that_turns_round_is_marked_in_table_and_figure(table):
    both = {
        f"on {group}": ("pixel_pro", "SDP", "Direct", group) for group in ("textures", "objects")
    }
    frame = findings(table, both)
    assert frame["turns round"].tolist() == [False, True]
    figure = plot_findings(frame)
    assert "1 of 2" in figure.get_suptitle()
    labels = [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    assert [name for name in labels if "↔" in name] == ["on objects (PRO)  ↔"]


def test_stored_results_hold_every_method_for_every_training_and_the_shipped_weights():
    stored = read_trainings()
    assert set(stored["category"]) == set(load_dataset("demo").categories)
    shipped = data_dir() / "demo" / "model" / "model.safetensors"
    assert content_hash(shipped)[:16] in set(stored["weights"])
    metrics = stored.pivot_table("pixel_pro", "method", ["seed", "steps"])
    assert metrics.shape == (11, 4)
    assert not metrics.isna().any(axis=None)
