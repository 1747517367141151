"""Figures of notebook 02: what the direct map does wrong, counted, and what lies behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipad.studies.common import Interval, exact_share, groups
from clipad.studies.figures import (
    ANOMALOUS,
    COLOURS,
    KINDS,
    MAP,
    contour,
    dots,
    draw,
    legend_below,
    mark_patch,
    name_rows,
    picture_grid,
    subplots,
)
from clipad.studies.opposite_predictions import Example

DIVERGING = "PuOr_r"
"""purple: more normal, orange: more anomalous"""
STYLES = {
    "Direct, whole image": ("grey", "s"),
    "Direct": ("orange", "X"),
    "SDP": ("blue", "o"),
    "on the defect": ("orange", "X"),
    "on the rest of the object": ("blue", "o"),
    "on the background": ("grey", "s"),
    "area off the object": ("green", "D"),
    "linear probe": ("blue", "o"),
    "text": ("orange", "X"),
    "linear probe, untrained encoder": ("grey", "s"),
    "q-k attention": ("purple", "s"),
    "v-v attention": ("green", "o"),
    "own value": ("blue", "D"),
    "feed-forward": ("orange", "X"),
}

KINDS_OF_ATTENTION = ("q-k", "v-v")


def _look(series: str) -> dict:
    colour, marker = STYLES[series]
    return {"color": COLOURS[colour], "marker": marker, "markersize": 6}


def steps(image: np.ndarray, mask: np.ndarray, cosines: np.ndarray, values: np.ndarray) -> Figure:
    """The direct map in steps: image, ground truth, cosine with either state, their difference, map.

    ``image`` S x S x 3, ``mask`` S x S, ``cosines`` N x 2, ``values`` S x S.
    """
    grid = round(len(cosines) ** 0.5)
    normal, anomalous = cosines.T.reshape(2, grid, grid)
    limits = {"cmap": "cividis", "vmin": cosines.min(), "vmax": cosines.max()}
    reach = np.abs(anomalous - normal).max()
    signed = {"cmap": DIVERGING, "vmin": -reach, "vmax": reach}
    panels = {
        "image": (image, {}),
        "ground truth": (mask, {"cmap": "gray"}),
        "cosine with $t_n$": (normal, limits),
        "cosine with $t_a$": (anomalous, limits),
        "$z_a - z_n$": (anomalous - normal, signed),
        "direct map": (values, {"cmap": MAP, "vmin": 0, "vmax": 1}),
    }
    figure, axes = picture_grid([""], list(panels), 1.6, bars=(0, 0.6))
    for ax, (panel, options) in zip(axes[0], panels.values(), strict=True):
        shown = ax.imshow(panel, interpolation="nearest", **options)
        ticks, place = MaxNLocator(3), {"location": "bottom", "shrink": 0.85, "aspect": 14}
        bar = figure.colorbar(shown, ax=ax, ticks=ticks, **place)
        bar.ax.set_visible("vmin" in options)  # an empty bar keeps the panels at one size
    return figure


def scatter(panels: Mapping[tuple[str, str], pd.DataFrame], title: str) -> Figure:
    """Every anomalous image as a point: the map's mean on the defect against its mean on what it is compared with.

    ``panels``: by method and by what it is compared with, in words; columns ``category``, ``x``, ``y``. Shaded, below
    the diagonal, are the opposite predictions.
    """
    figure, axes = subplots(1, len(panels), (3.1 * len(panels), 3.6), title)
    for ax, ((method, where), frame) in zip(axes[0], panels.items(), strict=True):
        low, high = frame[["x", "y"]].min().min(), frame[["x", "y"]].max().max()
        ends = np.array([low, high]) + np.array([-0.05, 0.05]) * (high - low or 1)
        ax.fill_between(ends, ends, ends[0], color=ANOMALOUS, alpha=0.12, linewidth=0)
        ax.plot(ends, ends, color="0.5", linewidth=1)
        for kind, members in groups(frame["category"].unique()).items():
            own, (colour, marker) = frame[frame["category"].isin(members)], KINDS[kind]
            style = {"color": COLOURS[colour], "marker": marker, "alpha": 0.6, "linewidth": 0}
            ax.scatter(own["x"], own["y"], s=20, label=kind, **style)
        below = (frame["y"] < frame["x"]).sum()
        ax.set(xlim=ends, ylim=ends, xlabel=f"mean of the map {where}", ylabel="mean on the defect")
        ax.set(title=f"{method}: {below} of {len(frame)} below", box_aspect=1)
    axes[0, 0].legend(loc="upper left")
    return figure


def shares(
    panels: Mapping[str, pd.DataFrame],
    title: str,
    levels: Mapping[str, float] | None = None,
    bands: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Shares in percent with their intervals: rows are compared things, marks are series (``STYLES``).

    A panel is a table of :func:`entry` rows under the name of its axis; ``levels``: by panel, a dotted line; ``bands``:
    grey, by row, what a control reaches (first panel).
    """
    rows = next(iter(panels.values()))["row"]
    named = [row for members in groups(rows.unique()).values() for row in members]
    size = (1.6 + 3.7 * len(panels), 0.36 * len(named) + 1.7)
    figure, axes = subplots(1, len(panels), size, title, sharey=True)
    for ax, (name, table) in zip(axes[0], panels.items(), strict=True):
        dots(ax, table, STYLES, named)
        if name in (levels or {}):
            ax.axvline(100 * levels[name], color="0.3", linestyle=":", linewidth=1.2)
        ax.set(xlabel=name, xlim=(-3, 103))
        ax.spines["left"].set_visible(False)
    for row, (low, high) in (bands or {}).items():
        band = {"left": 100 * low, "height": 0.5, "color": "0.88", "zorder": 0}
        axes[0, 0].barh(named.index(row), 100 * (high - low), **band)
    if len(rows) > len(named):  # else the rows name the series
        legend_below(figure)
    return figure


