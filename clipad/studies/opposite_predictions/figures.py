"""Figures of notebook 02: what the direct map does wrong, counted, and what lies behind it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipad.studies.common import Interval, exact_share, groups
from clipad.studies.figures import ANOMALOUS, COLOURS, KINDS, MAP, dot_panels, gallery, subplots

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
    "control": ("grey", "o"),
    "q-k attention": ("purple", "s"),
    "v-v attention": ("green", "o"),
    "own value": ("blue", "D"),
    "feed-forward": ("orange", "X"),
}


def steps(image: np.ndarray, mask: np.ndarray, cosines: np.ndarray, values: np.ndarray) -> Figure:
    """The direct map in steps: image S x S x 3, ground truth S x S, cosine with either state (N x 2), their difference,
    map (S x S)."""
    grid = round(len(cosines) ** 0.5)
    normal, anomalous = cosines.T.reshape(2, grid, grid)
    shared, reach = (cosines.min(), cosines.max()), np.abs(anomalous - normal).max()
    maps = {
        "ground truth": mask,
        "cosine with $t_n$": normal,
        "cosine with $t_a$": anomalous,
        "$z_a - z_n$": anomalous - normal,
        "direct map": values,
    }
    limits = ((None, None), shared, shared, (-reach, reach), (0, 1))
    colours = ("gray", "cividis", "cividis", "PuOr_r", MAP)
    limits, colours = (dict(zip(maps, look, strict=True)) for look in (limits, colours))
    return gallery([image], {n: m[None] for n, m in maps.items()}, limits=limits, colours=colours)


def scatter(panels: Mapping[tuple[str, str], pd.DataFrame], title: str) -> Figure:
    """Every anomalous image as a point: ``y``, the map's mean on the defect, over ``x``, that on what it is held to.

    ``panels``: by method and by the latter in words; columns ``category``, ``x``, ``y``. Shaded: opposite predictions.
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
    """Shares in percent: a panel is a table of :func:`entry` rows under its title, with series of ``STYLES``.
    ``levels``: by panel, a dotted line; ``bands``: grey, by row, what a control reaches (first panel)."""
    rows = next(iter(panels.values()))["row"]
    named = [row for members in groups(rows.unique()).values() for row in members]
    figure = dot_panels(panels, "percent", title, STYLES, named)
    for ax, name in zip(figure.axes, panels, strict=True):
        if name in (levels or {}):
            ax.axvline(100 * levels[name], color="0.3", linestyle=":", linewidth=1.2)
        ax.set_xlim(-3, 103)
    for row, (low, high) in (bands or {}).items():
        band = {"left": 100 * low, "height": 0.5, "color": "0.88", "zorder": 0}
        figure.axes[0].barh(named.index(row), 100 * (high - low), **band)
    return figure


def entry(row: str, series: str, found: Interval | float) -> dict:
    """One mark of :func:`shares`: an estimate with its interval, or a number without one."""
    if not isinstance(found, Interval):
        found = Interval(found)
    return {"row": row, "series": series} | vars(found)


def by_category(frame: pd.DataFrame, column: str, series: str, shares: bool = False) -> list[dict]:
    """A mark per category: the column's mean, with the exact interval if it is a share of images."""
    rows = []
    for category, values in frame.dropna(subset=[column]).groupby("category")[column]:
        found = exact_share(round(values.sum()), len(values)) if shares else values.mean()
        rows.append(entry(category, series, found))
    return rows
