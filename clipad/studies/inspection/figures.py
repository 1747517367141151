"""Notebook 07's figures: data in, Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from clipad.studies.figures import ANOMALOUS, COLOURS, MAP, NORMAL, contour
from clipad.studies.inspection import without_specks


def decisions(frame: pd.DataFrame, rule) -> Figure:
    """Scores of the flawless images that set the rule, of other flawless and of defective ones, and the threshold.

    ``frame``: :func:`clipad.studies.inspection.trials.decide`; ``rule``: :class:`clipad.studies.inspection.Rule`.
    """
    groups = [
        ("flawless, set the rule", rule.scores, COLOURS["grey"], "s"),
        ("flawless, new", frame["score"][frame["label"] == 0], NORMAL, "o"),
        ("defective, new", frame["score"][frame["label"] == 1], ANOMALOUS, "^"),
    ]
    figure, ax = plt.subplots(figsize=(7.5, 2.3), layout="constrained")
    for place, (_, values, colour, marker) in enumerate(groups):
        ax.plot(values, _spread(values, place), marker, color=colour, markersize=6, alpha=0.8)
    ax.axvline(rule.threshold, color=COLOURS["red"], linewidth=1.5)
    ax.text(rule.threshold, -0.75, " bad", color=COLOURS["red"], fontsize=9, va="top")
    ax.set_yticks(
        range(len(groups)), [f"{name} ({len(v)})" for name, v, _, _ in groups], fontsize=9
    )
    ax.set(ylim=(len(groups) - 0.4, -0.8))
    ax.set_xlabel("score", fontsize=9)
    sns.despine(ax=ax, left=True)
    return figure


def _spread(values, place: int) -> np.ndarray:
    """Heights around a row, so that equal values do not hide each other; the same in every run."""
    return place + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)


def names(table: pd.DataFrame, labels: np.ndarray) -> Figure:
    """Class probability of each image for each name that was typed."""
    figure, ax = plt.subplots(figsize=(7.5, 0.7 * len(table) + 0.9), layout="constrained")
    for place, row in enumerate(table.itertuples()):
        for label, colour, marker in ((0, NORMAL, "o"), (1, ANOMALOUS, "^")):
            values = row.probabilities[labels == label]
            ax.plot(values, _spread(values, place), marker, color=colour, alpha=0.7, markersize=5)
        ax.plot([row.median] * 2, [place - 0.4, place + 0.4], color=NORMAL, linewidth=2)
    ax.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(table)), [f"“{name}”" for name in table["name"]], fontsize=9)
    ax.set(ylim=(len(table) - 0.4, -0.6), xlim=(-0.02, 1.02))
    ax.set_xlabel("class probability of “anomalous”", fontsize=9)
    sns.despine(ax=ax, left=True)
    return figure


def rates(table: pd.DataFrame, promised: float) -> Figure:
    """False-alarm rate per category, mean over draws: scored as if new, and in sample; the line is the promise."""
    means = table.groupby("category")[["false_alarms", "in_sample"]].mean()
    figure, ax = plt.subplots(figsize=(7.5, 0.32 * len(means) + 1.1), layout="constrained")
    for place, row in enumerate(means.itertuples()):
        ax.plot([100 * row.false_alarms, 100 * row.in_sample], [place] * 2, color="0.75", zorder=0)
    places = range(len(means))
    ax.plot(
        100 * means["false_alarms"], places, "o", color=COLOURS["blue"], label="scored as if new"
    )
    ax.plot(100 * means["in_sample"], places, "D", color=COLOURS["orange"], label="in sample")
    ax.axvline(100 * promised, color=COLOURS["red"], linewidth=1.5)
    ax.set_yticks(places, means.index, fontsize=9)
    ax.set(ylim=(len(means) - 0.4, -0.6), xlim=(0, None))
    ax.set_xlabel("false-alarm rate on other flawless images, percent (line: promised)", fontsize=9)
    ax.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=ax, left=True)
    return figure


def promise(table: pd.DataFrame) -> Figure:
    """How far the true false-alarm rate may be from the promised one, over the number of flawless images."""
    colours = [COLOURS[c] for c in ("orange", "blue", "green")]
    figure, ax = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    for (rate, own), colour in zip(table.groupby("rate", sort=False), colours, strict=False):
        ax.fill_between(own["n"], 100 * own["low"], 100 * own["high"], color=colour, alpha=0.25)
        ax.plot(own["n"], 100 * own["high"], color=colour)
        ax.plot(own["n"], 100 * own["low"], color=colour)
        ends = [table["n"].min(), table["n"].max()]
        ax.plot(ends, [100 * rate] * 2, color=colour, linestyle=":", linewidth=1)
        ax.text(own["n"].iloc[-1], 100 * rate, f" {100 * rate:g} %", color=colour, va="center")
    numbers = [n for n in (9, 20, 50, 100, 200, 500, 1000) if n <= table["n"].max()]
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(numbers, numbers, minor=False, fontsize=9)
    ax.set_xticks([], minor=True)
    ticks = [0.03, 0.1, 1, 5, 10, 30]
    ax.set_yticks(ticks, [f"{t:g} %" for t in ticks], fontsize=9)
    ax.set_ylim(0.02, 40)
    ax.set_xlabel("flawless images", fontsize=9)
    ax.set_ylabel("true false-alarm rate", fontsize=9)
    sns.despine(ax=ax)
    return figure


def growth(table: pd.DataFrame, marks: Mapping[str, str]) -> Figure:
    """Share of defective images called bad over the number of flawless images: mean and interval over categories.

    ``table``: columns ``n``, ``map``, ``estimate``, ``low``, ``high``; ``marks``: map -> marker.
    """
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    colours = (COLOURS["blue"], COLOURS["orange"])
    for shift, (name, marker), colour in zip((-0.15, 0.15), marks.items(), colours, strict=True):
        own = table[table["map"] == name]
        for row in own.itertuples():
            ends = [100 * row.low, 100 * row.high]
            ax.plot([row.n + shift] * 2, ends, color=colour, linewidth=1, alpha=0.6)
        ax.plot(own["n"] + shift, 100 * own["estimate"], marker=marker, color=colour, label=name)
    ax.set_xticks(sorted(set(table["n"])))
    ax.set(ylim=(0, 100))
    ax.set_xlabel("flawless images", fontsize=9)
    ax.set_ylabel("defective images called bad, %", fontsize=9)
    ax.tick_params(labelsize=9)
    ax.legend(fontsize=9, frameon=False, loc="lower right")
    sns.despine(ax=ax)
    return figure


def outlined(
    pictures: Sequence[np.ndarray],
    maps: np.ndarray,
    threshold: float,
    titles: Sequence[str],
    masks: np.ndarray | None,
) -> Figure:
    """Above the images, the true defect in green; below the maps on one scale, and what is above the threshold."""
    figure, axes = plt.subplots(
        2, len(pictures), figsize=(1.5 * len(pictures), 3.6), squeeze=False, layout="constrained"
    )
    low = float(np.median(maps))
    for column, (picture, heat, title) in enumerate(zip(pictures, maps, titles, strict=True)):
        top, below = axes[:, column]
        top.imshow(picture)
        if masks is not None and masks[column].any():
            for colour, width in (("black", 2), ("#7CFC00", 1)):
                top.contour(masks[column], levels=[0.5], colors=[colour], linewidths=width)
        below.imshow(heat, cmap=MAP, vmin=low, vmax=low + 1.5 * (threshold - low))
        contour(below, without_specks(heat, threshold) > threshold)
        top.set_title(title, fontsize=9)
        for ax in (top, below):
            ax.set(xticks=[], yticks=[])
            sns.despine(ax=ax, left=True, bottom=True)
    return figure
