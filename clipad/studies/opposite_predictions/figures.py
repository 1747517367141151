"""Figures of notebook 02: what the direct map does wrong, counted, and what lies behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipad.studies.common import TEXTURES, Interval, exact_share, groups
from clipad.studies.figures import ANOMALOUS, COLOURS, MAP, NORMAL, contour

DIVERGING = "PuOr_r"
"""purple: more normal, orange: more anomalous"""
STYLES = {
    "Direct, whole image": ("grey", "s"),
    "Direct": ("orange", "X"),
    "SDP": ("blue", "o"),
    "on the defect": ("orange", "X"),
    "on the rest of the object": ("blue", "o"),
    "on the background": ("grey", "s"),
    "area off the object": ("green", "|"),
    "linear probe": ("blue", "o"),
    "text": ("orange", "X"),
    "linear probe, untrained encoder": ("grey", "s"),
    "q-k attention": ("purple", "s"),
    "v-v attention": ("green", "o"),
    "own value": ("blue", "D"),
    "feed-forward": ("orange", "X"),
}


def steps(image: np.ndarray, mask: np.ndarray, cosines: np.ndarray, values: np.ndarray) -> Figure:
    """The direct map in steps: image, ground truth, cosine with either state, their difference, map.

    ``image`` S x S x 3, ``mask`` S x S, ``cosines`` N x 2, ``values`` S x S.
    """
    grid, size = round(len(cosines) ** 0.5), values.shape[0]
    normal, anomalous = cosines.T.reshape(2, grid, grid)
    limits = {"cmap": "cividis", "vmin": cosines.min(), "vmax": cosines.max()}
    reach = np.abs(anomalous - normal).max()
    panels = [
        ("image", image, None),
        ("ground truth", mask, None),
        ("cosine with $t_n$", normal, limits),
        ("cosine with $t_a$", anomalous, limits),
        ("$z_a - z_n$", anomalous - normal, {"cmap": DIVERGING, "vmin": -reach, "vmax": reach}),
        ("direct map", values, {"cmap": MAP, "vmin": 0, "vmax": 1}),
    ]
    figure, axes = plt.subplots(1, 6, figsize=(9.4, 2.1), layout="constrained")
    for ax, (name, panel, options) in zip(axes, panels, strict=True):
        shown = ax.imshow(
            panel,
            extent=(0, size, size, 0),
            interpolation="nearest",
            **(options or {"cmap": "gray"}),
        )
        ax.set_title(name, fontsize=10)
        _bare(ax)
        bar = figure.colorbar(shown, ax=ax, location="bottom", shrink=0.85, aspect=14, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.locator = plt.MaxNLocator(3)
        bar.update_ticks()
        bar.ax.set_visible(options is not None)  # an empty bar keeps the panels at one size
    return figure


def examples(
    images: Sequence[np.ndarray],
    masks: np.ndarray,
    titles: Sequence[str],
    maps: Mapping[str, tuple[np.ndarray, tuple[float, float] | None]],
) -> Figure:
    """Images in the first row, a row of maps per drawing; ground truth as a contour on the images only.

    ``maps``: per drawing the maps (N x S x S) and their shared limits, None where each image has its own.
    """
    rows, columns = 1 + len(maps), len(images)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.35 * columns + 1.2, 1.35 * rows + 0.4), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for column, (image, mask, title) in enumerate(zip(images, masks, titles, strict=True)):
        axes[0, column].imshow(image)
        if mask.any():
            axes[0, column].contour(mask, levels=[0.5], colors="white", linewidths=1)
        axes[0, column].set_title(title, fontsize=9)
        for row, (values, limits) in enumerate(maps.values(), start=1):
            low, high = limits or (None, None)
            shown = axes[row, column].imshow(values[column], MAP, vmin=low, vmax=high)
            if column == columns - 1 and limits:
                figure.colorbar(shown, ax=axes[row, column], aspect=12).ax.tick_params(labelsize=8)
    for ax, name in zip(axes[:, 0], ["image", *maps], strict=True):
        ax.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        _bare(ax)
    return figure


def scatter(panels: Mapping[tuple[str, str], pd.DataFrame], title: str) -> Figure:
    """Every anomalous image as a point: the map's mean on the defect against its mean on what it is compared with.

    ``panels``: by method and by what it is compared with, in words; columns ``category``, ``x``, ``y``. Shaded, below
    the diagonal, are the opposite predictions.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for ax, ((method, where), frame) in zip(axes[0], panels.items(), strict=True):
        low, high = frame[["x", "y"]].min().min(), frame[["x", "y"]].max().max()
        ends = np.array([low, high]) + np.array([-0.05, 0.05]) * (high - low or 1)
        ax.fill_between(ends, ends, ends[0], color=ANOMALOUS, alpha=0.12, linewidth=0)
        ax.plot(ends, ends, color="0.5", linewidth=1)
        for kind, members in groups(list(dict.fromkeys(frame["category"]))).items():
            own = frame[frame["category"].isin(members)]
            colour, marker = (COLOURS["green"], "s") if kind == "textures" else (NORMAL, "o")
            ax.scatter(
                own["x"],
                own["y"],
                s=20,
                color=colour,
                marker=marker,
                alpha=0.6,
                linewidth=0,
                label=kind,
            )
        below = (frame["y"] < frame["x"]).sum()
        ax.set_title(f"{method}: {below} of {len(frame)} below", fontsize=10)
        ax.set(xlim=ends, ylim=ends, xlabel=f"mean of the map {where}", ylabel="mean on the defect")
        ax.set_box_aspect(1)
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax)
    axes[0, 0].legend(fontsize=9, frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=11)
    return figure


