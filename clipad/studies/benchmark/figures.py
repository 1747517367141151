"""Figures of notebook 05: methods beside each other, curves, costs, two scalings of one map, defects that vanish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from clipad.metrics import PRO_LIMIT
from clipad.studies.benchmark import RATES, Benchmark
from clipad.studies.figures import COLOURS, MAP, METRIC_NAMES, contour, heatmaps

_STYLES = [
    (COLOURS[c], marker, line)
    for c, marker, line in zip(
        ("grey", "purple", "orange", "blue", "green", "red"),
        "Xs^oD*",
        ("-", "-", "-", "-", "-", "--"),
        strict=True,
    )
]


def styles(names: Sequence[str]) -> dict[str, tuple]:
    """Colour, marker and line of each method, in their order."""
    return {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(names)}


def benchmark_heatmaps(result: Benchmark, metrics: Sequence[str]) -> Figure:
    """Categories x methods, one panel per metric; metrics that are nowhere known are left out."""
    tables = result.tables()
    panels = {METRIC_NAMES[m]: pd.DataFrame({n: t[m] for n, t in tables.items()}) for m in metrics}
    return heatmaps({name: panel for name, panel in panels.items() if panel.notna().any(axis=None)})


def benchmark_curves(result: Benchmark) -> Figure:
    """ROC with an inset of its low end, precision-recall with the prevalence, PRO to 0.3; images above pixels.

    Every curve is the average over categories. Levels without labels are left out.
    """
    levels = [level for level in ("image", "pixel") if np.isfinite(result.prevalence[level])]
    kinds = ["roc", "pr"] + (["pro"] if "pixel" in levels else [])
    figure, axes = plt.subplots(
        len(levels),
        len(kinds),
        figsize=(3.5 * len(kinds), 3.2 * len(levels)),
        squeeze=False,
        layout="constrained",
    )
    titles = {"roc": "ROC", "pr": "precision and recall", "pro": "per-region overlap"}
    for row, level in enumerate(levels):
        for ax, kind in zip(axes[row], kinds, strict=True):
            if f"{level}_{kind}" == "image_pro":
                ax.axis("off")
                handles = [
                    plt.Line2D([], [], color=c, linestyle=s, marker=m, label=n)
                    for n, (c, m, s) in styles(result.names).items()
                ]
                ax.legend(handles=handles, loc="center", frameon=False, title="method")
                continue
            _curves(ax, result, f"{level}_{kind}")
            if kind == "roc":
                inset = ax.inset_axes((0.45, 0.1, 0.52, 0.45))
                _curves(inset, result, f"{level}_{kind}", low=True)
                ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
                ax.set(xlabel="false positive rate", ylabel="true positive rate")
            elif kind == "pr":
                share = result.prevalence[level]
                ax.axhline(share, color="0.6", linewidth=0.8, linestyle=":")
                ax.text(
                    0.03, share + 0.02, f"prevalence {100 * share:.1f} %", fontsize=7, color="0.35"
                )
                ax.set(xlabel="recall", ylabel="precision")
            else:
                ax.set(
                    xlabel="false positive rate",
                    ylabel="mean overlap with the regions",
                    xlim=(0, PRO_LIMIT),
                )
            ax.set_title(f"{level}s: {titles[kind]}", fontsize=9)
    if "pro" not in kinds or len(levels) == 1:
        axes[0, -1].legend(
            handles=[
                plt.Line2D([], [], color=c, linestyle=s, marker=m, label=n)
                for n, (c, m, s) in styles(result.names).items()
            ],
            fontsize=7,
            frameon=False,
            loc="lower left",
        )
    return figure


def _curves(ax, result: Benchmark, kind: str, low: bool = False) -> None:
    for number, (name, (colour, marker, line)) in enumerate(styles(result.names).items()):
        values = result.curve(name, kind)
        shown = RATES <= 0.05 if low else np.isfinite(values)
        ax.plot(
            RATES[shown], values[shown], line, color=colour, linewidth=1.3, marker=marker, markersize=3.5,
            markevery=(4 * number, 28), label=name,
        )  # fmt: skip
    ax.set_ylim(0, None if low else 1.02)
    ax.set_xlim(0, 0.05 if low else 1)
    ax.tick_params(labelsize=6 if low else 8)
    sns.despine(ax=ax)


def intervals(
    differences: Mapping[str, pd.DataFrame],
    metrics: Sequence[str],
    baseline: str,
    names: Sequence[str],
) -> Figure:
    """Differences of every method to one baseline in points, a panel per metric; no difference is at 0.

    ``differences``: method -> :meth:`Comparison.difference`; ``names``: all methods in their order,
    which gives each its colour. Thick: other images; thin: other categories as well.
    """
    shown = [m for m in metrics if all(m in table.index for table in differences.values())]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(1.6 + 2.3 * len(shown), 0.42 * len(differences) + 1.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, metric in zip(axes[0], shown, strict=True):
        ax.axvline(0, color="0.35", linewidth=1, linestyle="--", zorder=0)
        for y, (name, table) in enumerate(differences.items()):
            colour, marker, _ = styles(names)[name]
            row = 100 * table.loc[metric]
            ax.plot([row["low_both"], row["high_both"]], [y, y], color=colour, linewidth=1.1)
            ax.plot(
                [row["low"], row["high"]],
                [y, y],
                color=colour,
                linewidth=3.6,
                solid_capstyle="butt",
            )
            ax.plot(
                row["difference"], y, marker, color=colour, markersize=7, markeredgecolor="white"
            )
        ax.set_title(METRIC_NAMES[metric], fontsize=10)
        ax.set_xlabel(f"points against {baseline}", fontsize=8)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
        sns.despine(ax=ax, left=True)
    axes[0, 0].set_yticks(range(len(differences)), list(differences))
    axes[0, 0].invert_yaxis()
    return figure


def quality_against_cost(table: pd.DataFrame, metric: str) -> Figure:
    """A metric against time per image and against memory; a point per method.

    ``table``: :func:`clipad.studies.benchmark.costs` with the metric as a further column.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True, layout="constrained")
    labels = {
        "ms per image": "milliseconds per image (log)",
        "peak MB": "peak memory of a batch, MB",
    }
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        for name, (colour, marker, _) in styles(table.index).items():
            if table.loc[name, column] > 0:
                ax.plot(
                    table.loc[name, column],
                    100 * table.loc[name, metric],
                    marker,
                    color=colour,
                    markersize=8,
                    label=name,
                )
        if column == "ms per image":
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        else:
            ax.set_xlim(left=0)
        ax.set_xlabel(label, fontsize=9)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, which="both")
        sns.despine(ax=ax)
    axes[0].set_ylabel(f"{METRIC_NAMES[metric]}, percent", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
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
        axes[0, column].set_title(titles[column], fontsize=8)
        for row, maps in ((1, once), (2, twice)):
            shown = axes[row, column].imshow(maps[column], cmap=MAP, vmin=0, vmax=1)
            contour(axes[row, column], masks[column])
    for ax, text in zip(
        axes[:, 0], ("image", "one scale for\nthe category", "each image\nby itself"), strict=True
    ):
        ax.set_ylabel(text, fontsize=9)
    figure.colorbar(shown, ax=axes[1:, :], shrink=0.8).ax.tick_params(labelsize=7)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure
