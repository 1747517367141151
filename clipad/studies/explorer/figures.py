"""Figure of notebook 06: image, map, one patch's cosines and attention, a row per setting.

A slider waits for this figure, so all panels are drawn into one axes without ticks: matplotlib spends most of its time
on axes and their ticks, and one of them costs a third of five.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from contourpy import contour_generator
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipad.studies.figures import ANOMALOUS, MAP, NORMAL

CUT, PATCH = "#00d0e0", "#37ff37"
_SIDE, _GAP, _TOP, _BOTTOM = 1.0, 0.12, 0.2, 0.3  # in sides of a panel
_WIDTHS = (1, 1, 1.35, 1, 1)
DETECTOR_NAMES = {
    "direct": "Direct",
    "clip_surgery": "CLIP Surgery",
    "sdp": "SDP",
    "sdp_plus": "SDP+",
    "winclip": "WinCLIP",
}


def panels(shown: Sequence) -> Figure:
    """A row per entry of ``shown`` (:class:`clipad.studies.explorer.Shown`).

    Columns: the image; its map on the scale of the reference images; cosines of the patch; its q-k attention; its v-v
    attention. Ground truth is a white line on a black one, the threshold a cyan line, the patch a green square.
    """
    width = sum(_WIDTHS) + _GAP * (len(_WIDTHS) + 1)
    step = _SIDE + _TOP + _BOTTOM
    height = _TOP + step * len(shown)
    figure = Figure(figsize=(9.6, 9.6 * height / width), dpi=100, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    known = any(one.mask is not None for one in shown)
    key = "white line: true defect;  " * known + "cyan line: threshold;  green square: the patch"
    ax.text(_GAP, 0.06, key, fontsize=8, va="top", color="0.25")
    for number, one in enumerate(shown):
        _row(ax, number * step + 2 * _TOP, one)
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    ax.set_axis_off()
    return figure


def png(figure: Figure) -> bytes:
    """The figure as it is, quickly: no tight box, which would draw it twice, no hinting, little compression."""
    buffer = io.BytesIO()
    with rc_context({"text.hinting": "none"}):
        figure.savefig(
            buffer, format="png", pil_kwargs={"compress_level": 1}, metadata={"Software": None}
        )
    return buffer.getvalue()


def describe(shown: Sequence) -> str:
    """Alternative text of :func:`panels`, with the numbers."""
    return " ".join(
        f"{name}: {_name(one)}, object {one.settings.object_name}: class probability {one.probability:.2f}, "
        f"map maximum {one.map.max():.2f} on a scale from {one.limits[0]:.2f} to {one.limits[1]:.2f}, "
        f"{100 * (one.map >= one.cut).mean():.0f} % of the image above the threshold; "
        f"patch in row {one.settings.look[0]}, column {one.settings.look[1]} with "
        + ", ".join(
            f"{k} {v.normal:.2f} normal {v.anomalous:.2f} anomalous"
            for k, v in one.cosines.iterrows()
        )
        + "."
        for name, one in zip("AB", shown, strict=False)
    )


def _name(one) -> str:
    return DETECTOR_NAMES[one.settings.detector]


def _row(ax: Axes, y: float, one) -> None:
    left = np.cumsum([_GAP, *(w + _GAP for w in _WIDTHS)])
    s = one.settings
    patch_row, patch_column, block = s.look
    grid = round((len(one.attention["q-k"]) - 1) ** 0.5)

    def words(column, title, caption=""):
        ax.text(left[column], y - 0.05, title, fontsize=9, va="bottom")
        if caption:
            ax.text(left[column], y + _SIDE + 0.05, caption, fontsize=7.5, va="top", color="0.25")

    def picture(column, values, low=0.0, high=1.0):
        box = (left[column], left[column] + 1, y + _SIDE, y)
        ax.imshow(
            values,
            extent=box,
            cmap=MAP,
            vmin=low,
            vmax=high,
            interpolation="nearest",
            aspect="auto",
        )
        corner = (left[column] + (patch_column - 1) / grid, y + (patch_row - 1) / grid)
        ax.add_patch(
            Rectangle(corner, 1 / grid, 1 / grid, fill=False, edgecolor=PATCH, linewidth=1.4)
        )

    low, high = one.limits
    picture(0, one.image)
    picture(1, one.map, low, max(high, low + 1e-6))
    _lines(ax, one, left[:2], y)
    _bars(ax, left[2], y, one.cosines)
    name = s.object_name if len(s.object_name) < 24 else s.object_name[:22] + "…"
    words(0, name, f"class probability of\n'anomalous': {100 * one.probability:.1f} %")
    words(
        1,
        f"{_name(one)} map",
        f"maximum {one.map.max():.2f}, line {one.cut:.2f}\nscale {low:.2f} to {high:.2f}",
    )
    words(2, f"cosines of the patch ({patch_row}, {patch_column})")

    own = 1 + (patch_row - 1) * grid + patch_column - 1
    top = max(np.delete(weights, [0, own]).max() for weights in one.attention.values())
    for column, (kind, weights) in enumerate(one.attention.items(), start=3):
        picture(column, np.sqrt(weights[1:].reshape(grid, grid) / top))
        shares = (
            f"to itself {100 * weights[own]:.1f} %,\nto the class token {100 * weights[0]:.1f} %"
        )
        words(column, f"{kind} attention, block {block}", shares)


def _lines(ax: Axes, one, left: np.ndarray, y: float) -> None:
    """Ground truth and threshold as lines on image and map."""
    place = y + (np.arange(len(one.map)) + 0.5) / len(one.map)

    def draw(values, level, *strokes):
        found = contour_generator(place - y, place, values).lines(level)
        for colour, width in strokes:
            both = [line + np.array((x, 0)) for x in left for line in found]
            ax.add_collection(LineCollection(both, colors=colour, linewidths=width), autolim=False)

    if one.mask is not None:
        draw(one.mask, 0.5, ("black", 2.6), ("white", 1.1))
    draw(one.map, one.cut, (CUT, 1.3))


def _bars(ax: Axes, x: float, y: float, table) -> None:
    """Cosines with both vectors: a pair of bars per row, all on one scale."""
    low, high = min(0, table.min(axis=None)), max(0, table.max(axis=None))
    unit = 0.8 / max(high - low, 1e-6)
    zero = x + 0.55 - low * unit
    step = _SIDE / len(table)
    gap = min(0.22 * step, 0.05)
    middle = y + (np.arange(len(table)) + 0.5) * step
    for column, colour, side in (("normal", NORMAL, -1), ("anomalous", ANOMALOUS, 1)):
        ends = zero + table[column].to_numpy() * unit
        ax.hlines(middle + side * gap, zero, ends, colors=[colour], linewidth=min(6, 110 * gap))
    for place, (name, values) in zip(middle, table.iterrows(), strict=True):
        label = f"{name}\n{values.normal:.3f} | {values.anomalous:.3f}"
        ax.text(x, place, label, fontsize=7, va="center", linespacing=1.2)
    ax.plot([zero, zero], [y, y + _SIDE], color="0.4", linewidth=0.8)
    for column, colour, place in (("normal", NORMAL, x), ("anomalous", ANOMALOUS, x + 0.45)):
        ax.text(
            place, y + _SIDE + 0.05, column, fontsize=7.5, va="top", color=colour, weight="bold"
        )
