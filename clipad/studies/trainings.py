"""Which findings hold for other trainings of the demo model, as ``python -m demo_world.trainings`` measured them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from clipad.published import data_dir
from clipad.studies.common import METRIC_NAMES, groups
from clipad.studies.figures import dots, rows_and_series, subplots


class Finding(NamedTuple):
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
    """The stored table: seed and steps of the training, hash of the weights, method, category, and fractions: metrics,
    and for Direct and SDP the rates of opposite predictions."""
    return pd.read_csv(file or trainings_file(), dtype={"weights": str})


def findings(table: pd.DataFrame, chosen: Sequence[Finding] = FINDINGS) -> pd.DataFrame:
    """Finding x training ("seed 1, 8,000 steps"): differences of means over the categories of the finding's group, and
    ``turns round``: not all of one sign."""
    categories, rows = table["category"].unique(), {}
    of_group = {"all": categories} | groups(categories)
    for sentence, metric, a, b, group in chosen:
        own = table[table["category"].isin(of_group[group])]
        means = own.pivot_table(metric, ["seed", "steps"], "method")
        found = (means[a] - (means[b] if isinstance(b, str) else b)).dropna()
        found.index = [f"seed {seed}, {steps:,} steps" for seed, steps in found.index]
        rows[f"{sentence} ({METRIC_NAMES.get(metric, 'share of images')})"] = found
    frame = pd.DataFrame(rows).T
    frame["turns round"] = (frame.max(axis=1) > 0) & (frame.min(axis=1) < 0)
    return frame


def plot_findings(frame: pd.DataFrame) -> Figure:
    """Dots in points, a row per finding (:func:`findings`), a colour per training; large and small differences have an
    axis each, so that the large ones do not hide the signs of the others."""
    turning = frame["turns round"]
    same, many = (~turning).sum(), frame.shape[1] - 1
    title = f"{same} of {len(frame)} findings point the same way in all {many} sets of weights"
    if turning.any():
        title += f"; {turning.sum()} turn round (↔)"
    values = frame.drop(columns="turns round").astype(float)
    values = values.rename(index=lambda name: f"{name}  ↔" if turning[name] else name)
    large = values.abs().max(axis=1) > 0.1
    parts = [part for part in (values[large], values[~large]) if len(part)]
    heights, size = [len(part) + 1 for part in parts], (8, 1.4 + 0.34 * len(values))
    figure, axes = subplots(len(parts), 1, size, title, height_ratios=heights)
    for ax, part in zip(axes[:, 0], parts, strict=True):
        dots(ax, rows_and_series(part))
        ax.axvline(0, color="0.3", linewidth=1, zorder=1.5)
        ax.grid(axis="x", color="0.9")
    axes[-1, 0].set_xlabel("points; right of 0: as the row says")
    axes[0, 0].legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.01))
    return figure
