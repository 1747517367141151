"""Figures of notebook 01: the sentences in the plane, what DBSCAN does over eps, and what it is worth."""

from __future__ import annotations

import html
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipad.studies.common import METRIC_NAMES
from clipad.studies.figures import (
    ANOMALOUS,
    COLOURS,
    NORMAL,
    dots,
    heatmap,
    name_rows,
    rows_and_series,
    subplots,
)
from clipad.studies.text_distribution import STATES, Sentences

LOOKS = {"normal": (NORMAL, "o"), "anomalous": (ANOMALOUS, "^")}
METHODS = {"mean": ("blue", "o"), "dbscan": ("green", "s")}
REGIMES = {"finds nothing": "grey", "selects": "green", "is the mean": "blue"}


def find_a_sentence(layout: np.ndarray, sentences: Sentences, alt: str) -> HTML:
    """The sentences in the plane as inline SVG: pointing at a mark says which sentence it is. No script is needed."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    places = (20 + 720 * (layout - low) / (high - low)) * (1, 0.55)
    shapes = {"normal": '<circle r="5"', "anomalous": '<polygon points="0,-6 -5,4 5,4"'}
    marks = []
    rows = sentences.table[["state", "sentence"]].itertuples(index=False)
    for (x, y), (state, text) in zip(places, rows, strict=True):
        look = f'fill="{to_hex(LOOKS[state][0])}" transform="translate({x:.0f} {y:.0f})"'
        shape, tag = shapes[state], shapes[state].split()[0][1:]
        marks.append(f"{shape} {look}><title>{html.escape(text)}</title></{tag}>")
    return HTML(
        f'<svg viewBox="0 0 760 430" role="img" aria-label="{html.escape(alt)}" style="max-width:760px;'
        f'background:white" fill-opacity="0.7">{"".join(marks)}</svg>'
    )


def layout_and_variance(
    layout: np.ndarray, sentences: Sentences, variance: pd.DataFrame, title: str
) -> Figure:
    """Left the sentences in the plane by state; right what explains their spread in the full space."""
    figure, axes = subplots(1, 2, (9.6, 3.6), title, width_ratios=[1.5, 1])
    plane, bars = axes[0]
    for state, (colour, marker) in LOOKS.items():
        own = layout[(sentences.table["state"] == state).to_numpy()]
        plane.scatter(*own.T, s=16, color=colour, marker=marker, alpha=0.6, label=state, lw=0)
    plane.legend()
    plane.set(xticks=[], yticks=[], xlabel="UMAP: neither axes nor distances have a meaning")
    places = range(len(variance))
    drawn = bars.barh(places, 100 * variance["share"], color=NORMAL, height=0.6)
    bars.bar_label(drawn, fmt="%.0f %%", padding=3, fontsize=9)
    bars.plot(100 * variance["chance"], places, "|", color="black", markersize=14, mew=2)
    bars.set(xlabel="share of the spread, percent (black: shuffled)", xlim=(0, 100))
    name_rows(bars, variance.index)
    return figure


def eps_curves(
    regimes: pd.DataFrame,
    shared: pd.Series,
    curve: pd.DataFrame,
    mean: pd.Series,
    published: Mapping[float, str],
    title: str,
) -> Figure:
    """DBSCAN over eps: what it does (share of categories and states), which templates both states keep, and the
    metrics beside the mean's (dashed).

    ``shared``, ``curve``: a row per eps; ``published``: eps -> label.
    """
    grid, places, rows = list(curve.index), np.arange(len(curve)), 2 + len(curve.columns)
    figure, axes = subplots(rows, 1, (8.4, 1.6 * rows + 0.5), title, sharex=True)
    above, middle, *others = axes[:, 0]
    counts = regimes.groupby("eps")["regime"].value_counts(normalize=True).unstack(fill_value=0)
    counts = counts.reindex(columns=list(REGIMES), fill_value=0).loc[grid]
    bottom = counts.cumsum(axis=1) - counts
    for regime, colour in REGIMES.items():
        look = {"color": COLOURS[colour], "width": 0.8, "label": regime}
        above.bar(places, counts[regime], bottom=bottom[regime], **look)
    above.set_ylabel("categories\nand states")
    middle.plot(places, shared.loc[grid], "o-", color=COLOURS["purple"], markersize=4)
    middle.set(ylim=(0, 1.05), ylabel="templates in\nboth states")
    for ax in (above, middle):
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    for ax, metric in zip(others, curve.columns, strict=True):
        ax.plot(places, 100 * curve[metric], "o-", color=COLOURS["green"], markersize=4)
        ax.axhline(100 * mean[metric], color=COLOURS["blue"], linestyle="--", label="mean")
        ax.set_ylabel(f"{METRIC_NAMES[metric]},\npercent")
    for ax in (above, others[0]):
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for eps, label in published.items():
        place = grid.index(eps)
        above.annotate(label, (place, 1.04), ha="center", fontsize=9, annotation_clip=False)
        for ax in axes[:, 0]:
            ax.axvline(place, color="0.4", linestyle=":", linewidth=1)
    axes[-1, 0].set_xticks(places, [f"{eps:g}" for eps in grid])
    axes[-1, 0].set_xlabel("eps")
    return figure


def word_matrix(words: pd.DataFrame, title: str) -> Figure:
    """Cosines between state words (:func:`word_cosines`) as a heat map; a line parts the states."""
    names = [word.replace("{}", "…") for word in words.index.get_level_values("word")]
    size = 2.4 + 0.3 * len(names)
    figure, ax = plt.subplots(figsize=(size, size - 0.4))
    values = pd.DataFrame(words.to_numpy(), names, names)
    heatmap(values, ax, fontsize=7, vmin=None, vmax=1, fmt=".2f")
    border = (words.index.get_level_values("state") == STATES[0]).sum()
    for line in (ax.axhline, ax.axvline):
        line(border, color="white", linewidth=3)
    ax.set_title(title)
    return figure


def leave_out(changes: Mapping[str, pd.Series], title: str) -> Figure:
    """Change of a metric without each state word, in points: a dot per method (``METHODS``) and word."""
    words = pd.DataFrame(changes).rename(index=lambda word: word.replace("{}", "…"))
    figure, ax = plt.subplots(figsize=(6.4, 0.26 * len(words) + 1.2))
    dots(ax, rows_and_series(words), METHODS)
    ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    ax.set(xlabel="change in points without this word", title=title)
    ax.legend()
    return figure
