"""Notebook 07's figures: data in, Figure out."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.figures import (
    ANOMALOUS,
    COLOURS,
    NORMAL,
    name_rows,
)


def _rows(names: Sequence[str], size: tuple[float, float], xlabel: str):
    """A chart with named rows, the first one at the top."""
    figure, ax = plt.subplots(figsize=size)
    name_rows(ax, names)
    ax.set_xlabel(xlabel)
    ax.spines["left"].set_visible(False)
    return figure, ax


def _spread(values, place: int) -> np.ndarray:
    """Heights around a row, so that equal values do not hide each other; the same in every run."""
    return place + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)


def decisions(frame: pd.DataFrame, rule) -> Figure:
    """Scores of the flawless images that set the rule, of other flawless and of defective ones, and the threshold.

    ``frame``: of :meth:`clipad.studies.inspection.trials.Product.decide`; ``rule``: the inspector's.
    """
    groups = {
        "flawless, set the rule": (rule.scores, COLOURS["grey"], "s"),
        "flawless, new": (frame["score"][frame["label"] == 0], NORMAL, "o"),
        "defective, new": (frame["score"][frame["label"] == 1], ANOMALOUS, "^"),
    }
    names = [f"{name} ({len(values)})" for name, (values, *_) in groups.items()]
    figure, ax = _rows(names, (7.5, 2.3), "score")
    for place, (values, colour, marker) in enumerate(groups.values()):
        ax.plot(values, _spread(values, place), marker, color=colour, alpha=0.8)
    ax.axvline(rule.threshold, color=COLOURS["red"])
    ax.text(rule.threshold, -0.55, " bad", color=COLOURS["red"], va="top")
    return figure


def names(table: pd.DataFrame, labels: np.ndarray) -> Figure:
    """Class probability of each image for each name that was typed."""
    typed, size = [f"“{name}”" for name in table["name"]], (7.5, 0.7 * len(table) + 0.9)
    figure, ax = _rows(typed, size, "class probability of “anomalous”")
    for place, row in enumerate(table.itertuples()):
        for label, colour, marker in ((0, NORMAL, "o"), (1, ANOMALOUS, "^")):
            values = row.probabilities[labels == label]
            ax.plot(values, _spread(values, place), marker, color=colour, alpha=0.7, markersize=5)
        ax.plot([row.median] * 2, [place - 0.4, place + 0.4], color=NORMAL, linewidth=2)
    ax.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_xlim(-0.02, 1.02)
    return figure


def promise(table: pd.DataFrame) -> Figure:
    """How far the true false-alarm rate may be from the promised one, over the number of flawless images."""
    figure, ax = plt.subplots(figsize=(7.5, 3.2))
    for (rate, own), name in zip(
        table.groupby("rate", sort=False), ("orange", "blue", "green"), strict=True
    ):
        colour = COLOURS[name]
        ax.fill_between(own["n"], 100 * own["low"], 100 * own["high"], color=colour, alpha=0.25)
        for end in ("low", "high"):
            ax.plot(own["n"], 100 * own[end], color=colour)
        ax.axhline(100 * rate, color=colour, linestyle=":", linewidth=1)
        ax.text(own["n"].iloc[-1], 100 * rate, f" {100 * rate:g} %", color=colour, va="center")
    numbers, ticks = (9, 20, 50, 100, 200, 500, 1000), (0.03, 0.1, 1, 5, 10, 30)
    ax.set(xscale="log", yscale="log", ylim=(0.02, 40))
    ax.minorticks_off()
    ax.set_xticks(numbers, numbers)
    ax.set_yticks(ticks, [f"{t:g} %" for t in ticks])
    ax.set(xlabel="flawless images", ylabel="true false-alarm rate")
    return figure


def growth(table: pd.DataFrame) -> Figure:
    """Share of defective images called bad over the number of flawless images: mean and interval over categories.

    ``table``: columns ``n``, ``map``, ``estimate``, ``low``, ``high``.
    """
    figure, ax = plt.subplots(figsize=(6, 3))
    looks = ((-0.15, NORMAL, "o"), (0.15, ANOMALOUS, "s"))
    for (name, own), (shift, colour, marker) in zip(
        table.groupby("map", sort=False), looks, strict=True
    ):
        places = own["n"] + shift
        ax.vlines(places, 100 * own["low"], 100 * own["high"], color=colour, lw=1, alpha=0.6)
        ax.plot(places, 100 * own["estimate"], marker=marker, color=colour, label=name)
    ax.set_xticks(sorted(set(table["n"])))
    ax.set(ylim=(0, 100), xlabel="flawless images", ylabel="defective images called bad, %")
    ax.legend(loc="lower right")
    return figure
