"""Which findings hold for other trainings of the demo model, as ``python -m demo_world.trainings`` measured them."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from clipad.published import data_dir
from clipad.studies.common import METRIC_NAMES, groups
from clipad.studies.figures import dots, rows_and_series, subplots


def read_trainings(file: str | Path = "trainings.csv") -> pd.DataFrame:
    """A table of ``data/demo``: ``trainings.csv`` or, of the methods of notebook 08, ``after_clip_ad.csv``.

    Seed and steps of the training, hash of the weights, method, category, and fractions: metrics, and for Direct and
    SDP the rates of opposite predictions.
    """
    return pd.read_csv(data_dir() / "demo" / file, dtype={"weights": str})


def findings(table: pd.DataFrame, asked: Mapping[str, tuple]) -> pd.DataFrame:
    """Finding x training ("seed 1, 8,000 steps"): differences of means over categories, and ``turns round``: not all of
    one sign.

    ``asked``: sentence -> metric, what is compared (a method) and with what (a method, or a number such as the chance
    level), and perhaps the group of categories.
    """
    categories, rows = table["category"].unique(), {}
    for sentence, (metric, a, b, *group) in asked.items():
        members = groups(categories)[group[0]] if group else categories
        own = table[table["category"].isin(members)]
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
