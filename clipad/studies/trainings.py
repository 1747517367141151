"""Which findings hold for other trainings of the demo model, read from ``data/demo/trainings.csv``.

``python -m demo_world.trainings`` measured every method and the main ablations on each of them; nothing runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from clipad.published import data_dir
from clipad.studies.common import METRIC_NAMES, groups
from clipad.studies.figures import dots, rows_and_series, subplots

METRICS = ("class_auroc", "image_auroc", "pixel_auroc", "pixel_f1_max", "pixel_pro")
RATES = ("opposite", "opposite_on_object")
COLUMNS = ("seed", "steps", "weights", "method", "category", *METRICS, *RATES)
"""metrics and rates are fractions; the rates are those of Direct and SDP only"""


@dataclass(frozen=True)
class Finding:
    """``a`` minus ``b`` (a method, or a number such as the chance level) in one metric, on one group of categories."""

    sentence: str
    metric: str
    a: str
    b: str | float
    group: str = "all"


FINDINGS = (
    Finding("SDP above Direct", "pixel_pro", "SDP", "Direct"),
    Finding("SDP above WinCLIP", "pixel_pro", "SDP", "WinCLIP"),
    # Added when the row above turned round: with the mean vector it does not, so the representative vector is why.
    Finding("SDP, mean vector, above WinCLIP", "pixel_pro", "SDP, mean vector", "WinCLIP"),
    Finding("SDP above CLIP Surgery", "pixel_pro", "SDP", "CLIP Surgery"),
    Finding("SDP+ above SDP, textures", "pixel_pro", "SDP+", "SDP", "textures"),
    Finding("SDP+ above SDP, objects", "pixel_pro", "SDP+", "SDP", "objects"),
    Finding("four stages above one path", "pixel_pro", "SDP", "SDP, one path over all blocks"),
    Finding("restarts help", "pixel_pro", "SDP, as written", "SDP, no restart"),
    Finding("class-token weights help", "pixel_pro", "SDP", "SDP, no class-token weights"),
    Finding("released above written", "pixel_pro", "SDP", "SDP, as written"),
    Finding("DBSCAN above the mean", "pixel_auroc", "SDP", "SDP, mean vector"),
    Finding("Direct: opposite on the object", "opposite_on_object", "Direct", 0.5),
    Finding("Direct: opposite anywhere", "opposite", "Direct", 0.5),
    Finding("SDP turns them right", "opposite_on_object", "Direct", "SDP"),
)


def trainings_file() -> Path:
    """``data/demo/trainings.csv``, a row per training, method and category."""
    return data_dir() / "demo" / "trainings.csv"


def after_file() -> Path:
    """``data/demo/after_clip_ad.csv``: the same for the methods of notebook 08."""
    return trainings_file().with_name("after_clip_ad.csv")


def read_trainings(file: str | Path | None = None) -> pd.DataFrame:
    """The table with `COLUMNS`. ValueError for a file of another form."""
    file = Path(file or trainings_file())
    table = pd.read_csv(file, dtype={"weights": str})
    if tuple(table.columns) != COLUMNS:
        raise ValueError(
            f"{file} has the columns {', '.join(table.columns)}; expected {', '.join(COLUMNS)}: "
            "restore it, or let python -m demo_world.trainings write a new one"
        )
    return table


def differences(
    table: pd.DataFrame, a: str, b: str | float, metric: str, group: str = "all"
) -> pd.Series:
    """``a`` minus ``b`` per training (seed, steps): mean over the categories of ``group`` (all, textures, objects)."""
    if group != "all":
        table = table[table["category"].isin(groups(table["category"].unique())[group])]
    means = table.pivot_table(metric, ["seed", "steps"], "method")
    return (means[a] - (means[b] if isinstance(b, str) else b)).dropna()


def findings(table: pd.DataFrame, chosen: Sequence[Finding] = FINDINGS) -> pd.DataFrame:
    """Finding x training: differences, and ``turns round``: not all of one sign.

    A column is called "seed 1, 8,000 steps".
    """
    rows = {}
    for finding in chosen:
        found = differences(table, finding.a, finding.b, finding.metric, finding.group)
        found.index = [f"seed {seed}, {steps:,} steps" for seed, steps in found.index]
        name = METRIC_NAMES.get(finding.metric, "share of images")
        rows[f"{finding.sentence} ({name})"] = found
    frame = pd.DataFrame(rows).T
    frame["turns round"] = (frame.max(axis=1) > 0) & (frame.min(axis=1) < 0)
    return frame


def plot_findings(frame: pd.DataFrame) -> Figure:
    """Dots in points, a row per finding and a colour per training; ``frame``: what :func:`findings` returns.

    Large and small differences have an axis each, so that the large ones do not hide the signs of the others.
    """
    values = frame.drop(columns="turns round").astype(float)
    large = values.abs().max(axis=1) > 0.1
    parts = [part for part in (values[large], values[~large]) if len(part)]
    same, many = (~frame["turns round"]).sum(), values.shape[1]
    title = f"{same} of {len(frame)} findings point the same way in all {many} sets of weights"
    if same < len(frame):
        title += f"; {len(frame) - same} turn round (↔)"
    heights, size = [len(part) + 1 for part in parts], (8, 1.4 + 0.34 * len(values))
    figure, axes = subplots(len(parts), 1, size, title, height_ratios=heights)
    for ax, part in zip(axes[:, 0], parts, strict=True):
        turning = frame.loc[part.index, "turns round"]
        marked = part.rename(index=lambda name: f"{name}  ↔" if turning[name] else name)
        dots(ax, rows_and_series(marked))
        ax.axvline(0, color="0.3", linewidth=1, zorder=1.5)
        ax.grid(axis="x", color="0.9")
    axes[-1, 0].set_xlabel("points; right of 0: as the row says")
    axes[0, 0].legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.01))
    return figure
