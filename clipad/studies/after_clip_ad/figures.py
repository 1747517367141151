"""Notebook 08's figures: data in, Figure out."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clipad.studies.common import METRIC_NAMES, Scores
from clipad.studies.figures import COLOURS

KINDS = {
    "text": ("blue", "o"),
    "text, masks": ("purple", "D"),
    "masks": ("green", "s"),
    "flawless": ("orange", "^"),
    "test set": ("red", "v"),
    "text, flawless": ("orange", "*"),
    "text, test set": ("red", "*"),
}
"""what a method uses -> colour and marker"""


def standing(scores: Scores, uses: Mapping[str, str], metrics: tuple[str, ...]) -> Figure:
    """Each method with its wide interval, a panel per metric; colour and marker say what it uses, a line is SDP."""
    names = list(uses)
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(2.2 + 3.2 * len(metrics), 0.34 * len(names) + 1.6),
        sharey=True, layout="constrained",
    )  # fmt: skip
    for ax, metric in zip(axes, metrics, strict=True):
        for place, name in enumerate(names):
            _, wide = scores.interval(metric, name)
            colour, marker = KINDS[uses[name]]
            ends = [100 * wide.low, 100 * wide.high]
            ax.plot(ends, [place] * 2, color=COLOURS[colour], linewidth=1.3)
            ax.plot(100 * wide.estimate, place, marker, color=COLOURS[colour], markersize=8)
            ax.annotate(
                f"{100 * wide.estimate:.1f}", (100 * wide.estimate, place - 0.2), fontsize=8,
                ha="center", va="bottom", color="0.25",
            )  # fmt: skip
        ax.axvline(100 * scores.interval(metric, "SDP")[1].estimate, color="0.5", linewidth=0.8)
        ax.set(ylim=(len(names) - 0.4, -0.8))
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set_xlabel(f"{METRIC_NAMES[metric]}, %", fontsize=9)
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax, left=True)
    handles = [
        Line2D([], [], color=COLOURS[c], marker=m, linestyle="", label=kind)
        for kind, (c, m) in KINDS.items()
    ]
    figure.legend(
        handles=handles,
        title="uses",
        ncols=len(KINDS),
        fontsize=8.5,
        frameon=False,
        loc="outside lower center",
    )
    return figure


def choices(tried: pd.DataFrame) -> Figure:
    """PRO on the auxiliary collection over each free number, a panel each; the ring is what was chosen."""
    kinds = list(dict.fromkeys(tried["what"]))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2.5 * len(kinds), 2.5), sharey=True, layout="constrained"
    )
    for ax, what in zip(axes, kinds, strict=True):
        rows = tried[tried["what"] == what].sort_values("value")
        best = rows.loc[rows["pro"].idxmax()]
        ax.plot(rows["value"], 100 * rows["pro"], "o-", color=COLOURS["blue"], markersize=4)
        ax.plot(best["value"], 100 * best["pro"], "o", color=COLOURS["red"], mfc="none", ms=11)
        if what.startswith("weight"):
            ax.set_xscale("log")
        else:
            ax.set_xticks(rows["value"])
        ax.set_title(f"{what}: {best['value']:g}", fontsize=10)
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax)
    axes[0].set_ylabel("PRO, auxiliary products, %", fontsize=9)
    return figure


def shots(table: pd.DataFrame, sdp: float) -> Figure:
    """PRO over the number of flawless images, a dot per draw of images; the line is SDP, which needs none."""
    figure, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
    ks = sorted(table["k"].unique())
    for shift, (idea, colour, marker) in zip(
        (-0.09, 0.09), (("nearest", "orange", "^"), ("one PCA", "green", "s")), strict=True
    ):
        rows = table[table["idea"] == idea]
        places = rows["k"].map(ks.index) + shift
        ax.plot(places, 100 * rows["pro"], marker, color=COLOURS[colour], alpha=0.7, label=idea)
        means = rows.groupby("k")["pro"].mean()
        ax.plot([i + shift for i in range(len(ks))], 100 * means[ks], color=COLOURS[colour])
    ax.axhline(100 * sdp, color=COLOURS["blue"], linestyle="--", linewidth=1.2, label="SDP, none")
    ax.set_xticks(range(len(ks)), ks)
    ax.set_xlabel("flawless images of the product", fontsize=9)
    ax.set_ylabel("PRO, %", fontsize=9)
    ax.legend(fontsize=9, frameon=False)
    sns.despine(ax=ax)
    return figure


def controls(table: pd.DataFrame) -> Figure:
    """PRO of the ideas without text, a row per idea, on the trained tokens and on what no training has shaped."""
    ideas, kinds = list(dict.fromkeys(table["idea"])), list(dict.fromkeys(table["tokens"]))
    figure, ax = plt.subplots(figsize=(6.4, 0.5 * len(ideas) + 1.4), layout="constrained")
    for kind, colour, marker in zip(kinds, ("blue", "grey", "orange"), "osD", strict=True):
        rows = table[table["tokens"] == kind].set_index("idea").loc[ideas]
        ax.plot(
            100 * rows["pro"], range(len(ideas)), marker, color=COLOURS[colour], label=kind, ms=8
        )
    for place, idea in enumerate(ideas):
        values = 100 * table[table["idea"] == idea]["pro"]
        ax.plot([values.min(), values.max()], [place] * 2, color="0.8", zorder=0)
    ax.set(ylim=(len(ideas) - 0.5, -0.5))
    ax.set_yticks(range(len(ideas)), ideas, fontsize=9)
    ax.set_xlabel("PRO, %", fontsize=9)
    ax.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    sns.despine(ax=ax, left=True)
    return figure