def dots(
    panels: Mapping[str, pd.DataFrame],
    title: str,
    levels: Mapping[str, float] | None = None,
    bands: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Shares in percent with their intervals: rows are compared things, marks are series (``STYLES``).

    A panel is a table of :func:`entry` rows under the name of its axis; ``levels``: by panel, a dotted line; ``bands``:
    grey, by row, what a control reaches (first panel).
    """
    first = next(iter(panels.values()))
    rows = list(dict.fromkeys(first["row"]))
    textures_first = [row for members in groups(rows).values() for row in members]
    rows = textures_first if set(rows) & TEXTURES else rows
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.6 + 3.7 * len(panels), 0.36 * len(rows) + 1.7),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    handles = {}
    for ax, (name, table) in zip(axes[0], panels.items(), strict=True):
        _draw_entries(ax, table, rows, handles)
        if name in (levels or {}):
            ax.axvline(100 * levels[name], color="0.3", linestyle=":", linewidth=1.2)
        ax.set_xlabel(name, fontsize=9.5)
        ax.set(xlim=(-3, 103), yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticklabels(rows)
        ax.tick_params(labelsize=9)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        sns.despine(ax=ax, left=True)
    for row, (low, high) in (bands or {}).items():
        axes[0, 0].barh(
            rows.index(row), 100 * (high - low), left=100 * low, height=0.5, color="0.88", zorder=0
        )
    if len(first) > len(rows):  # else the rows name the series
        _legend_below(figure, handles.values(), handles)
    figure.suptitle(title, fontsize=11)
    return figure


def _legend_below(figure: Figure, handles, labels) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _draw_entries(ax, table: pd.DataFrame, rows: list[str], handles: dict) -> None:
    beside = {row: list(own["series"]) for row, own in table.groupby("row")}
    for row in table.itertuples():
        colour, marker = STYLES[row.series]
        series = beside[row.row]
        place = rows.index(row.row) + 0.13 * (series.index(row.series) - (len(series) - 1) / 2)
        ax.plot(
            [100 * row.low, 100 * row.high],
            [place] * 2,
            color=COLOURS[colour],
            linewidth=2,
            alpha=0.6,
        )
        (mark,) = ax.plot(
            100 * row.estimate,
            place,
            marker,
            color=COLOURS[colour],
            markersize=7,
            mew=2 if marker == "|" else 0.5,
        )
        handles.setdefault(row.series, mark)


def entry(row: str, series: str, found: Interval | float) -> dict:
    """One mark of :func:`dots`: an estimate with its interval, or a number without one."""
    if not isinstance(found, Interval):
        found = Interval(found, np.nan, np.nan)
    ends = {"estimate": found.estimate, "low": found.low, "high": found.high}
    return {"row": row, "series": series} | ends


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
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(1.4 + 3.7 * len(columns), 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    rng = np.random.default_rng(0)
    for ax, (column, name) in zip(axes[0], columns.items(), strict=True):
        _draw_controls(ax, draws, observed, column, rng)
        ax.set(xlim=(-2, 102))
        ax.set_xlabel(name, fontsize=9.5)
        ax.set_yticks(range(len(draws)), [f"{name}\n({len(f)} draws)" for name, f in draws.items()])
        ax.tick_params(labelsize=9)
        sns.despine(ax=ax)
    axes[0, 0].invert_yaxis()
    _legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_controls(ax, draws, observed, column: str, rng) -> None:
    for row, frame in enumerate(draws.values()):
        ax.scatter(
            100 * frame[column],
            row + rng.uniform(-0.24, 0.24, len(frame)),
            s=13,
            color="0.45",
            alpha=0.5,
            linewidth=0,
        )
        ax.vlines(100 * frame[column].mean(), row - 0.36, row + 0.36, color="black", linewidth=2)
    for method, values in observed.items():
        colour, style = ("orange", "-") if method == "Direct" else ("blue", "--")
        ax.axvline(
            100 * values[column],
            color=COLOURS[colour],
            linestyle=style,
            linewidth=2,
            label=method,
        )
    area = next(iter(observed.values())).get(f"{column}_area", 0.5)
    ax.axvline(
        100 * area,
        color="0.3",
        linestyle=":",
        linewidth=1.5,
        label="50 %, or area off the object",
    )


def last_blocks(auroc: Mapping[str, Sequence[float]], writes: pd.DataFrame, title: str) -> Figure:
    """Left: patch AUROC of sums over the last 1, 2, .. L blocks. Middle, right: what each block writes.

    ``auroc``: per part the AUROC for the last 1, 2, .. L blocks; ``writes``: of :func:`who_writes_what`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.3), layout="constrained")
    blocks = range(1, 1 + len(next(iter(auroc.values()))))
    for name, values in auroc.items():
        colour, marker = STYLES[name]
        axes[0].plot(
            blocks,
            100 * np.asarray(values),
            color=COLOURS[colour],
            marker=marker,
            markersize=5,
            label=name,
        )
    axes[0].axhline(50, color="0.3", linestyle=":", linewidth=1.2)
    axes[0].set(
        xlabel="sum over the last … blocks",
        ylabel="patch AUROC of the text, percent",
        ylim=(0, 100),
    )
    means = writes.groupby(["part", "block"])[["class token", "patches"]].mean()
    for ax, column, parts, name in (
        (axes[1], "class token", ("q-k attention", "feed-forward"), "to the class token"),
        (
            axes[2],
            "patches",
            ("v-v attention", "q-k attention", "feed-forward"),
            "to defect − normal patches",
        ),
    ):
        for part in parts:
            colour, marker = STYLES[part]
            values = means.loc[part, column]
            ax.plot(
                values.index, values, color=COLOURS[colour], marker=marker, markersize=5, label=part
            )
        ax.axhline(0, color="0.3", linestyle=":", linewidth=1.2)
        ax.set(xlabel="block (0-based)", ylabel=f"adds to $z_a - z_n$\n{name}")
    for ax in axes:
        ax.xaxis.set_major_locator(plt.MaxNLocator(6, integer=True))
        ax.tick_params(labelsize=9)
        ax.legend(fontsize=8.5, frameon=False)
        sns.despine(ax=ax)
    figure.suptitle(title, fontsize=11)
    return figure


