"""Figures of notebook 01: sentences in the plane, their cosines, what each method picks, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from clipad.studies.figures import ANOMALOUS, COLOURS, METRIC_NAMES, NORMAL, heatmap, heatmaps
from clipad.studies.text_distribution import (
    STATES,
    UMAP_OPTIONS,
    Sentences,
    effective_dimension,
    without_articles,
)

STATE_COLOUR = dict(zip(STATES, (NORMAL, ANOMALOUS), strict=True))
STATE_MARKER = dict(zip(STATES, ("o", "^"), strict=True))
METHOD_STYLE = {
    "mean": ("black", "o"),
    "pca": (COLOURS["purple"], "s"),
    "kde": (COLOURS["green"], "D"),
    "dbscan": (COLOURS["red"], "^"),
    "mean_shift": (COLOURS["grey"], "v"),
}
REGIME_COLOUR = {"finds nothing": "0.75", "selects": COLOURS["red"], "is the mean": "black"}


def metric_name(column: str) -> str:
    """A column of :func:`clipad.studies.text_distribution.measure` in words.

    >>> metric_name("SDP pixel_pro"), metric_name("class_auroc")
    ('SDP PRO', 'class AUROC')
    """
    *detector, metric = column.split(" ")
    return " ".join([*detector, METRIC_NAMES.get(metric, metric)])


def listed(values: Mapping, form: str = ".1f", scale: float = 1) -> str:
    """Names with numbers, for captions: NaN left out, columns of metrics in words.

    >>> listed({"class_auroc": 0.912, "b": float("nan")}, scale=100)
    'class AUROC 91.2'
    """
    return ", ".join(
        f"{metric_name(str(k))} {scale * v:{form}}" for k, v in values.items() if not np.isnan(v)
    )


def umap_settings(seed: int) -> str:
    """The settings of a layout in words, for its title."""
    shown = {k: v for k, v in UMAP_OPTIONS.items() if k in ("n_neighbors", "min_dist", "metric")}
    return "UMAP, " + ", ".join(f"{k} {v}" for k, v in shown.items()) + f", random_state {seed}"


def _distinct(names: Sequence[str]) -> dict[str, tuple]:
    """A colour per name: the strong ones of tab20, then the pale ones, then hues."""
    strong, pale = sns.color_palette("tab20")[::2], sns.color_palette("tab20")[1::2]
    colours = [*strong, *pale] if len(names) <= 20 else sns.color_palette("husl", len(names))
    return dict(zip(names, colours, strict=False))


def _points(ax, xy, table, colours: Mapping, column: str, size: float = 14) -> None:
    """One dot per sentence: colour by the column, marker by state."""
    for state in STATES:
        for level, colour in colours.items():
            rows = ((table["state"] == state) & (table[column] == level)).to_numpy()
            ax.scatter(
                *xy[rows].T,
                s=size,
                color=[colour],
                marker=STATE_MARKER[state],
                alpha=0.75,
                linewidths=0,
            )
    ax.set(xticks=[], yticks=[])
    ax.margins(0.06)


def _legend(ax, entries: Mapping[str, tuple], **options) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, markersize=5, label=name)
        for name, (colour, marker) in entries.items()
    ]
    ax.legend(
        handles=handles, fontsize=7, frameon=False, handletextpad=0.1, borderaxespad=0, **options
    )


STATE_LEGEND = {state: (STATE_COLOUR[state], STATE_MARKER[state]) for state in STATES}


def sentence_layout(
    xy: np.ndarray, second: np.ndarray, sentences: Sentences, seed: int, title: str
) -> Figure:
    """One object's sentences in the plane, four times: by state, template, state word, and by state at another seed."""
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.2), layout="constrained")
    table = sentences.table.assign(group=sentences.table["template"].map(without_articles))
    for ax, points, name in (
        (axes[0, 0], xy, "state"),
        (axes[1, 1], second, f"state, random_state {seed + 1}"),
    ):
        _points(ax, points, table, STATE_COLOUR, "state")
        ax.set_title(f"by {name}", fontsize=9)
        _legend(ax, STATE_LEGEND, loc="best")
    groups = table["group"].unique()
    colours = _distinct(groups)
    _points(axes[0, 1], xy, table, colours, "group")
    axes[0, 1].set_title("by template (marker: state)", fontsize=9)
    shown = {g.replace("{}", "…").rstrip("."): (c, "s") for g, c in colours.items()}
    _legend(axes[0, 1], shown, loc="center left", bbox_to_anchor=(1.02, 0.5))
    words, legend = {}, {}
    for state, palette in zip(STATES, ("winter", "autumn"), strict=True):
        own = table.loc[table["state"] == state, "word"].unique()
        for word, colour in zip(own, sns.color_palette(palette, len(own)), strict=True):
            words[f"{state} {word}"] = colour
            legend[word.replace("{}", "…")] = (colour, STATE_MARKER[state])
    _points(axes[1, 0], xy, table.assign(word=table["state"] + " " + table["word"]), words, "word")
    axes[1, 0].set_title("by state word", fontsize=9)
    _legend(axes[1, 0], legend, loc="center right", bbox_to_anchor=(-0.02, 0.5))
    figure.suptitle(f"{title}\n{umap_settings(seed)}", fontsize=10)
    return figure


