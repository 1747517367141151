"""Figures of notebook 05: methods per category, quality against time, a gallery at one rate, scalings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from clipad.datasets import read_image
from clipad.studies.benchmark import Row
from clipad.studies.common import METRIC_NAMES, Scores, groups
from clipad.studies.figures import COLOURS, MAP, contour, image_array

LOOKS = {
    "Direct": (COLOURS["grey"], "s"),
    "CLIP Surgery": (COLOURS["purple"], "D"),
    "WinCLIP": (COLOURS["orange"], "^"),
    "SDP": (COLOURS["blue"], "o"),
    "SDP+": (COLOURS["green"], "P"),
}


def looks(name: str):
    """Colour and marker of a method, the same in every figure."""
    return LOOKS.get(name, (COLOURS["red"], "v"))


def by_category(
    scores: Scores, metrics: Sequence[str], methods: Sequence[str], title: str
) -> Figure:
    """A dot per method and category, a panel per metric; textures first, the mean at the bottom."""
    order = [c for members in groups(scores.categories).values() for c in members]
    split = len(groups(scores.categories).get("textures", []))
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.4 + 2.7 * len(metrics), 0.32 * len(order) + 1.9), squeeze=False,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        for name in methods:
            colour, marker = looks(name)
            values = 100 * scores.table(name).loc[[*order, "mean"], metric]
            places = [*range(len(order)), len(order) + 0.4]
            ax.plot(values, places, marker, color=colour, label=name, markersize=6, alpha=0.85)
        for place in (split - 0.5, len(order) - 0.3):
            ax.axhline(place, color="0.8", linewidth=0.8)
        ax.set_title(METRIC_NAMES[metric], fontsize=10)
        ax.set_xlabel("percent", fontsize=9)
        ax.set_yticks(places, [*order, "mean"], fontsize=9)
        ax.set(ylim=(len(order) + 1, -0.6))
        ax.grid(axis="y", color="0.93")
        ax.tick_params(labelsize=9)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=9, loc="outside lower center", ncols=len(methods))
    figure.suptitle(title, fontsize=11)
    sns.despine(figure)
    return figure


def quality_and_time(scores: Scores, milliseconds: pd.Series, metric: str, title: str) -> Figure:
    """The mean of a metric with its wide interval, over the time per image (logarithmic)."""
    figure, ax = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    for name, spent in milliseconds.items():
        colour, marker = looks(name)
        _, wide = scores.interval(metric, name)
        ax.plot([spent, spent], [100 * wide.low, 100 * wide.high], color=colour, linewidth=1.5)
        ax.plot(spent, 100 * wide.estimate, marker, color=colour, markersize=8, label=name)
    ax.set(xscale="log", xlabel="milliseconds per image", ylabel=f"{METRIC_NAMES[metric]}, percent")
    low, high = milliseconds.min() / 1.5, milliseconds.max() * 1.5
    ticks = [t for e in range(-1, 5) for t in (10**e, 3 * 10**e) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.margins(x=0.15)
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(title, fontsize=11)
    sns.despine(figure)
    return figure


def gallery_at_a_rate(rows: Sequence[Row], size: int, title: str) -> Figure:
    """Images and maps; the line is where a map exceeds what few normal pixels of the category exceed.

    Every map has a colour scale of its own category: from its median to its highest value in the row's image. White:
    the method's region; the defect's outline is drawn on the image alone.
    """
    names = list(rows[0].maps)
    figure, axes = plt.subplots(
        len(rows), 1 + len(names), figsize=(1.55 * (1 + len(names)) + 0.4, 1.6 * len(rows) + 0.6),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(image_array(read_image(row.path), size))
        if row.mask is not None:
            contour(line[0], row.mask)
        line[0].set_ylabel(row.title, fontsize=9)
        for ax, name in zip(line[1:], names, strict=True):
            values = row.maps[name]
            ax.imshow(values, cmap=MAP, vmin=np.median(values), vmax=values.max())
            if values.max() > row.thresholds[name]:
                ax.contour(
                    values, [row.thresholds[name]], colors="white", linewidths=1, linestyles="solid"
                )
    for ax, name in zip(axes[0], ["image, defect", *names], strict=True):
        ax.set_title(name, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    return figure


def published(table: pd.DataFrame, ours: Mapping[str, str], title: str) -> Figure:
    """Published means as a heat map in percent: rows method and kind of source; methods run here are in bold."""
    shown = (100 * table).rename(columns=METRIC_NAMES)
    figure, ax = plt.subplots(
        figsize=(3.2 + 0.95 * len(shown.columns), 0.3 * len(shown) + 1.1), layout="constrained"
    )
    sns.heatmap(
        shown, ax=ax, annot=True, fmt=".1f", cmap="Greys", vmin=0, vmax=160, cbar=False, linewidths=0.5,
        annot_kws={"fontsize": 9, "color": "black"},
    )  # fmt: skip
    labels = [f"{method} ({kind})" for method, kind in table.index]
    ax.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=9, rotation=0)
    for label, (method, _) in zip(ax.get_yticklabels(), table.index, strict=True):
        label.set_fontweight("bold" if method in ours else "normal")
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelsize=9)
    ax.set_title(title, fontsize=11)
    return figure


def scalings(
    images: Sequence[np.ndarray],
    once: np.ndarray,
    twice: np.ndarray,
    masks: np.ndarray,
    titles: Sequence[str],
) -> Figure:
    """Images, their maps on the scale of the category, and the same scaled again image by image.

    ``images``: S x S x 3; ``once``, ``twice``: N x S x S in 0-1 (``released_program.min_max``).
    """
    figure, axes = plt.subplots(
        3, len(images), figsize=(1.5 * len(images) + 1.6, 4.9), squeeze=False, layout="constrained"
    )
    for column, image in enumerate(images):
        axes[0, column].imshow(image)
        contour(axes[0, column], masks[column])
        axes[0, column].set_title(titles[column], fontsize=9)
        for row, maps in ((1, once), (2, twice)):
            shown = axes[row, column].imshow(maps[column], cmap=MAP, vmin=0, vmax=1)
    rows = ("image", "one scale for\nthe category", "each image\nby itself")
    for ax, text in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(text, fontsize=9)
    figure.colorbar(shown, ax=axes[1:, :], shrink=0.8).ax.tick_params(labelsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure
