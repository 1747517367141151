"""Notebook 07's figures: data in, Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL, name_rows

KNOWN, FLAWLESS, DEFECTIVE = (COLOURS["grey"], "s"), (NORMAL, "o"), (ANOMALOUS, "^")


def _points(rows: Mapping[str, Sequence[tuple]], height: float, xlabel: str):
    """A chart with named rows; a row has (values, (colour, marker)) of one or more groups.

    The points are spread around their row, so that equal values do not hide each other; the same in every run.
    """
    figure, ax = plt.subplots(figsize=(7.5, height))
    for place, groups in enumerate(rows.values()):
        for values, (colour, marker) in groups:
            spread = place + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)
            ax.plot(values, spread, marker, color=colour, alpha=0.75, markersize=5)
    name_rows(ax, list(rows))
    ax.set_xlabel(xlabel)
    ax.spines["left"].set_visible(False)
    return figure, ax


def decisions(frame: pd.DataFrame, rule) -> Figure:
    """Scores of the flawless images that set the rule, of other flawless and of defective ones, and the threshold.

    ``frame``: of :meth:`clipad.studies.inspection.trials.Product.decide`; ``rule``: the inspector's.
    """
    good, bad = (frame["score"][frame["label"] == label] for label in (0, 1))
    rows = {
        f"flawless, set the rule ({len(rule.scores)})": [(rule.scores, KNOWN)],
        f"flawless, new ({len(good)})": [(good, FLAWLESS)],
        f"defective, new ({len(bad)})": [(bad, DEFECTIVE)],
    }
    figure, ax = _points(rows, 2.3, "score")
    ax.axvline(rule.threshold, color=COLOURS["red"])
    ax.text(rule.threshold, -0.55, " bad", color=COLOURS["red"], va="top")
    return figure


def names(table: pd.DataFrame, labels: np.ndarray) -> Figure:
    """Class probability of each image for each name that was typed; the bar is the flawless images' median."""
    rows = {
        f"“{row.name}”": [
            (row.probabilities[labels == 0], FLAWLESS),
            (row.probabilities[labels == 1], DEFECTIVE),
        ]
        for row in table.itertuples()
    }
    figure, ax = _points(rows, 0.7 * len(table) + 0.9, "class probability of “anomalous”")
    for place, median in enumerate(table["median"]):
        ax.plot([median] * 2, [place - 0.4, place + 0.4], color=NORMAL, linewidth=2)
    ax.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_xlim(-0.02, 1.02)
    return figure


def rates(table: pd.DataFrame, promised: float) -> Figure:
    """False-alarm rate per category, mean over draws: scored as if new, and in sample; the red line is the promise.

    ``table``: of :func:`clipad.studies.inspection.trials.trials`.
    """
    means = 100 * table.groupby("category")[["false_alarms", "in_sample"]].mean()
    figure, ax = plt.subplots(figsize=(7.5, 0.32 * len(means) + 1.1))
    places = range(len(means))
    ax.hlines(places, means["false_alarms"], means["in_sample"], color="0.75", zorder=0)
    ax.plot(means["false_alarms"], places, "o", color=NORMAL, label="scored as if new")
    ax.plot(means["in_sample"], places, "D", color=ANOMALOUS, label="in sample")
    ax.axvline(100 * promised, color=COLOURS["red"])
    name_rows(ax, list(means.index))
    ax.set_xlim(0, None)
    ax.set_xlabel("false-alarm rate on other flawless images, percent (line: promised)")
    ax.spines["left"].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def promise(table: pd.DataFrame) -> Figure:
    """How far the true false-alarm rate may be from the promised one, over the number of flawless images.

    ``table``: ``rate``, ``n``, ``low`` and ``high``, of three rates.
    """
    figure, ax = plt.subplots(figsize=(7.5, 3.2))
    colours = [COLOURS[name] for name in ("orange", "blue", "green")]
    for colour, (rate, own) in zip(colours, table.groupby("rate", sort=False), strict=True):
        ax.fill_between(own["n"], 100 * own["low"], 100 * own["high"], color=colour, alpha=0.25)
        ax.plot(own["n"], 100 * own[["low", "high"]], color=colour)
        ax.axhline(100 * rate, color=colour, linestyle=":", linewidth=1)
        ax.text(own["n"].iloc[-1], 100 * rate, f" {100 * rate:g} %", color=colour, va="center")
    numbers, ticks = (9, 20, 50, 100, 200, 500, 1000), (0.03, 0.1, 1, 5, 10, 30)
    ax.set(xscale="log", yscale="log", ylim=(0.02, 40))
    ax.set(xlabel="flawless images", ylabel="true false-alarm rate")
    ax.minorticks_off()
    ax.set_xticks(numbers, numbers)
    ax.set_yticks(ticks, [f"{t:g} %" for t in ticks])
    return figure
