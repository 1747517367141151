"""Figures of notebook 05: methods per category, quality against time, a gallery at one rate, published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.datasets import read_image
from clipad.studies.benchmark import Row
from clipad.studies.common import METRIC_NAMES, Scores, groups
from clipad.studies.figures import (
    COLOURS,
    MAP,
    contour,
    heatmap,
    image_array,
    legend_below,
    name_rows,
    picture_grid,
    subplots,
)

LOOKS = {
    "Direct": (COLOURS["grey"], "s"),
    "CLIP Surgery": (COLOURS["purple"], "D"),
    "WinCLIP": (COLOURS["orange"], "^"),
    "SDP": (COLOURS["blue"], "o"),
    "SDP+": (COLOURS["green"], "P"),
}


def by_category(
    scores: Scores, metrics: Sequence[str], methods: Sequence[str], title: str
) -> Figure:
    """A dot per method and category, a panel per metric; textures first, the mean at the bottom."""
    kinds = groups(scores.categories)
    order = [*(c for members in kinds.values() for c in members), "mean"]
    size = (1.4 + 2.7 * len(metrics), 0.32 * len(order) + 1.6)
    figure, axes = subplots(1, len(metrics), size, title, sharey=True)
    for ax, metric in zip(axes[0], metrics, strict=True):
        for name in methods:
            (colour, marker), values = LOOKS[name], 100 * scores.table(name).loc[order, metric]
            look = {"color": colour, "label": name, "markersize": 6, "alpha": 0.85}
            ax.plot(values, range(len(order)), marker, **look)
        for place in (len(kinds.get("textures", [])), len(order) - 1):
            ax.axhline(place - 0.5, color="0.8", linewidth=0.8)
        ax.set(title=METRIC_NAMES[metric], xlabel="percent")
        ax.grid(axis="y", color="0.93")
        name_rows(ax, order)
    legend_below(figure, len(methods))
    return figure


def quality_and_time(scores: Scores, milliseconds: pd.Series, metric: str, title: str) -> Figure:
    """The mean of a metric with its wide interval, over the time per image (logarithmic)."""
    figure, ax = plt.subplots(figsize=(6.2, 3.2))
    for name, spent in milliseconds.items():
        (colour, marker), (_, wide) = LOOKS[name], scores.interval(metric, name)
        ax.plot([spent, spent], [100 * wide.low, 100 * wide.high], color=colour)
        ax.plot(spent, 100 * wide.estimate, marker, color=colour, markersize=8, label=name)
    ax.set(xscale="log", xlabel="milliseconds per image", ylabel=f"{METRIC_NAMES[metric]}, percent")
    low, high = milliseconds.min() / 1.5, milliseconds.max() * 1.5
    ticks = [t for e in range(-1, 5) for t in (10**e, 3 * 10**e) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.margins(x=0.15)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(title)
    return figure


def gallery_at_a_rate(rows: Sequence[Row], size: int, title: str) -> Figure:
    """Images and maps; the line is where a map exceeds what few normal pixels of the category exceed.

    Every map has a colour scale of its own category: from its median to its highest value in the row's image. White:
    the method's region; the defect's outline is drawn on the image alone.
    """
    names = list(rows[0].maps)
    titles = [f"{row.sample.category}\n{row.sample.defect}" for row in rows]
    figure, axes = picture_grid(titles, ["image, defect", *names], 1.6)
    figure.suptitle(title)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(image_array(read_image(row.sample.image_path), size))
        contour(line[0], row.mask)
        for ax, name in zip(line[1:], names, strict=True):
            values, limit = row.maps[name], row.thresholds[name]
            ax.imshow(values, cmap=MAP, vmin=np.median(values), vmax=values.max())
            if values.max() > limit:
                ax.contour(values, [limit], colors="white", linewidths=1, linestyles="solid")
    return figure


def published(table: pd.DataFrame, ours: Mapping[str, str], title: str) -> Figure:
    """Published means as a heat map in percent: rows method and kind of source; methods run here are in bold."""
    shown = (100 * table).rename(columns=METRIC_NAMES)
    shown.index = [f"{method} ({kind})" for method, kind in table.index]
    figure, ax = plt.subplots(figsize=(3.2 + 0.95 * len(shown.columns), 0.3 * len(shown) + 1.1))
    heatmap(shown, ax, fontsize=9, cmap="Greys", vmax=160)
    for label, (method, _) in zip(ax.get_yticklabels(), table.index, strict=True):
        label.set_fontweight("bold" if method in ours else "normal")
    ax.set_title(title)
    return figure