def object_layout(xy: np.ndarray, sentences: Sentences, seed: int) -> Figure:
    """The sentences of all objects in one plane: by object, and by state."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained")
    table = sentences.table
    objects = table["category"].unique()
    colours = _distinct(objects)
    _points(axes[0], xy, table, colours, "category", size=8)
    axes[0].set_title("by object (marker: state)", fontsize=9)
    _legend(
        axes[0],
        {o: (c, "s") for o, c in colours.items()},
        loc="center right",
        bbox_to_anchor=(-0.02, 0.5),
    )
    _points(axes[1], xy, table, STATE_COLOUR, "state", size=8)
    axes[1].set_title("by state", fontsize=9)
    _legend(axes[1], STATE_LEGEND, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(
        f"{len(table)} sentences of {len(objects)} objects\n{umap_settings(seed)}", fontsize=10
    )
    return figure


def word_matrix(words: pd.DataFrame, title: str) -> Figure:
    """Cosines between state words (:func:`word_cosines`) as a heat map; a line parts the states."""
    names = [word.replace("{}", "…") for word in words.index.get_level_values("word")]
    size = 1.9 + 0.27 * len(names)
    figure, ax = plt.subplots(figsize=(size + 0.6, size), layout="constrained")
    shown = words.to_numpy()
    sns.heatmap(
        shown, ax=ax, cmap="cividis", square=True, xticklabels=names, yticklabels=names,
        cbar_kws={"shrink": 0.6, "label": "cosine of mean embeddings"},
    )  # fmt: skip
    split = (words.index.get_level_values("state") == STATES[0]).sum()
    ax.axhline(split, color="white", linewidth=2.5)
    ax.axvline(split, color="white", linewidth=2.5)
    for label, state in zip(
        [*ax.get_yticklabels(), *ax.get_xticklabels()],
        [*words.index.get_level_values("state")] * 2,
        strict=True,
    ):
        label.set_color(STATE_COLOUR[state])
        label.set_fontsize(7.5)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9)
    return figure


def cosines_and_spectrum(
    cosines: Mapping[str, np.ndarray], spectra: Mapping[str, np.ndarray], title: str
) -> Figure:
    """Histograms of pairwise cosines, and the cumulative variance along principal components."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained")
    colours = [*STATE_COLOUR.values(), "black"]
    low = min(v.min() for v in cosines.values())
    bins = np.linspace(low, 1, 60)
    for (name, values), colour, style in zip(
        cosines.items(), colours, ("-", "--", ":"), strict=True
    ):
        axes[0].hist(
            values, bins=bins, density=True, histtype="step", color=colour, linestyle=style, linewidth=1.6,
            label=f"{name}, mean {values.mean():.2f}",
        )  # fmt: skip
        axes[0].axvline(values.mean(), color=colour, linestyle=style, linewidth=0.8)
    axes[0].set(xlabel="cosine of two sentences", ylabel="density")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    for (name, shares), colour, marker in zip(
        spectra.items(), colours, ("o", "^", "s"), strict=False
    ):
        top = 100 * np.cumsum(shares)[:20]
        axes[1].plot(
            range(1, len(top) + 1), top, color=colour, marker=marker, markersize=4, linewidth=1.2,
            label=f"{name}, effective dimension {effective_dimension(shares):.1f}",
        )  # fmt: skip
    axes[1].set(xlabel="principal components", ylim=(0, 102), xticks=range(0, 21, 5))
    axes[1].yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes[1].set_ylabel("variance explained")
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    for ax in axes:
        sns.despine(ax=ax)
    figure.suptitle(title, fontsize=10)
    return figure