def entry(row: str, series: str, found: Interval | float) -> dict:
    """One mark of :func:`shares`: an estimate with its interval, or a number without one."""
    if not isinstance(found, Interval):
        found = Interval(found, np.nan, np.nan)
    return {"row": row, "series": series} | vars(found)


def by_category(frame: pd.DataFrame, column: str, series: str, shares: bool = False) -> list[dict]:
    """A mark per category that has this column: its mean, with the exact interval if it is a share of images."""
    rows = []
    for category, values in frame.dropna(subset=[column]).groupby("category")[column]:
        found = exact_share(round(values.sum()), len(values)) if shares else values.mean()
        rows.append(entry(category, series, found))
    return rows


def controls(
    draws: Mapping[str, pd.DataFrame],
    observed: Mapping[str, pd.Series],
    columns: Mapping[str, str],
    title: str,
) -> Figure:
    """Mean rates of every draw of every control as points, beside what the detectors have as lines.

    ``columns``: what to show, with the name of its axis. A column's ``*_area`` is drawn as a dotted line, else 50 %.
    """
    figure, axes = subplots(1, len(columns), (1.4 + 3.7 * len(columns), 3.2), title, sharey=True)
    rng, lines = np.random.default_rng(0), {"Direct": ("orange", "-"), "SDP": ("blue", "--")}
    for ax, (column, name) in zip(axes[0], columns.items(), strict=True):
        for row, frame in enumerate(draws.values()):
            values, heights = 100 * frame[column], row + rng.uniform(-0.24, 0.24, len(frame))
            ax.scatter(values, heights, s=13, color="0.45", alpha=0.5, linewidth=0)
            ax.vlines(values.mean(), row - 0.36, row + 0.36, color="black", linewidth=2)
        for method, (colour, style) in lines.items():
            look = {"color": COLOURS[colour], "linestyle": style, "linewidth": 2}
            ax.axvline(100 * observed[method][column], label=method, **look)
        area = observed["Direct"].get(f"{column}_area", 0.5)
        ax.axvline(100 * area, color="0.3", linestyle=":", label="50 %, or area off the object")
        ax.set(xlim=(-2, 102), xlabel=name)
        name_rows(ax, [f"{name}\n({len(frame)} draws)" for name, frame in draws.items()])
    legend_below(figure)
    return figure


