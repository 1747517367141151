"""Notebook 08's figures: data in, Figure out."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.common import METRIC_NAMES, Scores
from clipad.studies.figures import COLOURS, dot_panels, subplots

KINDS = {
    "text": ("blue", "o"),
    "text, masks": ("purple", "D"),
    "masks": ("green", "s"),
    "flawless": ("orange", "^"),
    "test set": ("red", "v"),
    "text, flawless": ("orange", "P"),
    "text, test set": ("red", "X"),
}
"""what a method uses -> colour and marker"""


def standing(scores: Scores, uses: Mapping[str, str], metrics: Sequence[str]) -> Figure:
    """Each method with its wide interval, a panel per metric; colour and marker say what it uses, a line is SDP."""
    panels = {}
    for metric in metrics:
        wide = pd.DataFrame([vars(scores.interval(metric, name)[1]) for name in uses])
        panels[METRIC_NAMES[metric]] = wide.assign(row=list(uses), series=list(uses.values()))
    figure = dot_panels(panels, "percent", looks=KINDS)
    for ax, metric in zip(figure.axes, metrics, strict=True):
        ax.axvline(100 * scores.interval(metric, "SDP")[0].estimate, color="0.6", zorder=0)
    drawn = figure.axes[0].get_legend_handles_labels()
    figure.legend(*drawn, loc="outside lower center", ncols=len(KINDS))
    return figure


def choices(tried: pd.DataFrame) -> Figure:
    """PRO on the auxiliary collection over each free choice, a panel each; the ring is what was chosen."""
    groups = tried.groupby("what", sort=False)
    figure, axes = subplots(2, -(-len(groups) // 2), (8.4, 4.6), sharey=True)
    for ax, (what, rows) in zip(axes.flat, groups, strict=True):
        values, pro = rows["value"].astype(str).str.removeprefix("0"), 100 * rows["pro"]
        ax.plot(values, pro, "o-", color=COLOURS["blue"], markersize=4)
        best = pro.idxmax()
        ax.plot(values[best], pro[best], "o", color=COLOURS["red"], mfc="none", ms=11)
        ax.margins(x=0.15)
        ax.set_title(what)
    for ax in axes[:, 0]:
        ax.set_ylabel("PRO, %")
    return figure