def choices(angles: pd.DataFrame, described: pd.DataFrame) -> Figure:
    """Angles between the methods' vectors, and how many of the sentences each uses per category and state."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 3.4), layout="constrained", width_ratios=(1, 1.25)
    )
    heatmap(angles, axes[0], fontsize=9, square=True, vmax=None)
    axes[0].set_title("angle between the vectors, degrees", fontsize=9)
    axes[0].tick_params(length=0, labelsize=8, rotation=0)
    axes[0].set_xticks(axes[0].get_xticks(), axes[0].get_xticklabels(), rotation=30, ha="right")
    methods = list(angles.index)
    rng = np.random.default_rng(0)
    for offset, state in zip((-0.14, 0.14), STATES, strict=True):
        rows = described[described["state"] == state]
        y = np.array([methods.index(m) for m in rows["method"]]) + offset
        axes[1].scatter(
            100 * rows["share"], y + rng.uniform(-0.08, 0.08, len(y)), s=26, color=[STATE_COLOUR[state]],
            marker=STATE_MARKER[state], alpha=0.75, linewidths=0,
        )  # fmt: skip
    axes[1].set_yticks(range(len(methods)), methods, fontsize=8)
    axes[1].invert_yaxis()
    axes[1].set_xlim(-3, 104)
    axes[1].xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes[1].set_title("sentences used, a point per category and state", fontsize=9)
    axes[1].grid(axis="x", linewidth=0.4)
    _legend(axes[1], STATE_LEGEND, loc="lower left", bbox_to_anchor=(0.02, 0.02))
    sns.despine(ax=axes[1])
    return figure


def eps_curves(
    described: pd.DataFrame,
    measured: pd.DataFrame,
    bands: pd.DataFrame,
    metrics: Sequence[str],
    published: Mapping[float, str],
) -> Figure:
    """The signature figure: DBSCAN over eps. Regimes, angle to the mean, metrics beside the mean's bootstrap band.

    ``described``: of choices named by eps; ``measured``: mean over categories, a row per eps (``value``); ``bands``:
    per metric ``full``, ``low``, ``high`` of the plain mean; ``published``: eps -> label of a vertical line.
    """
    figure, axes = plt.subplots(
        3, 1, figsize=(9.2, 8.2), sharex=True, layout="constrained", height_ratios=(1, 1, 1.7)
    )
    groups = described.groupby("method")
    eps = np.array(sorted(groups.groups))
    regimes = 100 * pd.DataFrame(
        {r: described["regime"].eq(r).groupby(described["method"]).mean() for r in REGIME_COLOUR}
    )
    axes[0].stackplot(
        eps,
        regimes.T.to_numpy(),
        labels=regimes.columns,
        colors=[REGIME_COLOUR[r] for r in regimes],
        alpha=0.75,
    )
    axes[0].plot(
        eps, 100 * groups["share"].mean(), color="white", linewidth=3.6, marker="o", markersize=5
    )
    axes[0].plot(
        eps, 100 * groups["share"].mean(), color=COLOURS["blue"], linewidth=1.8, marker="o", markersize=3.5,
        label="sentences used (mean)",
    )  # fmt: skip
    axes[0].set(ylim=(0, 100))
    axes[0].yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes[0].set_ylabel("of all states\nand categories", fontsize=9)
    axes[0].legend(fontsize=8, loc="center right", framealpha=0.95)
    axes[0].set_title("what DBSCAN does", fontsize=9, loc="left")

    axes[1].fill_between(
        eps,
        groups["angle"].min(),
        groups["angle"].max(),
        color=COLOURS["red"],
        alpha=0.2,
        linewidth=0,
    )
    axes[1].plot(eps, groups["angle"].mean(), color=COLOURS["red"], marker="^", markersize=4)
    axes[1].set_ylabel("degrees", fontsize=9)
    axes[1].set_title(
        "angle to the mean (line: average, area: smallest to largest)", fontsize=9, loc="left"
    )

    for metric, colour, marker in zip(
        metrics, ("blue", "orange", "green"), ("o", "s", "D"), strict=False
    ):
        row = bands.loc[metric]
        axes[2].axhspan(
            100 * row["low"], 100 * row["high"], color=COLOURS[colour], alpha=0.2, linewidth=0
        )
        axes[2].axhline(100 * row["full"], color=COLOURS[colour], linewidth=0.8, linestyle="--")
        axes[2].plot(
            measured["value"], 100 * measured[metric], color=COLOURS[colour], marker=marker, markersize=4,
            label=metric_name(metric),
        )  # fmt: skip
    axes[2].legend(fontsize=8, loc="lower right", framealpha=0.95)
    axes[2].set_ylabel("percent, mean over categories", fontsize=9)
    axes[2].set_title(
        "what it costs (dashed: the mean of all sentences; area: 95 % of its bootstrap)",
        fontsize=9,
        loc="left",
    )
    axes[2].set(
        xlabel="eps (largest possible distance of unit vectors: 2)", xlim=(0, 1.04 * eps.max())
    )
    for ax in axes:
        for value in published:
            ax.axvline(value, color="black", linewidth=1.2, linestyle=":")
        sns.despine(ax=ax)
    for value, label in published.items():
        axes[1].annotate(
            label, (value, 1), (-4, -4), xycoords=axes[1].get_xaxis_transform(), textcoords="offset points",
            fontsize=8, va="top", ha="right",
        )  # fmt: skip
    return figure


def bandwidth_curves(
    described: Mapping[str, pd.DataFrame], published: Mapping[str, float]
) -> Figure:
    """Share of sentences used and angle to the mean over bandwidth, a column of panels per method."""
    figure, axes = plt.subplots(
        2,
        len(described),
        figsize=(9.2, 4.4),
        sharex="col",
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for column, (name, frame) in zip(axes.T, described.items(), strict=True):
        for state in STATES:
            groups = frame[frame["state"] == state].groupby("method")
            for ax, key, scale in zip(column, ("share", "angle"), (100, 1), strict=True):
                ax.plot(
                    list(groups.groups), scale * groups[key].mean(), color=STATE_COLOUR[state],
                    marker=STATE_MARKER[state], markersize=5, label=state,
                )  # fmt: skip
        for ax in column:
            ax.axvline(published[name], color="black", linewidth=1.2, linestyle=":")
            sns.despine(ax=ax)
        column[0].set_title(f"{name} (dotted: published bandwidth {published[name]:g})", fontsize=9)
        column[0].set_ylim(0, 104)
        column[0].yaxis.set_major_formatter(PercentFormatter(decimals=0))
        column[1].set_xlabel("bandwidth")
    axes[0, 0].set_ylabel("sentences used")
    axes[1, 0].set_ylabel("degrees to the mean")
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def method_heatmap(measured: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Categories x methods on all sentences, one panel per metric."""
    full = measured[(measured["draw"] == 0) & (measured["images"] == "all")]
    methods = list(full["value"].unique())
    panels = {}
    for metric in metrics:
        wide = full.pivot(index="category", columns="value", values=metric)[methods]
        wide.loc["mean"] = wide.mean()
        panels[metric_name(metric)] = wide
    return heatmaps(panels)


