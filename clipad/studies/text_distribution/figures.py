"""Figures of notebook 01: the sentences in the plane, what DBSCAN does over eps, and what it is worth."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from clipad.studies.common import METRIC_NAMES
from clipad.studies.figures import ANOMALOUS, COLOURS, NORMAL, heatmap
from clipad.studies.text_distribution import STATES, Sentences

LOOKS = {"normal": (NORMAL, "o"), "anomalous": (ANOMALOUS, "^")}
REGIMES = {
    "finds nothing": COLOURS["grey"],
    "selects": COLOURS["green"],
    "is the mean": COLOURS["blue"],
}


def find_a_sentence(layout: np.ndarray, sentences: Sentences, alt: str) -> HTML:
    """The sentences in the plane as inline SVG: pointing at a mark says which sentence it is. No script is needed."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    x, y = (20 + 720 * (layout - low) / (high - low)).T
    marks = []
    for x_i, y_i, state, text in zip(
        x, 0.55 * y, sentences.table["state"], sentences.table["sentence"], strict=True
    ):
        colour, marker = to_hex(LOOKS[state][0]), LOOKS[state][1]
        title = f"<title>{html.escape(text)}</title>"
        if marker == "o":
            shape = f'<circle cx="{x_i:.0f}" cy="{y_i:.0f}" r="5" fill="{colour}">{title}</circle>'
        else:
            points = (
                f"{x_i:.0f},{y_i - 6:.0f} {x_i - 5:.0f},{y_i + 4:.0f} {x_i + 5:.0f},{y_i + 4:.0f}"
            )
            shape = f'<polygon points="{points}" fill="{colour}">{title}</polygon>'
        marks.append(shape)
    return HTML(
        f'<svg viewBox="0 0 760 430" role="img" aria-label="{html.escape(alt)}" style="max-width:760px;'
        f'background:white" fill-opacity="0.7">{"".join(marks)}</svg>'
    )


