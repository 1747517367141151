"""Notebook 07's figures: data in, Figure out."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL, dot_panels, name_rows

KNOWN, FLAWLESS, DEFECTIVE = (COLOURS["grey"], "s"), (NORMAL, "o"), (ANOMALOUS, "^")


def _points(rows: Mapping[str, Sequence[tuple]], height: float, xlabel: str):
    """A chart with named rows; a row has (values, (colour, marker)) of one or more groups. The points are spread around
    their row, so that equal values do not hide each other."""
    figure, ax = plt.subplots(figsize=(7.5, height))
    for place, groups in enumerate(rows.values()):
        for values, (colour, marker) in groups:
            spread = place + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)
            ax.plot(values, spread, marker, color=colour, alpha=0.75, markersize=5)
    name_rows(ax, list(rows))
    ax.set_xlabel(xlabel)
    return figure, ax


def decisions(frame: pd.DataFrame, rule) -> Figure:
    """Scores of the flawless images that set the rule, of other flawless and of defective ones, and the threshold.
    ``frame``: of :meth:`clipad.studies.inspection.trials.Product.decide`; ``rule``: the inspector's."""
    good, bad = (frame["score"][frame["label"] == label] for label in (0, 1))
    rows = {
        f"flawless, set the rule ({len(rule.scores)})": [(rule.scores, KNOWN)],
        f"flawless, new ({len(good)})": [(good, FLAWLESS)],
        f"defective, new ({len(bad)})": [(bad, DEFECTIVE)],
    }
    figure, ax = _points(rows, 2.3, "score")
    ax.axvline(rule.threshold, color=COLOURS["red"])
    return figure


def names(table: pd.DataFrame, labels: np.ndarray) -> Figure:
    """Class probability of each image for each name that was typed; the bar is the flawless images' median.

    ``table``: a row per name: ``name``, ``median`` and ``probabilities`` (N); ``labels``: N.
    """
    looks = [FLAWLESS, DEFECTIVE]
    rows = {
        f"“{row.name}”": [(row.probabilities[labels == i], looks[i]) for i in (0, 1)]
        for row in table.itertuples()
    }
    figure, ax = _points(rows, 0.7 * len(table) + 0.9, "class probability of “anomalous”")
    places = np.arange(len(table))
    ax.vlines(table["median"], places - 0.4, places + 0.4, color=NORMAL, linewidth=2)
    ax.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_xlim(-0.02, 1.02)
    return figure


def rates(table: pd.DataFrame, promised: float) -> Figure:
    """False-alarm rate per category, mean over draws: scored as if new, and in sample; the red line is the promise.

    ``table``: of the page's ``tried``.
    """
    means = table.groupby("category")[["false_alarms", "in_sample"]].mean()
    means = means.set_axis(["scored as if new", "in sample"], axis=1)
    figure = dot_panels({"": means}, "false-alarm rate on other flawless images, percent")
    figure.axes[0].axvline(100 * promised, color=COLOURS["red"])
    return figure


def promise(table: pd.DataFrame) -> Figure:
    """How far the true false-alarm rate may be from the promised one, over the number of flawless images.

    ``table``: ``rate``, ``n``, ``low`` and ``high``, of three rates.
    """
    figure, ax = plt.subplots(figsize=(7.5, 3.2))
    colours = [COLOURS[name] for name in ("orange", "blue", "green")]
    for colour, (rate, own) in zip(colours, table.groupby("rate", sort=False), strict=True):
        ax.fill_between(own["n"], 100 * own["low"], 100 * own["high"], color=colour, alpha=0.25)
        ax.hlines(100 * rate, 7, own["n"].iloc[-1], color=colour, linestyle=":", linewidth=1)
        ax.text(own["n"].iloc[-1], 100 * rate, f" {100 * rate:g} %", color=colour, va="center")
    numbers, ticks = (9, 20, 50, 100, 200, 500, 1000), (0.03, 0.1, 1, 5, 10, 30)
    ax.set(xscale="log", yscale="log", xlim=(7, 1300), ylim=(0.02, 40))
    ax.set(xlabel="flawless images", ylabel="true false-alarm rate")
    ax.minorticks_off()
    ax.set_xticks(numbers, numbers)
    ax.set_yticks(ticks, [f"{t:g} %" for t in ticks])
    return figure