def difference_intervals(differences: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Method minus mean in points, with the paired intervals: thick over sentences, thin over sentences and images."""
    methods = list(differences["method"].unique())
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.2 + 2.2 * len(metrics), 0.5 * len(methods) + 1.6), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        rows = differences[differences["metric"] == metric].set_index("method")
        for y, method in enumerate(methods):
            row = 100 * rows.loc[method].drop(["metric", "verdict"]).astype(float)
            colour, marker = METHOD_STYLE.get(method, ("black", "o"))
            ax.hlines(y, row["both_low"], row["both_high"], color=colour, linewidth=1.2)
            ax.hlines(
                y,
                row["sentences_low"],
                row["sentences_high"],
                color=colour,
                linewidth=5,
                alpha=0.45,
            )
            ax.plot(row["difference"], y, marker=marker, color=colour, markersize=7)
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set_title(metric_name(metric), fontsize=9)
        ax.set_xlabel("points", fontsize=8)
        ax.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
        ax.margins(x=0.12)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", linewidth=0.4)
        sns.despine(ax=ax)
    figure.suptitle(
        "method minus mean, 95 % intervals; thick: over sentences, thin: over sentences and images",
        fontsize=9,
    )
    return figure


def enough(
    experiments: Mapping[str, pd.DataFrame], full: pd.Series, metrics: Sequence[str]
) -> Figure:
    """Metrics against the number of templates and of state words: mean over draws, and smallest to largest."""
    figure, axes = plt.subplots(
        len(metrics), len(experiments), figsize=(9.2, 2.3 * len(metrics) + 0.6), sharey="row", sharex="col",
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for column, (name, frame) in zip(axes.T, experiments.items(), strict=True):
        for ax, metric, colour, marker in zip(
            column, metrics, ("blue", "green", "orange"), "oDs", strict=False
        ):
            groups = 100 * frame.groupby("value")[metric].agg(["mean", "min", "max"])
            ax.fill_between(
                groups.index,
                groups["min"],
                groups["max"],
                color=COLOURS[colour],
                alpha=0.2,
                linewidth=0,
            )
            ax.plot(
                groups.index, groups["mean"], color=COLOURS[colour], marker=marker, markersize=5
            )
            ax.axhline(100 * full[metric], color="black", linestyle="--", linewidth=0.9)
            ax.set_xscale("log", base=2)
            ax.set_xticks(groups.index, [f"{value:g}" for value in groups.index])
            ax.minorticks_off()
            sns.despine(ax=ax)
        column[-1].set_xlabel(name)
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        ax.set_ylabel(metric_name(metric))
        ax.yaxis.set_major_formatter(PercentFormatter(decimals=1))
    figure.suptitle(
        "line: mean of the draws; area: smallest to largest; dashed: all sentences", fontsize=9
    )
    return figure


def leave_out(changes: Mapping[str, pd.DataFrame], metrics: Sequence[str]) -> Figure:
    """Change in points when one state word is left out; a column per metric, a mark per method.

    ``changes``: method -> frame, index "state: word", columns metrics, fractions.
    """
    first = next(iter(changes.values()))
    order = first.index
    figure, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(9.2, 0.23 * len(order) + 1.3),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        for offset, (method, frame) in zip((-0.15, 0.15), changes.items(), strict=False):
            colour, marker = METHOD_STYLE[method]
            y = np.arange(len(order)) + offset
            ax.hlines(y, 0, 100 * frame.loc[order, metric], color=colour, linewidth=0.8)
            ax.plot(
                100 * frame.loc[order, metric],
                y,
                linestyle="",
                color=colour,
                marker=marker,
                markersize=5,
                label=method,
            )
        ax.axvline(0, color="0.4", linewidth=1)
        ax.set_title(metric_name(metric), fontsize=9)
        ax.set_xlabel("points", fontsize=8)
        ax.grid(axis="x", linewidth=0.4)
        ax.tick_params(labelsize=8)
        sns.despine(ax=ax)
    axes[0, 0].set_yticks(
        range(len(order)), [name.split(": ", 1)[1].replace("{}", "…") for name in order]
    )
    for label, name in zip(axes[0, 0].get_yticklabels(), order, strict=True):
        label.set_color(STATE_COLOUR[name.split(":")[0]])
    axes[0, 0].set_ylim(len(order) - 0.4, -0.6)
    axes[0, -1].legend(fontsize=8, loc="best", framealpha=0.9)
    return figure