def last_blocks(auroc: Mapping[str, Sequence[float]], writes: pd.DataFrame, title: str) -> Figure:
    """Left: patch AUROC of sums over the last 1, 2, .. L blocks. Middle, right: what each block writes.

    ``auroc``: per part the AUROC for the last 1, 2, .. L blocks; ``writes``: of :func:`who_writes_what`.
    """
    figure, axes = subplots(1, 3, (10.2, 3.3), title)
    left, *others = axes[0]
    for name, values in auroc.items():
        left.plot(range(1, 1 + len(values)), 100 * np.asarray(values), label=name, **_look(name))
    left.axhline(50, color="0.3", linestyle=":", linewidth=1.2)
    left.set(xlabel="sum over the last … blocks", ylabel="patch AUROC of the text, percent")
    left.set(ylim=(0, 100))
    means = writes.groupby(["part", "block"])[["class token", "patches"]].mean()
    told = {
        "class token": (("q-k attention", "feed-forward"), "the class token"),
        "patches": (("v-v attention", "q-k attention", "feed-forward"), "defect − normal patches"),
    }
    for ax, (column, (parts, name)) in zip(others, told.items(), strict=True):
        for part in parts:
            ax.plot(means.loc[part, column], label=part, **_look(part))
        ax.axhline(0, color="0.3", linestyle=":", linewidth=1.2)
        ax.set(xlabel="block (0-based)", ylabel=f"adds to $z_a - z_n$\nto {name}")
    for ax in axes[0]:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.legend()
    return figure


def attention_of_patch(
    example: Example, weights: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[Figure, str]:
    """Where the example's patch looks, by q-k and by v-v attention, a row per block, and the caption.

    ``weights``: 0-based block -> the two rows of attention weights over all tokens, class token first.
    """
    side, grid = len(example.pixels), round((len(next(iter(weights.values()))[0]) - 1) ** 0.5)
    others = [np.delete(row[1:], example.patch) for rows in weights.values() for row in rows]
    look = {"extent": (0, side, side, 0), "cmap": MAP, "norm": PowerNorm(0.5, 0, np.max(others))}
    titles = ["", *(f"{kind} attention" for kind in KINDS_OF_ATTENTION)]
    figure, axes = picture_grid([""] * len(weights), titles, 1.8, bars=(0, 0.7))
    for row, ax in enumerate(axes[:, 0]):  # the image stands once, beside the middle row
        ax.set_visible(row == len(axes) // 2)
    image = axes[len(axes) // 2, 0]
    image.imshow(example.pixels, extent=look["extent"])
    for line, (block, rows) in zip(axes[:, 1:], weights.items(), strict=True):
        shown = draw(line, [row[1:].reshape(grid, grid) for row in rows], **look)
        line[0].set_ylabel(f"block {block}")
    for ax in (image, *axes[:, 1:].flat):
        mark_patch(ax, example.patch, grid, side)
        contour(ax, example.mask)
    place = {"location": "bottom", "shrink": 0.85, "aspect": 40, "ticks": MaxNLocator(3)}
    figure.colorbar(shown, ax=axes[:, 1:], label="attention weight", **place)
    known = example.mask is not None and example.mask.any()
    blocks = ("Blocks " if len(weights) > 1 else "Block ") + ", ".join(map(str, weights))
    return figure, (
        f"What the marked patch (cyan) of a {example.category}, {example.defect}, takes from every other patch, "
        f"mean over heads{'; the defect is outlined' if known else ''}. {blocks}, counted from 0. All maps share one "
        "scale, the square root of the weight."
    )


def attention_by_block(tables: Mapping[str, pd.DataFrame]) -> tuple[Figure, str]:
    """Share of a defect patch's attention on the rest of the defect, per block: mean over images; and the caption.

    ``tables``: ``trained`` and perhaps ``untrained``, :func:`clipad.studies.opposite_predictions.attention_on_defect`.
    """
    figure, ax = plt.subplots(figsize=(7.2, 3.1))
    lines = {"trained": {"linestyle": "-"}, "untrained": {"linestyle": ":", "mfc": "white"}}
    for network, table in tables.items():
        by_block = 100 * table.groupby("block")[["q-k", "v-v", "even"]].mean()
        for kind in KINDS_OF_ATTENTION:
            label = kind if network == "trained" else f"{kind}, untrained"
            look = _look(f"{kind} attention") | lines[network]
            ax.plot(by_block[kind], label=label, **look)
    even = by_block["even"].mean()
    ax.axhline(even, color="0.3", linewidth=0.8, linestyle="--", label="everywhere alike")
    ax.set(xlabel="block", ylabel="attention on the\nrest of the defect, %", ylim=(0, None))
    ax.set(title="How much a defect's patch takes from the rest of the defect")
    ax.set_xticks(by_block.index)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    images = len(table[["category", "image"]].drop_duplicates())
    caption = f"Mean over {images} anomalous images, per block. Dashed: the share if a patch looked everywhere alike."
    if "untrained" in tables:
        caption += " Solid: this CLIP. Dotted: the same architecture with random weights."
    return figure, caption