def attention(
    image: np.ndarray,
    mask: np.ndarray,
    patch: int,
    weights: Sequence[np.ndarray],
    lifts: pd.DataFrame,
    title: str,
) -> Figure:
    """What one patch (cyan) attends to by q-k and by v-v (two T x T), and the lift of all images per block.

    ``lifts``: ``block``, ``q-k``, ``v-v``, a row per image and block; medians with the middle half of the images.
    """
    size, grid = image.shape[0], round((weights[0].shape[0] - 1) ** 0.5)
    step = size / grid
    figure, axes = plt.subplots(
        1, 4, figsize=(10.2, 2.7), width_ratios=[1, 1, 1, 1.7], layout="constrained"
    )
    seen = [w[1 + patch, 1:].reshape(grid, grid) for w in weights]
    names = ("image", "q-k attention", "v-v attention")
    for ax, name, panel in zip(axes, names, [image, *seen], strict=False):
        ax.imshow(panel, extent=(0, size, size, 0), cmap=MAP, vmin=0, interpolation="nearest")
        corner = (patch % grid * step, patch // grid * step)
        ax.add_patch(Rectangle(corner, step, step, fill=False, edgecolor="cyan", linewidth=1.5))
        ax.set_title(name if panel.ndim == 3 else f"{name}\n0 to {panel.max():.2f}", fontsize=9.5)
        _bare(ax)
    contour(axes[0], mask)
    for kind in ("q-k", "v-v"):
        colour, marker = STYLES[f"{kind} attention"]
        low, middle, high = (lifts.groupby("block")[kind].quantile(q) for q in (0.25, 0.5, 0.75))
        axes[3].plot(
            middle.index,
            middle,
            color=COLOURS[colour],
            marker=marker,
            markersize=5,
            label=f"{kind} attention",
        )
        axes[3].fill_between(middle.index, low, high, color=COLOURS[colour], alpha=0.2, linewidth=0)
    axes[3].axhline(1, color="0.3", linestyle=":", linewidth=1.2, label="even attention")
    axes[3].set(xlabel="block (0-based)", ylabel="lift on other defect patches", ylim=(0, None))
    axes[3].legend(fontsize=8.5, frameon=False)
    axes[3].tick_params(labelsize=9)
    sns.despine(ax=axes[3])
    figure.suptitle(title, fontsize=11)
    return figure


def _bare(ax) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