def layout_and_variance(
    layout: np.ndarray, sentences: Sentences, variance: pd.DataFrame, title: str
) -> Figure:
    """Left the sentences in the plane by state; right what explains their spread in the full space."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 3.6), width_ratios=[1.5, 1], layout="constrained"
    )
    for state, (colour, marker) in LOOKS.items():
        own = layout[(sentences.table["state"] == state).to_numpy()]
        axes[0].scatter(*own.T, s=16, color=colour, marker=marker, alpha=0.6, label=state, lw=0)
    axes[0].legend(fontsize=9)
    axes[0].set(xticks=[], yticks=[], xlabel="UMAP: neither axes nor distances have a meaning")
    places = np.arange(len(variance))[::-1]
    axes[1].barh(places, 100 * variance["share"], color=COLOURS["blue"], height=0.6)
    axes[1].plot(100 * variance["chance"], places, "|", color="black", markersize=14, mew=2)
    for place, share in zip(places, variance["share"], strict=True):
        axes[1].annotate(f"{100 * share:.0f} %", (100 * share + 1, place), va="center", fontsize=9)
    axes[1].set_yticks(places, variance.index)
    axes[1].set(xlabel="share of the spread, percent (black: shuffled)", xlim=(0, 100))
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
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
    grid, metrics = list(curve.index), list(curve.columns)
    places = np.arange(len(grid))
    rows = 2 + len(metrics)
    figure, axes = plt.subplots(
        rows, 1, figsize=(8.4, 1.6 * rows + 0.5), sharex=True, layout="constrained"
    )
    counts = regimes.groupby("eps")["regime"].value_counts(normalize=True).unstack(fill_value=0)
    bottom = np.zeros(len(grid))
    for regime, colour in REGIMES.items():
        heights = counts.get(regime, pd.Series(0, index=counts.index)).loc[grid].to_numpy()
        axes[0].bar(places, heights, bottom=bottom, color=colour, width=0.8, label=regime)
        bottom += heights
    axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[0].set_ylabel("categories\nand states", fontsize=9)
    axes[1].plot(places, shared.loc[grid], "o-", color=COLOURS["purple"], markersize=4)
    axes[1].set(ylim=(0, 1.05))
    axes[1].set_ylabel("templates in\nboth states", fontsize=9)
    for ax in axes[:2]:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    for ax, metric in zip(axes[2:], metrics, strict=True):
        ax.plot(places, 100 * curve[metric], "o-", color=COLOURS["green"], markersize=4)
        ax.axhline(100 * mean[metric], color=COLOURS["blue"], linestyle="--", label="mean")
        ax.set_ylabel(f"{METRIC_NAMES[metric]},\npercent", fontsize=9)
    axes[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for eps, label in published.items():
        place = grid.index(eps)
        axes[0].annotate(label, (place, 1.04), ha="center", fontsize=8, annotation_clip=False)
        for ax in axes:
            ax.axvline(place, color="0.4", linestyle=":", linewidth=1)
    axes[-1].set_xticks(places, [f"{eps:g}" for eps in grid], fontsize=9)
    axes[-1].set_xlabel("eps")
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure


def enough(
    found: Mapping[str, pd.DataFrame], full: pd.Series, metrics: Sequence[str], title: str
) -> Figure:
    """Metrics over the number of templates or words: a dot per random subset, the line their mean, dashed: all."""
    figure, axes = plt.subplots(
        len(metrics), len(found), figsize=(4 * len(found), 2.1 * len(metrics) + 0.5), squeeze=False,
        sharey="row", sharex="col", layout="constrained",
    )  # fmt: skip
    for column, (what, table) in enumerate(found.items()):
        sizes = table.index.get_level_values(0)
        for row, metric in enumerate(metrics):
            ax, values = axes[row, column], 100 * table[metric]
            ax.plot(sizes, values, "o", color=COLOURS["blue"], alpha=0.4, markersize=4)
            means = values.groupby(level=0).mean()
            ax.plot(means.index, means, color=COLOURS["blue"])
            ax.axhline(100 * full[metric], color="0.4", linestyle="--", linewidth=1)
            axes[row, 0].set_ylabel(f"{METRIC_NAMES[metric]},\npercent", fontsize=9)
        axes[-1, column].set_xscale("log", base=2)
        axes[-1, column].set_xticks(sorted(set(sizes)), sorted(set(sizes)))
        axes[-1, column].set_xlabel(f"number of {what}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure


def word_matrix(words: pd.DataFrame, title: str) -> Figure:
    """Cosines between state words (:func:`word_cosines`) as a heat map; a line parts the states."""
    names = [word.replace("{}", "…") for word in words.index.get_level_values("word")]
    size = 2.4 + 0.3 * len(names)
    figure, ax = plt.subplots(figsize=(size, size - 0.4), layout="constrained")
    values = pd.DataFrame(words.to_numpy(), names, names)
    heatmap(values, ax, fontsize=7, vmin=None, vmax=1, fmt=".2f")
    border = (words.index.get_level_values("state") == STATES[0]).sum()
    ax.axhline(border, color="white", linewidth=3)
    ax.axvline(border, color="white", linewidth=3)
    ax.tick_params(labelsize=9, length=0)
    ax.set_title(title, fontsize=11)
    return figure


def leave_out(changes: Mapping[str, pd.Series], title: str) -> Figure:
    """Change of a metric without each state word, in points: a dot per method and word."""
    words = list(next(iter(changes.values())).index)
    figure, ax = plt.subplots(figsize=(6.4, 0.26 * len(words) + 1.2), layout="constrained")
    looks = zip(("blue", "green"), ("o", "s"), strict=True)
    for (name, values), (colour, marker) in zip(changes.items(), looks, strict=False):
        ax.plot(
            100 * values, range(len(words)), marker, color=COLOURS[colour], label=name, markersize=6
        )
    ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(words)), [w.replace("{}", "…") for w in words], fontsize=9)
    ax.set(ylim=(len(words) - 0.4, -0.6), xlabel="change in points without this word")
    ax.grid(axis="y", color="0.93")
    ax.legend(fontsize=9)
    ax.set_title(title, fontsize=11)
    sns.despine(figure)
    return figure
